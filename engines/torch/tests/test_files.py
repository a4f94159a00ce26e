"""Checkpoints that are read and manifests that are written. No torch."""

import json
import multiprocessing
import os
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from weightfs_export import manifest
from weightfs_export.checkpoint import CheckpointError, read_checkpoint


def shard(header, data=b"", length=None):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


class Scratch(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.path = Path(scratch.name)


class Checkpoints(Scratch):
    def test_tensors_are_where_the_header_says(self):
        header = {"__metadata__": {"format": "pt"}, "b": {"dtype": "U8", "shape": [3], "data_offsets": [2, 5]}}
        raw = shard(header, b"xxabc")
        (self.path / "model.safetensors").write_bytes(raw)
        (self.path / "other.safetensors").write_bytes(b"not read")
        tensor = read_checkpoint(self.path)["b"]
        self.assertEqual(raw[tensor.start : tensor.start + tensor.nbytes], b"abc")
        self.assertEqual((tensor.dtype, tensor.shape), ("U8", (3,)))

    def test_the_index_names_the_files(self):
        for name in ("one", "two", "three"):
            header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
            (self.path / f"{name}.safetensors").write_bytes(shard(header, b"x"))
        index = {"weight_map": {"one": "one.safetensors", "two": "two.safetensors"}}
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))
        self.assertEqual(set(read_checkpoint(self.path)), {"one", "two"})

    def test_what_is_no_checkpoint_is_refused_in_a_sentence(self):
        def files(**content):
            for old in self.path.iterdir():
                old.unlink()
            for name, raw in content.items():
                (self.path / name.replace("__", ".")).write_bytes(raw)

        outside = {"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}
        bad = [
            {}, {"model__safetensors": b""}, {"model__safetensors": b"1234567"}, {"model__safetensors": shard(outside, b"short")},
            {"model__safetensors": shard({}, length=1 << 40)}, {"model__safetensors": shard({}, length=99)},
            {"model__safetensors": shard({"a": {"dtype": "U8"}})}, {"model__safetensors": shard([1])},
            {"model__safetensors__index__json": b"{"}, {"model__safetensors__index__json": b'{"weight_map": {"a": "../x.safetensors"}}'},
            {"model__safetensors__index__json": b'{"weight_map": {"a": "missing.safetensors"}}'}, {"model__safetensors__index__json": b"[]"},
        ]  # fmt: skip
        for content in bad:
            with self.subTest(content=content):
                files(**content)
                with self.assertRaises(CheckpointError):
                    read_checkpoint(self.path)
        with self.assertRaises(CheckpointError):
            read_checkpoint(self.path / "nowhere")


class Manifests(Scratch):
    def test_a_manifest_is_whole_private_and_replaces_the_old_one(self):
        path = self.path / "new" / "m.json"
        for value in (1, 2):
            manifest.write(path, {"weightfs": value})
        self.assertEqual(json.loads(path.read_text()), {"weightfs": 2})
        self.assertEqual((path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777), (0o600, 0o700))
        with self.assertRaises(TypeError):
            manifest.write(path, {"weightfs": object()})
        self.assertEqual(os.listdir(path.parent), ["m.json"])
        self.assertEqual(json.loads(path.read_text()), {"weightfs": 2})

    def test_manifests_of_ended_processes_are_swept_and_no_others(self):
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            pass
        alive = manifest.engine("x", "1")
        kept = {"alive": alive, "note": None}
        gone = {"ended": {**alive, "pid": ended.pid}, "reused": {**alive, "start_time": alive["start_time"] - 1}}
        for name, about in (kept | gone).items():
            (self.path / f"{name}.json").write_text(json.dumps({"engine": about}))
        (self.path / "torn.json").write_text("{")
        (self.path / "ended.txt").write_text(json.dumps({"engine": gone["ended"]}))
        self.assertEqual(manifest.sweep(self.path), [alive])
        self.assertEqual(alive["parents"][0], os.getppid())
        self.assertEqual(set(os.listdir(self.path)), {"alive.json", "note.json", "torn.json", "ended.txt"})
        manifest.sweep(self.path / "nowhere")

    def test_it_goes_with_the_process_and_not_with_a_forked_child(self):
        code = (
            f"import sys, os; sys.path.insert(0, {str(ROOT)!r})\nfrom weightfs_export import manifest\n"
            f"path = {str(self.path / 'm.json')!r}\nmanifest.write(path, {{}})\nmanifest.remove_at_exit(path)\n"
            "if os.fork() == 0: sys.exit()\nos.wait()\nprint(os.path.exists(path))"
        )
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        self.assertEqual(said.strip(), "True")
        self.assertEqual(os.listdir(self.path), [])

    def test_it_goes_with_processes_of_multiprocessing(self):
        for method in ("fork", "spawn"):
            with self.subTest(method=method):
                process = multiprocessing.get_context(method).Process(target=leave, args=(str(self.path / "m.json"),))
                process.start()
                process.join()
                self.assertEqual((process.exitcode, os.listdir(self.path)), (0, []))

    def test_a_file_that_another_has_put_there_stays(self):
        path = self.path / "m.json"
        manifest.write(path, {})
        remove = manifest.remove_at_exit(path)
        manifest.write(path, {"other": 1})
        remove()
        self.assertTrue(path.exists())

    def test_the_directory_is_the_named_one_or_the_users_or_the_systems(self):
        for environment, want in (
            ({"WEIGHTFS_MANIFEST_DIR": "/a", "XDG_RUNTIME_DIR": "/b"}, "/a"), ({"XDG_RUNTIME_DIR": "/b"}, "/b/weightfs"), ({}, "/run/weightfs"),
        ):  # fmt: skip
            with mock.patch.dict(os.environ, environment, clear=True):
                self.assertEqual(manifest.manifest_directory(), want)

    def test_ranks_are_one_engine_by_their_job_or_by_who_started_them(self):
        job = {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500"}
        for environment, want in ((job, "torchrun none 29500"), ({"MASTER_PORT": "29500"}, f"parent {os.getppid()}"), ({}, f"parent {os.getppid()}")):
            with mock.patch.dict(os.environ, environment, clear=True):
                self.assertEqual(manifest.default_instance(2), want)
                self.assertIsNone(manifest.default_instance(1))


def leave(path):
    manifest.write(path, {})
    manifest.remove_at_exit(path)
    assert os.path.exists(path)


if __name__ == "__main__":
    unittest.main()

"""What the HTTP routes do with a mount, on a directory that looks like one, and where the plugin hangs in vLLM. No torch, no vLLM."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
from weightfs_vllm import mount, plugin


class Mounts(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.point = scratch.name
        self.write("ctl", "")
        self.shows(os.getpid())

    def shows(self, *pids, engine="vllm"):
        last = {"command": "train", "says": "no samples"}
        source = {"engine": engine, "pids": pids}
        self.write("status.json", json.dumps({"model": self.point, "source": source, "last_command": last, "jobs": []}))

    def write(self, name, text):
        with open(os.path.join(self.point, name), "w") as f:
            f.write(text)

    def test_the_mount_is_found_by_name_or_by_its_model(self):
        with mock.patch.dict(os.environ, WEIGHTFS_MOUNT="/somewhere"):
            self.assertEqual(mount.find("/model").point, "/somewhere")
        with mock.patch.object(mount, "mount_points", lambda: ["/nowhere", self.point]):
            self.assertEqual(mount.find(self.point + "/.").point, self.point)
            with self.assertRaisesRegex(mount.NoMount, "weightfs mount /other"):
                mount.find("/other")

    def test_a_mount_of_other_weights_of_the_same_directory_is_passed_over(self):
        def found():
            with mock.patch.object(mount, "mount_points", lambda: [self.point]):
                return mount.find(self.point).point

        # The engine is below the server, and beside it where several processes answer HTTP.
        with subprocess.Popen(["sleep", "60"]) as engine:
            self.addCleanup(engine.kill)
            self.shows(os.getppid(), engine.pid)
            self.assertEqual(found(), self.point)
            engine.kill()
        self.shows(os.getppid())
        with mock.patch("multiprocessing.parent_process", return_value=mock.Mock()):
            self.assertEqual(found(), self.point)
        # Another's engine, and weightfs's own copy.
        with self.assertRaisesRegex(mount.NoMount, f"{self.point} shows vllm weights of pid {os.getppid()}, not this server's: weightfs mount"):
            found()
        self.shows(engine="own")
        with self.assertRaisesRegex(mount.NoMount, "shows own weights, not this server's: weightfs mount .* --weights vllm"):
            found()
        self.shows(os.getpid())
        os.unlink(os.path.join(self.point, "ctl"))
        with self.assertRaisesRegex(mount.NoMount, "is read-only"):
            found()

    def test_a_commit_is_one_line_whatever_the_message(self):
        mount.Mount(self.point).commit("one\ntrain {}\n two")
        self.assertEqual(Path(self.point, "ctl").read_text(), "commit one train {} two")

    def test_a_refusal_has_weightfs_own_sentence(self):
        with mock.patch("os.write", side_effect=OSError(errno.EINVAL, "Invalid argument")):
            with self.assertRaisesRegex(mount.Refused, "no samples") as raised:
                mount.Mount(self.point).tell("train /job")
            # What is said of another command is not said of this one.
            with self.assertRaisesRegex(mount.Refused, "Invalid argument"):
                mount.Mount(self.point).tell("commit")
        self.assertEqual(mount.HTTP[raised.exception.errno], 400)

    def test_points_with_spaces_are_read_from_the_table(self):
        table = "31 22 0:44 / /mnt/my\\040model rw - fuse weightfs rw\n32 22 0:45 / /mnt/x rw - fuse sshfs rw\n"
        with mock.patch("builtins.open", mock.mock_open(read_data=table)):
            self.assertEqual(list(mount.mount_points()), ["/mnt/my model"])


class Plugin(unittest.TestCase):
    def test_a_module_is_patched_when_it_is_imported_and_not_before(self):
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, "weightfs_test_worker.py").write_text("value = 1\n")
            seen = []
            with mock.patch.object(sys, "path", [scratch, *sys.path]):
                plugin.after_import("weightfs_test_worker", lambda m: seen.append(m.value))
                plugin.after_import("weightfs_test_worker", lambda m: seen.append("twice"))
                self.assertEqual(seen, [])
                import weightfs_test_worker

                self.assertEqual(seen, [1])
                plugin.after_import("weightfs_test_worker", lambda m: seen.append(2))
                self.assertEqual(seen, [1, 2])
            del sys.modules["weightfs_test_worker"], weightfs_test_worker

    def test_nothing_that_goes_wrong_here_reaches_vllm(self):
        class Worker:
            def load_model(self, *, load_dummy_weights=False):
                return ("loaded", load_dummy_weights)

        module = mock.Mock(Worker=Worker)
        plugin.wrap_worker(module)
        plugin.wrap_worker(module)
        # Worker has no vllm_config, so that a session cannot even begin; torch may be missing too.
        with self.assertLogs("vllm.weightfs", "ERROR"):
            self.assertEqual(Worker().load_model(load_dummy_weights=True), ("loaded", True))

    def test_hooks_that_do_not_fit_this_vllm_do_not_reach_it(self):
        class Session:
            refused = None
            published = []

            def __init__(self, worker):
                pass

            @contextlib.contextmanager
            def hooks(self):
                raise AttributeError("load_weights has another name")
                yield

            def publish(self):
                self.published.append(self.refused)

        class Worker:
            def load_model(self):
                return "loaded"

        plugin.wrap_worker(mock.Mock(Worker=Worker))
        with mock.patch.dict(sys.modules, {"weightfs_vllm.session": mock.Mock(Session=Session)}):
            with self.assertLogs("vllm.weightfs", "ERROR"):
                self.assertEqual(Worker().load_model(), "loaded")
        # Whoever mounts is told why.
        self.assertIn("load_weights has another name", Session.published[0])

    def test_manifests_of_workers_that_vllm_kills_at_exit_are_swept(self):
        """As in a program that uses `vllm.LLM`: its engine is ended by a finalizer, and what it imports has made others before."""
        code = (
            "import subprocess, weakref\nfrom weightfs_vllm import plugin\nfrom weightfs_vllm.export import manifest\n"
            "weakref.finalize(manifest.engine, int)\nplugin.register()\nplugin.register()\nworker = subprocess.Popen(['sleep', '60'])\n"
            "about = {**manifest.engine('vllm', '1'), 'pid': worker.pid, 'start_time': manifest.process_start(worker.pid)}\n"
            "about['parents'] = manifest.parents(worker.pid)\n"
            "manifest.write(manifest.manifest_directory() + '/worker.json', {'engine': about})\n"
            "weakref.finalize(manifest.engine, lambda: (worker.kill(), worker.wait()))\n"
        )
        with tempfile.TemporaryDirectory() as scratch:
            environment = {**os.environ, "WEIGHTFS_MANIFEST_DIR": scratch, "PYTHONPATH": str(Path(__file__).parents[1])}
            subprocess.run([sys.executable, "-c", code], env=environment, check=True)
            self.assertEqual(os.listdir(scratch), [])


if __name__ == "__main__":
    unittest.main()

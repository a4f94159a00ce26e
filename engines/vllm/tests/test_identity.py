"""What a worker says of its engine and its model, for configurations as vLLM has them. No torch, no vLLM."""

import os
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace as Config
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
from weightfs_vllm.identity import instance, model_directory, ranks


def config(instance_id="17", **parallel):
    parallel = {"world_size": 1, "data_parallel_size": 1, "data_parallel_rank": 0, "data_parallel_index": 0, **parallel}
    return Config(instance_id=instance_id, parallel_config=Config(**parallel))


class Engines(unittest.TestCase):
    def test_replicas_of_a_dense_model_are_engines_of_their_own(self):
        replicas = [config(data_parallel_index=i) for i in range(2)]
        self.assertEqual([instance(c) for c in replicas], ["17", "17_dp1"])
        self.assertEqual([ranks(c, Config(rank=0)) for c in replicas], [(0, 1), (0, 1)])
        # Ray's have names of their own already.
        self.assertEqual([instance(config(f"17_dp{i}", data_parallel_index=i)) for i in range(2)], ["17_dp0", "17_dp1"])

    def test_replicas_that_share_experts_are_one_engine(self):
        sharing = dict(world_size=2, data_parallel_size=2)
        for name in ("17", "17_dp1"):
            replica = config(name, data_parallel_index=1, data_parallel_rank=1, **sharing)
            self.assertEqual((instance(replica), ranks(replica, Config(rank=1))), ("17", (3, 4)))

    def test_an_engine_without_a_name_is_its_parent_process(self):
        self.assertEqual(instance(config("")), str(os.getppid()))


class Models(unittest.TestCase):
    def directory(self, model, hub):
        vllm = Config(model_config=Config(model=model, revision="r1"), load_config=Config(download_dir="/cache"))
        with mock.patch.dict(sys.modules, huggingface_hub=hub):
            return model_directory(vllm)

    def test_a_directory_is_itself_and_an_id_is_where_the_cache_has_it(self):
        hub = mock.Mock()
        hub.snapshot_download.return_value = "/cache/snapshots/abc"
        with tempfile.TemporaryDirectory() as model:
            self.assertEqual(self.directory(model + "/", hub), model)
        self.assertEqual(self.directory("Qwen/Qwen3-8B", hub), "/cache/snapshots/abc")
        hub.snapshot_download.assert_called_once_with("Qwen/Qwen3-8B", revision="r1", cache_dir="/cache", local_files_only=True)

    def test_an_id_that_is_nowhere_stays_what_it_is(self):
        hub = mock.Mock()
        hub.snapshot_download.side_effect = OSError("not in the cache")
        self.assertEqual(self.directory("Qwen/Qwen3-8B", hub), "Qwen/Qwen3-8B")
        self.assertEqual(self.directory("Qwen/Qwen3-8B", None), "Qwen/Qwen3-8B")


if __name__ == "__main__":
    unittest.main()

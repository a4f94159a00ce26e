"""Each setting that makes weights impossible to share is refused with the flag that helps. No torch, no vLLM."""

import sys
import unittest
from pathlib import Path
from types import SimpleNamespace as Config

sys.path.insert(0, str(Path(__file__).parents[1]))
from weightfs_vllm.refusals import foreign_reason, opaque_reason, refusal


def config(device="cuda", **changes):
    parts = {
        "model_config": dict(enable_sleep_mode=False, enable_cumem_allocator=False, quantization=None),
        "load_config": dict(load_format="auto"),
        "parallel_config": dict(enable_eplb=False),
        "offload_config": dict(uva=Config(cpu_offload_gb=0), prefetch=Config(offload_group_size=0)),
        "compilation_config": dict(inductor_compile_config={}),
        "device_config": dict(device_type=device),
    }
    for part, values in changes.items():
        parts[part].update(values)
    return Config(**{name: Config(**values) for name, values in parts.items()})


class Refusals(unittest.TestCase):
    def test_an_ordinary_engine_is_not_refused(self):
        for device in ("cuda", "cpu"):
            self.assertIsNone(refusal(config(device), {}))
        self.assertIsNone(refusal(config(load_config={"load_format": "safetensors"}), {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}))

    def test_each_refusal_names_what_to_change(self):
        cases = [
            (config(model_config={"enable_sleep_mode": True}), "--enable-sleep-mode"),
            (config(model_config={"enable_cumem_allocator": True}), "--enable-cumem-allocator"),
            (config(model_config={"quantization": "fp8"}), "--quantization"),
            (config(load_config={"load_format": "ipc_cache"}), "--load-format ipc_cache"),
            (config(load_config={"load_format": "tensorizer"}), "--load-format safetensors"),
            (config(parallel_config={"enable_eplb": True}), "--enable-eplb"),
            (config(offload_config={"uva": Config(cpu_offload_gb=4)}), "--cpu-offload-gb"),
            (config(offload_config={"prefetch": Config(offload_group_size=4)}), "--offload-group-size"),
            (config("cpu", compilation_config={"inductor_compile_config": {"max_autotune": True}}), "max_autotune"),
        ]
        for engine, remedy in cases:
            with self.subTest(remedy=remedy):
                self.assertIn(remedy, refusal(engine, {}))

    def test_allocators_matter_on_cuda_only(self):
        for setting in ("expandable_segments:True", "max_split_size_mb:64, expandable_segments: True", "backend:cudaMallocAsync"):
            environment = {"PYTORCH_CUDA_ALLOC_CONF": setting}
            self.assertIn("unset", refusal(config(), environment))
            self.assertIsNone(refusal(config("cpu"), environment))

    def test_repacked_experts_on_a_gpu_can_be_helped(self):
        self.assertIn("--moe-backend triton", opaque_reason("model.layers.0.mlp.experts.routed_experts.w13_weight", False))
        self.assertNotIn("--moe-backend", opaque_reason("model.layers.0.mlp.experts.routed_experts.w13_weight", True))

    def test_names_of_mistrals_own_format_are_told_from_other_strangers(self):
        checkpoint = {"model.norm.weight": None}
        self.assertIsNone(foreign_reason({"model.norm.weight", "more"}, checkpoint, ["/m/consolidated.safetensors"]))
        self.assertIsNone(foreign_reason(set(), checkpoint, []))
        said = foreign_reason({"norm.weight"}, checkpoint, ["/m/consolidated-1.safetensors", "/m/consolidated-2.safetensors"])
        self.assertIn("--load-format safetensors --config-format hf", said)
        for files in ([], ["/m/model.safetensors", "/m/consolidated.safetensors"]):
            self.assertIn("norm.weight, …) than the checkpoint's (model.norm.weight", foreign_reason({"norm.weight"}, checkpoint, files))


if __name__ == "__main__":
    unittest.main()

"""What a session does to a vLLM that is not as it expects. Needs torch (skipped without); vLLM's modules are stand-ins."""

import contextlib
import sys
import unittest
from pathlib import Path
from types import ModuleType
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    import torch
except ImportError:
    raise unittest.SkipTest("needs torch") from None

from weightfs_vllm.session import Session


def session(on_cpu):
    new = Session.__new__(Session)
    new.refused, new.on_cpu, new.model_name, new.loads, new.folder, new.rank = None, on_cpu, "/m", [], None, 0
    return new


class Loader:
    def load_weights(self, model, model_config):
        return "loaded"


class Hooks(unittest.TestCase):
    @contextlib.contextmanager
    def vllm(self, **gemm):
        """A vLLM of these parts."""
        names = ["", ".model_executor", ".model_executor.layers", ".model_executor.layers.utils", ".model_executor.model_loader"]
        names += [".model_executor.model_loader.base_loader", ".model_executor.model_loader.default_loader"]
        modules = {f"vllm{name}": ModuleType(f"vllm{name}") for name in names}
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, module)
        layers, base, default = (modules[f"vllm{name}"] for name in (names[3], names[5], names[6]))
        vars(layers).update(gemm)
        base.process_weights_after_loading = lambda model, model_config, target_device: None
        default.DefaultModelLoader = type("DefaultModelLoader", (Loader,), {"load_weights": Loader.load_weights})
        with mock.patch.dict(sys.modules, modules):
            yield layers, base, default.DefaultModelLoader

    def test_everything_is_put_back(self):
        for on_cpu in (False, True):
            with self.vllm(dispatch_cpu_unquantized_gemm=min) as (layers, base, loader):
                before = (layers.dispatch_cpu_unquantized_gemm, base.process_weights_after_loading, loader.load_weights)
                with self.assertRaises(KeyError), session(on_cpu).hooks():
                    self.assertEqual(layers.dispatch_cpu_unquantized_gemm is min, not on_cpu)
                    self.assertIsNot(loader.load_weights, before[2])
                    raise KeyError
                self.assertEqual((layers.dispatch_cpu_unquantized_gemm, base.process_weights_after_loading, loader.load_weights), before)

    def test_what_only_the_cpu_needs_may_be_missing_on_a_gpu(self):
        with self.vllm() as (_, _, loader):
            with session(on_cpu=False).hooks():
                self.assertIsNot(loader.load_weights, Loader.load_weights)
            with self.assertRaises(AttributeError), session(on_cpu=True).hooks():
                self.fail("not entered")
            self.assertIs(loader.load_weights, Loader.load_weights)

    def test_a_loader_of_another_make_loads(self):
        config = mock.Mock(model="/m")
        new = session(on_cpu=True)
        self.assertEqual(new.trace(Loader.load_weights, Loader(), torch.nn.Linear(1, 1), config), "loaded")
        self.assertEqual(new.loads, [])


if __name__ == "__main__":
    unittest.main()

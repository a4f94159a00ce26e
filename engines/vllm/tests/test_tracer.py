"""What the tracer says of loaders that do more than copy. Needs torch and safetensors (skipped without); vLLM's own loaders are checked by
tests/python/vllm_families.py."""

import os
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    import safetensors.torch
    import torch
except ImportError:
    raise unittest.SkipTest("needs torch and safetensors") from None

from weightfs_vllm.boxes import boxes
from weightfs_vllm.export.memory import HostArena, arena_of
from weightfs_vllm.tracer import DerivedTracer, LoadTracer


def traced(sources, load):
    """Runs `load(name, tensor)` over fresh tensors under a tracer."""
    tracer = LoadTracer()
    with tracer, torch.no_grad():
        for name, tensor in tracer.watch(sources):
            load(name, tensor)
            del tensor
    return tracer


def into(tracer, parameter):
    return tracer.copies.get(parameter.untyped_storage()) or []


class Tracing(unittest.TestCase):
    def setUp(self):
        self.parameter = torch.zeros(8, 6)

    def test_a_cast_transposed_and_narrowed_copy_is_followed(self):
        source = torch.arange(48.0).view(6, 8)
        tracer = traced([("w", source)], lambda _, t: self.parameter[2:5].copy_(t.double().t().contiguous()[1:4]))
        [copy] = into(tracer, self.parameter)
        [box] = boxes((6, 8), copy.source_offset, copy.dims, copy.destination_offset)
        live = torch.as_strided(self.parameter, box.shape, box.strides, box.offset)
        self.assertTrue(torch.equal(live, source[box.at[0] : box.at[0] + box.shape[0], box.at[1] : box.at[1] + box.shape[1]]))
        self.assertEqual((box.at, box.shape), ((0, 1), (6, 3)))
        self.assertEqual(tracer.unmapped, {})

    def test_what_is_no_copy_is_reported(self):
        def load(name, t):
            if name == "sum":
                self.parameter.copy_(t + 1)
            elif name == "cat":
                self.parameter.copy_(torch.cat([t[4:], t[:4]]))
            elif name == "spread":
                self.parameter.copy_(t[0].expand(8, 6))
            elif name == "changed":
                self.parameter.copy_(t.mul_(2))

        tracer = traced([(n, torch.rand(8, 6)) for n in ("sum", "cat", "spread", "changed")], load)
        self.assertEqual(set(tracer.unmapped), {"sum", "cat", "spread", "changed"})
        self.assertEqual(into(tracer, self.parameter), [])

    def test_a_bias_that_other_ranks_add_is_told_from_a_changed_one(self):
        tracer = traced([("bias", torch.rand(6))], lambda _, t: self.parameter[0].copy_(t.zero_()))
        self.assertEqual((tracer.zeroed, tracer.unmapped, into(tracer, self.parameter)), ({"bias"}, {}, []))

    def test_memory_that_is_used_again_is_not_taken_for_what_it_held(self):
        parameter = torch.zeros(128, 128)
        for _ in range(50):
            gone = torch.rand(128, 128)
            address = gone.data_ptr()
            tracer = LoadTracer()
            with tracer:
                tracer.know("gone", gone)
                del gone
                again = torch.rand(128, 128)
                parameter.copy_(again)
            self.assertEqual(into(tracer, parameter), [])
            if again.data_ptr() == address:
                return
        self.fail("the allocator never used the memory again: this test shows nothing")

    def test_no_source_is_kept_alive(self):
        alive = []

        def sources():
            for i in range(20):
                tensor = torch.rand(64)
                alive.append(torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()))
                yield f"w{i}", tensor
                del tensor
                self.assertLessEqual(sum(not a.expired() for a in alive), 2)

        traced(sources(), lambda _, t: self.parameter[0].copy_(t[:6]))

    def test_a_parameter_that_became_the_source_itself_is_adopted(self):
        parameter = torch.nn.Parameter(torch.zeros(4, 3), False)
        tracer = traced([("w", torch.rand(4, 3))], lambda _, t: setattr(parameter, "data", t))
        tracer.adopt([parameter])
        [copy] = into(tracer, parameter)
        self.assertEqual(boxes((4, 3), copy.source_offset, copy.dims, copy.destination_offset)[0].shape, (4, 3))

    def test_copies_that_outlive_post_processing_are_found_and_passing_ones_are_not(self):
        tracer = traced([("w", torch.rand(8, 6))], lambda _, t: self.parameter.copy_(t))
        with DerivedTracer(tracer.weights()) as derived:
            passing = self.parameter.float() * 2
            kept = (self.parameter.t().contiguous() + 0.0)[:2]
            form = torch.empty_like(self.parameter)
            view = self.parameter[2:]
            del passing
        self.assertEqual([names for _, names, _ in derived.survivors()], [{"w"}])
        del kept, form, view
        self.assertEqual(derived.survivors(), [])


class Arenas(unittest.TestCase):
    def held(self, arena):
        return os.stat(arena.path).st_blocks * 512

    def test_moved_tensors_keep_values_and_what_they_share(self):
        whole = torch.rand(100, 50)
        tensors = [torch.nn.Parameter(t, False) for t in (whole[:10], whole[10:].t(), torch.rand(3))]
        before = [t.clone() for t in tensors]
        arena = HostArena()
        arena.move(tensors)
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(tensors, before)))
        self.assertEqual(tensors[0].untyped_storage().data_ptr(), tensors[1].untyped_storage().data_ptr())
        offset = arena.locate(tensors[1].data_ptr(), 1)
        with open(arena.path, "rb") as f:
            f.seek(offset)
            self.assertEqual(f.read(4), tensors[1][0, 0].numpy().tobytes())
        self.assertIs(arena_of(tensors[2].data_ptr(), 12), arena)
        addresses = [t.data_ptr() for t in tensors]
        HostArena().move(tensors)
        self.assertEqual([t.data_ptr() for t in tensors], addresses, "what is shared already stays where it is")

    def test_memory_that_was_never_used_is_not_copied_and_freed_memory_goes_back(self):
        untouched = torch.empty(64 << 20, dtype=torch.uint8)
        untouched[5 << 20 : 6 << 20] = 7
        arena = HostArena()
        arena.move([untouched])
        # The allocator's own notes are on the first page.
        self.assertLess(self.held(arena), 2 << 20)
        self.assertEqual((untouched.sum().item(), untouched[5 << 20].item()), (7 << 20, 7))
        untouched.fill_(1)
        self.assertEqual(self.held(arena), 64 << 20)
        address = untouched.data_ptr()
        del untouched
        self.assertEqual(self.held(arena), 0)
        self.assertIsNone(arena.locate(address, 1))

    def test_pages_of_a_file_that_nobody_has_read_yet_are_copied(self):
        with tempfile.TemporaryDirectory() as scratch:
            path = os.path.join(scratch, "model.safetensors")
            want = torch.arange(1 << 20, dtype=torch.int32)
            safetensors.torch.save_file({"small": want[:3].clone(), "w": want}, path)
            plain = os.path.join(scratch, "plain")
            with open(plain, "wb") as f:
                f.write(want.numpy().tobytes())
            loaded = {
                "safetensors": safetensors.torch.load_file(path)["w"],
                "private": torch.from_file(plain, shared=False, size=want.numel(), dtype=want.dtype),
                "shared": torch.from_file(plain, shared=True, size=want.numel(), dtype=want.dtype),
            }
            HostArena().move(loaded.values())
        for name, tensor in loaded.items():
            with self.subTest(name):
                self.assertTrue(torch.equal(tensor, want))

    def test_shared_memory_that_another_process_filled_is_copied(self):
        tensor = torch.ones(1 << 20, dtype=torch.int32).share_memory_()
        context = torch.multiprocessing.get_context("spawn")
        counted = context.SimpleQueue()
        process = context.Process(target=move_and_count, args=(tensor, counted))
        process.start()
        process.join()
        self.assertEqual(process.exitcode, 0)
        self.assertEqual(counted.get(), 1 << 20)


def move_and_count(tensor, counted):
    HostArena().move([tensor])
    counted.put(tensor.sum().item())


if __name__ == "__main__":
    unittest.main()

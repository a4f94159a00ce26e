"""Boxes of copies against numpy, which is asked where each element went. No torch."""

import random
import sys
import unittest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from weightfs_vllm.boxes import Box, Unmappable, boxes, compose, join, overlap, overlaps_itself, row_major, volume


def strides_of(view):
    return [s // view.itemsize for s in view.strides]


def offset_of(view, base):
    return (view.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // base.itemsize


def random_view(draw, array):
    """What loaders do: parts, permutations, splits and joins of dimensions, experts taken out."""
    for _ in range(draw.randrange(4)):
        kind = draw.randrange(4)
        if kind == 0 and array.ndim:
            d = draw.randrange(array.ndim)
            start = draw.randrange(array.shape[d])
            stop = draw.randrange(start + 1, array.shape[d] + 1)
            array = array[(slice(None),) * d + (slice(start, stop),)]
        elif kind == 1:
            array = array.transpose(draw.sample(range(array.ndim), array.ndim))
        elif kind == 2 and array.ndim:
            d = draw.randrange(array.ndim)
            factors = [f for f in range(2, array.shape[d]) if array.shape[d] % f == 0]
            if factors:
                f = draw.choice(factors)
                step = array.strides[d]
                shape = array.shape[:d] + (array.shape[d] // f, f) + array.shape[d + 1 :]
                strides = array.strides[:d] + (step * f, step) + array.strides[d + 1 :]
                array = np.lib.stride_tricks.as_strided(array, shape, strides)
        elif kind == 3 and array.ndim > 1 and array.flags.c_contiguous:
            array = array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
    return array


def held(tensor_shape, found):
    """Element of the tensor (row-major number) -> where the boxes say it is."""
    places = {}
    for box in found:
        for index in np.ndindex(*box.shape):
            element = sum((a + i) * s for a, i, s in zip(box.at, index, row_major(tensor_shape)))
            assert element not in places, "two boxes hold one element"
            places[element] = box.offset + sum(i * s for i, s in zip(index, box.strides))
    return places


class Boxes(unittest.TestCase):
    def test_copies_of_random_views_are_described_exactly(self):
        draw = random.Random(0)
        described = 0
        for case in range(1000):
            shape = tuple(draw.choice([1, 2, 3, 4, 6, 8]) for _ in range(draw.randrange(1, 4)))
            source = np.arange(volume(shape)).reshape(shape)
            view = random_view(draw, source)
            # A merged parameter: the copy lands in a part of it, sometimes transposed.
            big = np.full((volume(view.shape) + 7) * 3, -1)
            start = draw.randrange(5)
            target = big[start : start + view.size].reshape(view.shape)
            if draw.randrange(2) and view.ndim > 1:
                order = draw.sample(range(view.ndim), view.ndim)
                packed = big[start : start + view.size].reshape([view.shape[d] for d in order])
                target = packed.transpose([order.index(d) for d in range(view.ndim)])
            target[...] = view
            dims = list(zip(view.shape, strides_of(view), strides_of(target)))
            try:
                found = boxes(shape, offset_of(view, source), dims, offset_of(target, big))
            except Unmappable:
                continue
            described += 1
            want = {int(v): i for i, v in enumerate(big) if v >= 0}
            with self.subTest(case=case, shape=shape):
                self.assertEqual(held(shape, found), want)
                self.assertEqual(held(shape, join(found)), want)
        # Some reshapes of parts run over ends of dimensions; most views must be fine.
        self.assertGreater(described, 900)

    def test_views_of_a_transposed_copy_lead_back_to_the_tensor(self):
        source = np.arange(4 * 6 * 5).reshape(4, 6, 5)
        expert = source[2].T  # as gpt-oss's experts: one taken out, transposed, made contiguous
        copy = np.ascontiguousarray(expert)
        part = copy[1:4, 2:6]
        root = (offset_of(expert, source), strides_of(expert))
        dims = list(zip(part.shape, strides_of(part), (100, 1)))
        offset, dims = compose(*root, copy.shape, tuple(strides_of(copy)), offset_of(part, copy), dims)
        found = boxes(source.shape, offset, dims, 7)
        want = {int(part[i, j]): 7 + 100 * i + j for i, j in np.ndindex(*part.shape)}
        self.assertEqual(held(source.shape, found), want)

    def test_experts_copied_one_by_one_become_one_box(self):
        single = [Box((e, 0, 0), (1, 4, 8), 10 + e * 64, (32, 8, 1)) for e in range(16)]
        self.assertEqual(join(single), [Box((0, 0, 0), (16, 4, 8), 10, (64, 8, 1))])

    def test_boxes_in_different_memories_or_with_other_steps_stay_apart(self):
        rows = [Box((0, 0), (2, 4), 0, (4, 1), "a"), Box((2, 0), (2, 4), 8, (4, 1), "b"), Box((4, 0), (2, 4), 99, (4, 1), "b")]
        self.assertEqual(join(rows), rows)

    def test_one_value_in_many_places_is_refused(self):
        with self.assertRaises(Unmappable):
            boxes((4,), 0, [(8, 0, 1)], 0)

    def test_overlaps_are_found(self):
        a, b, c = Box((0, 0), (2, 2), 0, (2, 1)), Box((1, 1), (2, 2), 9, (2, 1)), Box((0, 2), (1, 1), 50, (1, 1))
        self.assertEqual(overlap([a, c, b]), (a, b))
        self.assertIsNone(overlap([a, c]))
        self.assertTrue(overlaps_itself(Box((0, 0), (2, 3), 0, (2, 1))))
        self.assertFalse(overlaps_itself(Box((0, 0), (3, 2), 0, (1, 3))))


if __name__ == "__main__":
    unittest.main()

"""From copies that were seen to boxes of a manifest. Plain integers: no torch here.

A copy is known as `dims`: one (count, source stride, destination stride) for each dimension it ran over, in elements, with
the first element's place in source and destination. A manifest wants boxes of the checkpoint's tensor: where the box starts,
its shape, and strides in memory. The two differ where the loader took views: heads of a row range, an expert, a transpose.
"""

from dataclasses import dataclass, field, replace

# A copy that falls into more pieces than this is not worth describing; real loaders make one or a few.
MAX_PIECES = 4096


class Unmappable(Exception):
    """This copy is not made of boxes; the message says what it did."""


@dataclass(frozen=True)
class Box:
    at: tuple
    shape: tuple
    offset: int
    strides: tuple
    # What tells memories apart: only boxes of one place are joined.
    place: object = field(default=None, compare=True)


def row_major(shape):
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def locate(shape, strides, offset, dims):
    """Writes a view of a dense tensor (`shape`, `strides` in any order) in the tensor's own coordinates.

    `offset` is the view's first element from the tensor's first; `dims` are (count, stride in the tensor, anything).
    Returns where it starts, a tuple with one index for each dimension, and its factors: (dimension, step, count, anything),
    each of which walks along one dimension. `anything` is a stride that is carried along."""
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -strides[d])
    at, rest = [0] * len(shape), offset
    for d in order:
        at[d], rest = divmod(rest, strides[d])
    if rest or any(a >= n for a, n in zip(at, shape) if n > 1):
        raise Unmappable("reads outside the tensor")
    factors = []
    pending = [d for d in dims if d[0] > 1]
    while pending:
        count, stride, other = pending.pop()
        if stride <= 0:
            raise Unmappable("copies one value to several places")
        place = next((i for i, d in enumerate(order) if strides[d] <= stride), None)
        if place is None or stride % strides[order[place]]:
            raise Unmappable(f"walks the tensor by {stride} elements")
        d = order[place]
        step = stride // strides[d]
        inner = -(-shape[d] // step)
        if count <= inner:
            factors.append((d, step, count, other))
        elif shape[d] % step == 0 and count % inner == 0:
            # Runs over the end of this dimension into the one outside it: two walks.
            pending.append((inner, stride, other))
            pending.append((count // inner, stride * inner, other * inner))
        else:
            raise Unmappable("runs over the end of a dimension")
    reach = list(at)
    for d, step, count, _ in factors:
        reach[d] += step * (count - 1)
    if any(r >= n for r, n in zip(reach, shape)):
        raise Unmappable("runs over the end of a dimension")
    return tuple(at), factors


def boxes(shape, source_offset, dims, destination_offset, place=None):
    """The boxes of a row-major tensor of `shape` that a copy from it filled."""
    at, factors = locate(shape, row_major(shape), source_offset, dims)
    by_dimension = [[] for _ in shape]
    for d, step, count, stride in factors:
        by_dimension[d].append((step, count, stride))
    extents, strides, loops = [1] * len(shape), [None] * len(shape), []
    for d, walks in enumerate(by_dimension):
        joined = []
        for step, count, stride in sorted(walks, reverse=True):
            if joined and joined[-1][0] == step * count and joined[-1][2] == stride * count:
                joined[-1] = (step, joined[-1][1] * count, stride)
            else:
                joined.append((step, count, stride))
        if joined and joined[-1][0] == 1:
            _, extents[d], strides[d] = joined.pop()
        loops += [(d, *walk) for walk in joined]
    pieces = [(at, destination_offset)]
    for d, step, count, stride in loops:
        if len(pieces) * count > MAX_PIECES:
            raise Unmappable(f"scatters the tensor into more than {MAX_PIECES} pieces")
        pieces = [
            (start[:d] + (start[d] + i * step,) + start[d + 1 :], offset + i * stride)
            for start, offset in pieces
            for i in range(count)
        ]
    shape_of_box = tuple(extents)
    natural = row_major(shape_of_box)
    strides = tuple(natural[d] if s is None else s for d, s in enumerate(strides))
    return [Box(start, shape_of_box, offset, strides, place) for start, offset in pieces]


def compose(root_offset, root_strides, copied_shape, copied_strides, view_offset, dims):
    """A view of a copy, as a view of what was copied. The copy is dense, `copied_shape` by `copied_strides`; its element
    [i, j, …] came from `root_offset` + i·`root_strides`[0] + …. Returns the view's offset and dims in the root."""
    at, factors = locate(copied_shape, copied_strides, view_offset, dims)
    offset = root_offset + sum(i * s for i, s in zip(at, root_strides))
    return offset, [(count, step * root_strides[d], other) for d, step, count, other in factors]


def join(pieces):
    """Joins boxes that continue each other in the tensor and in memory alike (experts copied one by one, heads)."""
    pieces = list(dict.fromkeys(pieces))
    if not pieces:
        return pieces
    for d in reversed(range(len(pieces[0].at))):
        pieces = _join_along(d, pieces)
    return sorted(pieces, key=lambda b: (b.at, b.shape))


def _join_along(d, pieces):
    def others(t):
        return t[:d] + t[d + 1 :]

    groups = {}
    for box in pieces:
        # A dimension of one element has no stride of its own.
        strides = tuple(0 if n == 1 else s for n, s in zip(box.shape, box.strides))
        groups.setdefault((box.place, others(box.at), others(box.shape), others(strides)), []).append(box)
    out = []
    for group in groups.values():
        group.sort(key=lambda b: b.at[d])
        run = group[0]
        for box in group[1:]:
            joined = _joined(d, run, box)
            if joined:
                run = joined
            else:
                out.append(run)
                run = box
        out.append(run)
    return out


def _joined(d, a, b):
    if b.at[d] != a.at[d] + a.shape[d]:
        return None
    gap = b.offset - a.offset
    if gap <= 0 or gap % a.shape[d]:
        return None
    stride = gap // a.shape[d]
    if (a.shape[d] > 1 and a.strides[d] != stride) or (b.shape[d] > 1 and b.strides[d] != stride):
        return None
    shape = a.shape[:d] + (a.shape[d] + b.shape[d],) + a.shape[d + 1 :]
    joined = replace(a, shape=shape, strides=a.strides[:d] + (stride,) + a.strides[d + 1 :])
    return None if overlaps_itself(joined) else joined


def overlaps_itself(box):
    """Could two elements of the box be in one place? As weightfs checks it: each stride steps over all inside it."""
    extent = 0
    for stride, size in sorted((s, n) for n, s in zip(box.shape, box.strides) if n > 1):
        if stride <= extent:
            return True
        extent += stride * (size - 1)
    return False


def volume(shape):
    n = 1
    for size in shape:
        n *= size
    return n


def overlap(pieces):
    """Two boxes that hold the same element of the tensor, or None."""
    pieces = sorted(pieces, key=lambda b: b.at)
    for i, a in enumerate(pieces):
        for b in pieces[i + 1 :]:
            if a.at and b.at[0] >= a.at[0] + a.shape[0]:
                break
            if all(x < y + m and y < x + n for x, n, y, m in zip(a.at, a.shape, b.at, b.shape)):
                return a, b
    return None

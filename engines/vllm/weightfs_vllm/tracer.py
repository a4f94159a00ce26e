"""Watches vLLM load: which part of which checkpoint tensor is copied where.

Every loader of vLLM ends in `parameter.copy_(part of a checkpoint tensor)`, whatever it does in between: narrow to a rank's
share, merge q, k and v, transpose experts, cast. A TorchDispatchMode sees these copies as strided views, so no table of
model families is needed. What the loader does that is not a strided copy is reported, not guessed.

Storages are told apart by their C++ address, which a weak reference keeps from being reused; no tensor is kept alive.
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .boxes import Unmappable, compose

aten = torch.ops.aten
# Whole-tensor copies: each element of the result is one of the argument, at the same index.
CLONES = {aten.clone.default, aten._to_copy.default}
# These take a tensor for its form only.
FORMS = {aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like, aten.new_empty,
         aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided}  # fmt: skip


class Source:
    """A checkpoint tensor, or a copy of a view of one, while it is in a storage."""

    def __init__(self, name, start, shape, strides, root_offset, root_strides, dtype, cast):
        self.name = name
        # Its first element in the storage, its shape and strides there.
        self.start, self.shape, self.strides = start, shape, strides
        # Its first element in the checkpoint tensor, its strides there.
        self.root_offset, self.root_strides = root_offset, root_strides
        self.dtype = dtype
        # Dtypes it was cast through on the way here.
        self.cast = cast

    @property
    def end(self):
        return self.start + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides))


class Copy:
    """A copy into a storage: the destination's elements are counted from the storage's first."""

    __slots__ = ("name", "source_offset", "dims", "destination_offset", "dtype")

    def __init__(self, name, source_offset, dims, destination_offset, dtype):
        self.name, self.source_offset, self.dims = name, source_offset, dims
        self.destination_offset, self.dtype = destination_offset, dtype


class Storages:
    """Facts about storages that end with them: a dead storage's address may be another's tomorrow, so each is held by a
    weak reference, which keeps the address from being reused."""

    def __init__(self):
        self.entries = {}

    def get(self, storage):
        entry = self.entries.get(storage._cdata)
        return None if entry is None else entry[1]

    def setdefault(self, storage, make):
        entry = self.entries.get(storage._cdata)
        if entry is None:
            entry = self.entries[storage._cdata] = (StorageWeakRef(storage), make())
        return entry[1]

    def alive(self):
        return [(key, value) for key, (reference, value) in self.entries.items() if not reference.expired()]

    def forget_dead(self):
        self.entries = {k: e for k, e in self.entries.items() if not e[0].expired()}


class LoadTracer(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = {}  # name -> (dtype, shape)
        self.sources = Storages()  # -> [Source]
        self.copies = Storages()  # -> [Copy], of the destination
        self.unmapped = {}  # name -> what was done to it
        self.zeroed = set()  # names that the loader emptied: another rank's (a bias that is added once)
        self.errors = []
        self._dead = 0

    def watch(self, weights):
        """Passes (name, tensor) pairs on to the model, and knows them from then on."""
        for name, tensor in weights:
            try:
                self.know(name, tensor)
            except Exception as e:  # noqa: BLE001: nothing here may stop the engine
                self.errors.append(f"{name}: {e!r}")
            yield name, tensor

    def know(self, name, tensor):
        self.names[name] = (tensor.dtype, tuple(tensor.shape))
        if tensor.numel() == 0 or not tensor.is_contiguous():
            return
        # Storages of tensors that are gone by now: their entries are dropped now and then, not at each tensor.
        self._dead += 1
        if self._dead >= 256:
            self._dead = 0
            self.sources.forget_dead()
        strides = tuple(tensor.stride())
        known = self.sources.setdefault(tensor.untyped_storage(), list)
        known.append(Source(name, tensor.storage_offset(), tuple(tensor.shape), strides, 0, strides, tensor.dtype, ()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        try:
            self.see(func, args, out)
        except Exception as e:  # noqa: BLE001: nothing here may stop the engine
            self.errors.append(f"{func}: {e!r}")
        return out

    def see(self, func, args, out):
        if func is aten.copy_.default:
            self.see_copy(args[0], args[1])
        elif func is aten._foreach_copy_.default:
            for destination, source in zip(args[0], args[1]):
                self.see_copy(destination, source)
        elif func in CLONES and isinstance(out, torch.Tensor):
            self.see_clone(out, args[0])
        elif isinstance(out, torch.Tensor) and out.numel() > 0 and func.overloadpacket not in FORMS:
            self.see_other(func, args, out)

    def see_copy(self, destination, source):
        if not isinstance(source, torch.Tensor):
            return
        # A tracked tensor that the loader writes to is no longer what the file holds.
        self.forget(destination)
        found = self.find(source)
        if found is None:
            return
        storage = destination.untyped_storage()
        expanded = source.expand(destination.shape) if source.shape != destination.shape else source
        dims = [(n, h, p) for n, h, p in zip(destination.shape, expanded.stride(), destination.stride())]
        try:
            offset, dims = self.in_root(found, source, dims)
        except Unmappable as e:
            self.unmapped[found.name] = str(e)
            return
        copies = self.copies.setdefault(storage, list)
        copies.append(Copy(found.name, offset, dims, destination.storage_offset(), destination.dtype))

    def see_clone(self, out, source):
        found = self.find(source)
        if found is None or out.untyped_storage()._cdata == source.untyped_storage()._cdata:
            return
        shape = tuple(out.shape)
        try:
            # Each dimension on its own, so that views of the clone can be followed.
            strides = []
            for n, h in zip(source.shape, source.stride()):
                _, dims = self.in_root(found, source, [(n, h, 1)])
                if len(dims) > 1:
                    raise Unmappable("copies a flattened view")
                strides.append(dims[0][1] if dims else 0)
            offset, _ = self.in_root(found, source, [])
        except Unmappable as e:
            self.unmapped[found.name] = str(e)
            return
        known = self.sources.setdefault(out.untyped_storage(), list)
        cast = found.cast + ((out.dtype,) if out.dtype != found.dtype else ())
        known.append(
            Source(found.name, out.storage_offset(), shape, tuple(out.stride()), offset, tuple(strides), out.dtype, cast)
        )

    def see_other(self, func, args, out):
        """Anything else that makes a new tensor out of a tracked one, or changes one in place."""
        storage = out.untyped_storage()._cdata
        for argument in args:
            for tensor in argument if isinstance(argument, (list, tuple)) else [argument]:
                if not isinstance(tensor, torch.Tensor):
                    continue
                same = tensor.untyped_storage()._cdata == storage
                if same and func._schema.is_mutable:
                    self.forget(tensor, zeroed=func is aten.zero_.default)
                elif not same:
                    found = self.find(tensor)
                    # Reading a value (a scalar, a maximum) is no rearrangement; the copies that follow tell.
                    if found is not None and out.numel() >= tensor.numel():
                        self.unmapped.setdefault(found.name, f"goes through {func}")

    def find(self, tensor):
        """The source that holds all of this view, the newest first."""
        known = self.sources.get(tensor.untyped_storage())
        if not known or tensor.numel() == 0:
            return None
        first = tensor.storage_offset()
        last = first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
        for source in reversed(known):
            # Offsets are in elements of the view's own dtype.
            if source.dtype == tensor.dtype and source.start <= first and last < source.end:
                return source
        return None

    def forget(self, tensor, zeroed=False):
        """The loader writes to `tensor`: what it held of a source is no longer there."""
        known = self.sources.get(tensor.untyped_storage())
        if not known:
            return
        size = tensor.element_size()
        first = tensor.storage_offset() * size
        last = first + (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))) * size
        for source in list(known):
            if source.start * source.dtype.itemsize < last and first < source.end * source.dtype.itemsize:
                known.remove(source)
                if zeroed:
                    self.zeroed.add(source.name)
                else:
                    self.unmapped.setdefault(source.name, "is changed in place while loading")

    def adopt(self, tensors):
        """Parameters that the loader replaced by a source itself, instead of copying into them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            for source in self.sources.get(storage) or []:
                dims = list(zip(source.shape, source.root_strides, source.strides))
                copies = self.copies.setdefault(storage, list)
                copies.append(Copy(source.name, source.root_offset, dims, source.start, source.dtype))

    def weights(self):
        """For each storage that was copied to: the names of what it holds."""
        names = Storages()
        for key, (reference, copies) in self.copies.entries.items():
            names.entries[key] = (reference, {copy.name for copy in copies})
        return names

    @staticmethod
    def in_root(source, view, dims):
        return compose(
            source.root_offset,
            source.root_strides,
            source.shape,
            source.strides,
            view.storage_offset() - source.start,
            dims,
        )


class DerivedTracer(TorchDispatchMode):
    """Watches post-processing: which storages are computed from weights and outlive it. Such a copy (a packed matrix, an
    absorbed projection) does not change when the weight does, so the weight must not be trained behind the engine's back."""

    def __init__(self, weights):
        """`weights`: Storages, with the names of the checkpoint's tensors in each."""
        super().__init__()
        self.weights = weights
        self.derived = Storages()  # -> (names, operation)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        try:
            self.see(func, args, kwargs or {}, out)
        except Exception:  # noqa: BLE001: nothing here may stop the engine; what is missed here, the proof may still find
            pass
        return out

    def see(self, func, args, kwargs, out):
        if func.overloadpacket in FORMS:
            return
        names = set()
        for argument in (*args, *kwargs.values()):
            for tensor in argument if isinstance(argument, (list, tuple)) else [argument]:
                if isinstance(tensor, torch.Tensor):
                    names |= self.names_of(tensor.untyped_storage())
        if not names:
            return
        outputs = out if isinstance(out, (list, tuple)) else [out]
        for target in (t for t in outputs if isinstance(t, torch.Tensor)):
            storage = target.untyped_storage()
            if self.weights.get(storage) is None and storage.nbytes() > 0:
                known = self.derived.setdefault(storage, lambda: (set(), str(func)))
                known[0].update(names)

    def names_of(self, storage):
        known = self.weights.get(storage)
        if known is not None:
            return known
        derived = self.derived.get(storage)
        return derived[0] if derived else set()

    def survivors(self):
        """(storage address, names, operation) of each copy that is still alive."""
        return [(key, names, operation) for key, (names, operation) in self.derived.alive()]

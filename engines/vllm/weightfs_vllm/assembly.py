"""From what was traced and what is alive after loading to the tensors of a manifest."""

from dataclasses import dataclass, field

from .boxes import Box, Unmappable, boxes, join, overlap, volume
from .export.memory import Unexportable
from .export.publication import CASTABLE, DTYPES
from .proof import ZEROS, Claim, live_view, prove
from .refusals import opaque_reason

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Home:
    """Where a parameter lay when loading ended: found again by name if its storage was replaced."""

    parameter: str
    shape: tuple
    strides: tuple
    offset: int
    dtype: object


def all_tensors(model):
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def homes(model):
    """Storage address -> the parameters in it."""
    found = {}
    for name, tensor in all_tensors(model):
        home = Home(name, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset(), tensor.dtype)
        found.setdefault(tensor.untyped_storage()._cdata, []).append(home)
    return found


@dataclass
class Load:
    """One model that was loaded from the checkpoint: the main one, or a draft model."""

    model: object
    tracer: object
    # As loading ended; the storages in it are kept apart by the tracer's weak references.
    homes: dict
    # Watches post-processing; then the names of what it copied, with the operation that did it.
    derived_tracer: object = None
    derived: list = field(default_factory=list)


@dataclass
class Assembled:
    tensors: dict = field(default_factory=dict)
    opaque: dict = field(default_factory=dict)
    memories: list = field(default_factory=list)


def assemble(loads, checkpoint, memories, device, world_size):
    """Proves and describes all that the loads put in memory. `checkpoint`: name -> DiskTensor."""
    out = Assembled()
    on_cpu = device.type == "cpu"
    pieces, storages = {}, {}
    for load in loads:
        for name, found, reason in live_boxes(load, checkpoint, storages, on_cpu):
            if reason:
                out.opaque.setdefault(name, reason)
            else:
                pieces.setdefault(name, []).extend(found)
    for load in loads:
        for name, what in load.tracer.unmapped.items():
            if name in checkpoint and name not in pieces:
                out.opaque.setdefault(name, f"while loading, vLLM {what}, which is no plain copy")
        parameters = {t.untyped_storage()._cdata: name for name, t in all_tensors(load.model)}
        for key, names, operation in load.derived:
            # A parameter that took the place of the one that was loaded, or a copy beside it.
            why = opaque_reason(parameters[key], on_cpu) if key in parameters else (
                f"vLLM computes with a copy that it made of it after loading (by {operation})"
            )
            out.opaque.update((name, why) for name in names if name in pieces)
    claims = []
    for name in list(pieces):
        joined = join(pieces[name])
        reason = out.opaque.get(name) or unfit(joined, checkpoint[name], world_size)
        if reason:
            out.opaque[name] = reason
            continue
        pieces[name] = joined
        for box in joined:
            key, dtype = box.place
            claims.append(Claim(name, checkpoint[name], TORCH_DTYPES[checkpoint[name].dtype], box, storages[key], dtype))
    parameters = parameters_of(loads)
    for name, how in prove(claims, device).items():
        if how == ZEROS and world_size > 1:
            # Held by one rank only, and zero on this one so that adding the ranks up counts it once.
            del pieces[name]
        else:
            out.opaque[name] = opaque_reason(parameters.get(name, name), on_cpu)
    for name, joined in pieces.items():
        if name in out.opaque:
            continue
        try:
            segments = [segment(box, storages[box.place[0]], memories) for box in joined]
        except Unexportable as e:
            out.opaque[name] = str(e)
            continue
        disk = checkpoint[name]
        out.tensors[name] = {"dtype": disk.dtype, "shape": list(disk.shape), "segments": segments}
    out.memories = memories.entries
    return out


def live_boxes(load, checkpoint, storages, on_cpu):
    """(name, boxes, None), or (name, None, why not), for each copy that was seen. Fills `storages` with the live ones."""
    alive, by_name = {}, {}
    for name, tensor in all_tensors(load.model):
        storage = tensor.untyped_storage()
        alive[storage._cdata] = storage
        by_name[name] = tensor
    for key, (reference, copies) in load.tracer.copies.entries.items():
        shift, reason = 0, None
        storage = None if reference.expired() else alive.get(key)
        if storage is None:
            # Its parameter may have been replaced by one of the same form: the proof will tell whether by the same values.
            moved = next((m for h in load.homes.get(key, []) if (m := same_form(h, by_name))), None)
            if moved is None:
                names = [h.parameter for h in load.homes.get(key, [])]
                if not names:
                    continue  # a tensor in passing, not the model's
                reason = opaque_reason(names[0], on_cpu)
            else:
                home, tensor = moved
                storage = tensor.untyped_storage()
                shift = tensor.storage_offset() - home.offset
        for copy in copies:
            if copy.name not in checkpoint:
                continue
            if reason:
                yield copy.name, None, reason
                continue
            storages[storage._cdata] = storage
            place = (storage._cdata, copy.dtype)
            try:
                found = boxes(
                    checkpoint[copy.name].shape, copy.source_offset, copy.dims, copy.destination_offset + shift, place
                )
            except Unmappable as e:
                yield copy.name, None, f"while loading, vLLM {e}, which is no plain copy"
            else:
                yield copy.name, found, None


def same_form(home, by_name):
    tensor = by_name.get(home.parameter)
    if tensor is None or tensor.dtype != home.dtype:
        return None
    if tuple(tensor.shape) != home.shape or tuple(tensor.stride()) != home.strides:
        return None
    return home, tensor


def unfit(joined, disk, world_size):
    if disk.dtype not in TORCH_DTYPES:
        return f"its dtype {disk.dtype} is not one that can be shared"
    for box in joined:
        live = DTYPES.get(box.place[1])
        if live != disk.dtype and not {live, disk.dtype} <= CASTABLE:
            return f"it is {live or box.place[1]} in memory and {disk.dtype} on disk"
    if overlap(joined):
        return "vLLM holds it twice, and only one of them would be changed"
    held = sum(volume(box.shape) for box in joined)
    if world_size == 1 and held != volume(disk.shape):
        return f"vLLM holds {held} of its {volume(disk.shape)} elements"
    return None


def segment(box: Box, storage, memories):
    key, dtype = box.place
    memory, offset = memories.locate(live_view(storage, dtype, box.offset, box.shape, box.strides))
    return {
        "memory": memory,
        "offset": offset,
        "at": list(box.at),
        "shape": list(box.shape),
        "strides": list(box.strides),
        "dtype": DTYPES[dtype],
    }


def parameters_of(loads):
    """Checkpoint tensor -> the vLLM parameter that it was copied into."""
    found = {}
    for load in loads:
        for key, (_, copies) in load.tracer.copies.entries.items():
            parameter = next((h.parameter for h in load.homes.get(key, [])), None)
            if parameter:
                for copy in copies:
                    found[copy.name] = parameter
    return found

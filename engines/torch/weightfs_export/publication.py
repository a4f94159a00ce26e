"""publish(model, model_dir): from a torch module to a manifest."""

import contextlib
import fcntl
import os

import torch

from . import manifest
from .checkpoint import read_checkpoint
from .memory import HostArena, Memories, Unexportable

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
CASTABLE = {"F16", "BF16", "F32", "F64"}


class Publication:
    """A manifest in place. `path` is what `weightfs mount --weights` takes. Ends with the process, or by `close()`."""

    def __init__(self, path, tensors, opaque, absent):
        self.path = path
        # Names of the checkpoint's tensors that are live.
        self.tensors = tensors
        # Name -> why it cannot be shared; weightfs shows these from disk and never writes them.
        self.opaque = opaque
        # Names of the checkpoint's tensors that the model does not have.
        self.absent = absent
        self._lock = open(path)  # noqa: SIM115: held for as long as the publication lives
        self._remove = manifest.remove_at_exit(path)

    @contextlib.contextmanager
    def step(self):
        """Around every change this process makes to the weights itself: weightfs then never reads half of it, and waits
        for its end. On CUDA the device is synchronised before the weights are given free."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self):
        """Removes the manifest. The weights stay where they are; what weightfs has mapped stays mapped."""
        self._remove()
        self._lock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def publish(model, model_dir, path=None, names=None, rank=0, world_size=1, instance=None):
    """Shares the parameters and persistent buffers of `model` as the live form of the checkpoint in `model_dir`.

    Tensors go by the names of the checkpoint; `names` maps the model's own names to them (a dict or a function) where
    they differ. `path` is the manifest to write (default: a file of this process in `manifest_directory()`). CPU tensors
    move into shared memory: take other views of them (optimizers, flattened buffers) afterwards. With a `world_size`, `instance` is
    a name that the ranks of this engine have in common and no other engine has (default: the job's under torchrun, else the parent
    process), by which `--weights torch` finds them all.

    Raises ValueError when the model has nothing of the checkpoint, Unexportable when none of it can be shared, OSError
    when the manifest cannot be written. One tensor that cannot be shared is no error: see `Publication.opaque`.
    """
    checkpoint = read_checkpoint(model_dir)
    rename = names if callable(names) else (names or {}).get
    found = {}
    for own, tensor in _tensors(model):
        name = rename(own) or own
        if name in checkpoint:
            found[name] = tensor
    if not found:
        example = next((own for own, _ in _tensors(model)), "none")
        raise ValueError(
            f"the model has no tensor of the checkpoint in {model_dir} (its first is {example!r}, the checkpoint's is "
            f"{next(iter(checkpoint), 'none')!r}): pass names= to map one to the other"
        )
    opaque = {name: why for name, t in found.items() if (why := _unfit(t, checkpoint[name]))}
    on_host = [t for name, t in found.items() if name not in opaque and t.device.type == "cpu"]
    arena = HostArena() if on_host else None
    if arena:
        arena.move(on_host)
    memories, tensors = Memories(), {}
    for name, tensor in found.items():
        if name in opaque:
            continue
        try:
            tensors[name] = describe(tensor, checkpoint[name], memories)
        except Unexportable as e:
            opaque[name] = str(e)
    if not tensors:
        raise Unexportable(f"no tensor of the model can be shared: {next(iter(opaque.values()))}")
    if path is None:
        directory = manifest.manifest_directory()
        manifest.sweep(directory)
        path = os.path.join(directory, f"torch-{os.getpid()}-rank{rank}.json")
    path = os.path.abspath(path)
    instance = instance or manifest.default_instance(world_size)
    more = {"instance": instance} if instance else {}
    manifest.write(
        path,
        {
            "weightfs": 1,
            "engine": manifest.engine("torch", torch.__version__, rank, world_size, **more),
            "model": os.path.abspath(model_dir),
            "memories": memories.entries,
            "tensors": tensors,
            "opaque": opaque,
        },
    )
    publication = Publication(path, sorted(tensors), opaque, sorted(set(checkpoint) - set(found)))
    publication._arena = arena  # its file is what the manifest names
    return publication


def _tensors(model):
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _unfit(tensor, disk):
    """Why this tensor cannot be the live form of `disk`, or None."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"it is a {type(tensor).__name__}, whose memory is not one plain array"
    if tensor.is_meta:
        return "it is on the meta device: it has no memory yet"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}, not strided"
    if tuple(tensor.shape) != disk.shape:
        return f"its shape is {list(tensor.shape)} in the model and {list(disk.shape)} on disk"
    dtype = DTYPES.get(tensor.dtype)
    if dtype != disk.dtype and not {dtype, disk.dtype} <= CASTABLE:
        return f"its dtype is {tensor.dtype} in the model and {disk.dtype} on disk"
    if tensor.numel() == 0:
        return "it has no elements"
    if _overlaps(tensor):
        return f"several of its elements share one place (shape {list(tensor.shape)}, strides {list(tensor.stride())})"
    return None


def _overlaps(tensor):
    """Could two elements be one? Conservative: true unless each stride steps over all that is inside it."""
    extent = 0
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride()) if n > 1):
        if stride <= extent:
            return True
        extent += stride * (size - 1)
    return False


def describe(tensor, disk, memories):
    """The manifest's entry of a whole tensor."""
    memory, offset = memories.locate(tensor)
    # A dimension of one element may carry any stride; the row-major one says the least.
    strides, row_major = list(tensor.stride()), 1
    for d in reversed(range(tensor.dim())):
        if tensor.shape[d] == 1:
            strides[d] = row_major
        row_major *= tensor.shape[d]
    segment = {
        "memory": memory,
        "offset": offset,
        "at": [0] * tensor.dim(),
        "shape": list(tensor.shape),
        "strides": strides,
        "dtype": DTYPES[tensor.dtype],
    }
    return {"dtype": disk.dtype, "shape": list(disk.shape), "segments": [segment]}

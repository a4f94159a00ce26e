"""Memory that another process can map: a memfd for tensors of the CPU, IPC handles for tensors on CUDA devices."""

import bisect
import ctypes
import mmap
import os
import re
import threading
import weakref

import torch

from . import driver

PAGE = mmap.PAGESIZE
# linux/falloc.h
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.restype = _libc.munmap.restype = _libc.fallocate.restype = ctypes.c_int
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Unexportable(Exception):
    """This memory cannot be shared; the message says why and what to do."""


class HostArena:
    """A memfd in which storages are placed one after the other. Nothing is left behind when the process ends, however it
    ends, and /dev/shm's size does not limit it. Each storage is a mapping of its own: when torch lets go of it, its pages
    are given back."""

    def __init__(self, name="weightfs"):
        self.pid = os.getpid()
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd).atexit = False
        self.bytes = 0
        self._growing = threading.Lock()
        # Address -> (length, offset in the file). Finalizers may change it at any moment, so it is only read whole.
        self._mappings = {}
        self._sorted = None
        _arenas.add(self)

    @property
    def path(self):
        return f"/proc/{self.pid}/fd/{self.fd}"

    def storage(self, nbytes):
        """New zeroed memory of `nbytes` (at least one) in the arena."""
        length = -(-nbytes // PAGE) * PAGE
        with self._growing:
            os.ftruncate(self.fd, self.bytes + length)
            offset, self.bytes = self.bytes, self.bytes + length
        address = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, self.fd, offset)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mapping shared memory for weights failed")
        # Large pages where the system lets shared memory have them; else this changes nothing.
        _libc.madvise(address, length, getattr(mmap, "MADV_HUGEPAGE", 14))
        self._mappings[address] = (length, offset)
        self._sorted = None
        # A class of its own: plain ctypes arrays cannot be watched by a finalizer.
        mapping = type("Mapping", (ctypes.c_ubyte * length,), {}).from_address(address)
        weakref.finalize(mapping, self._release, address).atexit = False
        return torch.frombuffer(mapping, dtype=torch.uint8).untyped_storage()

    def _release(self, address):
        length, offset = self._mappings.pop(address)
        self._sorted = None
        _libc.munmap(address, length)
        if os.getpid() == self.pid:
            _libc.fallocate(self.fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, length)

    def locate(self, address, nbytes):
        """Offset in the file of `nbytes` at `address`, or None if they are not of this arena."""
        known = self._sorted
        if known is None:
            known = self._sorted = sorted((a, *rest) for a, rest in list(self._mappings.items()))
        at = bisect.bisect_right(known, (address, float("inf"))) - 1
        if at < 0:
            return None
        start, length, offset = known[at]
        return offset + address - start if address + nbytes <= start + length else None

    def move(self, tensors):
        """Moves the storages of `tensors` (on the CPU) into the arena; each tensor's `.data` then lies there, tensors that
        shared memory share it still. Peak: the largest storage once more."""
        groups = {}
        for tensor in tensors:
            groups.setdefault(tensor.untyped_storage()._cdata, {})[id(tensor)] = tensor
        # Read once: all of the old storages are here, and none of them changes what it is made of.
        anonymous = private_anonymous()
        for group in groups.values():
            group = list(group.values())
            old = group[0].untyped_storage()
            if old.nbytes() == 0 or any(a.locate(old.data_ptr(), old.nbytes()) is not None for a in list(_arenas)):
                continue
            new = self.storage(old.nbytes())
            for start, end in touched(old.data_ptr(), old.nbytes(), anonymous):
                _bytes(new)[start:end].copy_(_bytes(old)[start:end])
            for tensor in group:
                moved = torch.empty(0, dtype=tensor.dtype)
                moved.set_(new, tensor.storage_offset(), tensor.shape, tensor.stride())
                tensor.data = moved
            del old


def _bytes(storage):
    return torch.empty(0, dtype=torch.uint8).set_(storage)


_arenas = weakref.WeakSet()


def arena_of(address, nbytes):
    return next((a for a in list(_arenas) if a.locate(address, nbytes) is not None), None)


def private_anonymous():
    """(start, end) of each piece of memory that is this process's alone and has no file behind it, in order.
    /proc/PID/maps, a line each: start-end, permissions (the last is `p` for private), offset, device, inode, path."""
    pieces = []
    try:
        with open("/proc/self/maps", "rb") as f:
            for line in f:
                addresses, permissions, _, device, inode = line.split(maxsplit=5)[:5]
                if not permissions.endswith(b"p") or (device, inode) != (b"00:00", b"0"):
                    continue
                start, end = (int(address, 16) for address in addresses.split(b"-"))
                if pieces and pieces[-1][1] == start:
                    start = pieces.pop()[0]
                pieces.append((start, end))
    except OSError:
        return []
    return pieces


def touched(address, nbytes, anonymous):
    """Byte ranges to copy: all, but for pages of `anonymous` memory that have never been used, which are zeros. A page of a file
    or of shared memory has its bytes whether this process has looked at it or not.
    /proc/PID/pagemap: 8 bytes a page, bit 63 present, bit 62 swapped."""
    at = bisect.bisect_right(anonymous, (address, float("inf"))) - 1
    if at < 0 or address + nbytes > anonymous[at][1]:
        return [(0, nbytes)]
    first, last = address // PAGE, (address + nbytes - 1) // PAGE
    used = bytearray()
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as f:
            f.seek(first * 8)
            while len(used) <= last - first:
                entries = f.read(min((last - first + 1 - len(used)) * 8, 1 << 20))
                if not entries:
                    return [(0, nbytes)]
                # The two bits are in the top byte of each little-endian entry.
                used += entries[7::8].translate(_USED)
    except OSError:
        return [(0, nbytes)]
    runs = [((first + run.start()) * PAGE - address, (first + run.end()) * PAGE - address) for run in re.finditer(b"\1+", used)]
    return [(max(0, start), min(nbytes, end)) for start, end in runs]


_USED = bytes(1 if b & 0xC0 else 0 for b in range(256))


class Memories:
    """The `memories` of one manifest, filled as tensors are located."""

    def __init__(self):
        self.entries = []
        self._arenas = {}  # id -> (arena, index)
        self._allocations = []  # (base, size, index)
        self._reasons = {}

    def locate(self, tensor):
        """(index of the memory, byte offset) of the tensor's first element. Raises Unexportable."""
        address, span = tensor.data_ptr(), span_bytes(tensor)
        if tensor.device.type == "cpu":
            return self._locate_on_host(address, span)
        if tensor.device.type == "cuda" and torch.version.cuda:
            return self._locate_on_cuda(address, span)
        raise Unexportable(f"its memory is on {tensor.device}, and only CPU and CUDA memory can be shared")

    def _locate_on_host(self, address, span):
        arena = arena_of(address, span)
        if arena is None:
            raise Unexportable("its memory is private to the process: it was replaced after it had been shared")
        if id(arena) not in self._arenas:
            self._arenas[id(arena)] = (arena, len(self.entries))
            self.entries.append({"kind": "file", "path": arena.path, "bytes": arena.bytes})
        index = self._arenas[id(arena)][1]
        self.entries[index]["bytes"] = arena.bytes
        return index, arena.locate(address, span)

    def _locate_on_cuda(self, address, span):
        for base, size, index in self._allocations:
            if base <= address and address + span <= base + size:
                return index, address - base
        try:
            base, size = driver.address_range(address)
            if base in self._reasons:
                raise Unexportable(self._reasons[base])
            if address + span > base + size:
                # Several physical pieces behind one range of addresses.
                raise Unexportable(NOT_CAPABLE)
            if not driver.can_be_shared(base):
                raise Unexportable(NOT_CAPABLE)
            handle, uuid = driver.ipc_handle(base), driver.device_uuid(driver.device_of(base))
        except Unexportable as e:
            self._reasons[base] = str(e)
            raise
        except driver.DriverError as e:
            raise Unexportable(f"the driver will not share its memory ({e}); {REMEDY}") from e
        index = len(self.entries)
        self.entries.append({"kind": "cuda-ipc", "device": uuid, "handle": handle.hex(), "bytes": size})
        self._allocations.append((base, size, index))
        return index, address - base


REMEDY = (
    "unset expandable_segments and backend:cudaMallocAsync in PYTORCH_CUDA_ALLOC_CONF (PYTORCH_ALLOC_CONF), "
    "and switch off sleep mode and MIG"
)
NOT_CAPABLE = f"its CUDA memory was not allocated by cudaMalloc, which alone can be shared by IPC handle; {REMEDY}"


def span_bytes(tensor):
    """From the first element's first byte to the last one's end."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()

"""Proves that live memory is what the map says: every segment against the checkpoint's bytes on disk, bit for bit.

The files are read again (from the page cache, since they were just loaded), not the tensors that were loaded from: a loader
may have changed those. On CUDA the bytes go to the device through pinned buffers and are compared there.
"""

import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

# Large enough for full speed of disk and bus, small beside a model.
CHUNK_BYTES = 16 << 20
THREADS = 8

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DIFFERS, ZEROS = "differs", "zeros"

memcmp = ctypes.CDLL(None).memcmp
memcmp.argtypes, memcmp.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int


def live_view(storage, dtype, offset, shape, strides):
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, shape, strides)


class Claim:
    """That `storage` holds the box `at`, `shape` of the checkpoint tensor `name` (`disk`, of `disk_dtype`)."""

    def __init__(self, name, disk, disk_dtype, box, storage, dtype):
        self.name, self.disk, self.disk_dtype = name, disk, disk_dtype
        self.box, self.storage, self.dtype = box, storage, dtype

    def chunks(self):
        """(first row, rows) of the tensor's first dimension, of some megabytes each."""
        shape, box = self.disk.shape, self.box
        if not shape:
            return [(0, 1)]
        row = max(1, self.disk.nbytes // shape[0])
        step = max(1, CHUNK_BYTES // row)
        end = box.at[0] + box.shape[0]
        return [(first, min(step, end - first)) for first in range(box.at[0], end, step)]

    def holds(self, first, rows, reader):
        disk, box = self.disk, self.box
        row = disk.nbytes // disk.shape[0] if disk.shape else disk.nbytes
        bytes_ = reader.read(disk.file, disk.start + first * row, rows * row)
        want = bytes_.view(self.disk_dtype).view((rows, *disk.shape[1:]) if disk.shape else ())
        if disk.shape:
            for d, (at, n) in enumerate(zip(box.at[1:], box.shape[1:]), start=1):
                want = want.narrow(d, at, n)
        live_shape = (rows, *box.shape[1:]) if disk.shape else ()
        offset = box.offset + ((first - box.at[0]) * box.strides[0] if disk.shape else 0)
        live = live_view(self.storage, self.dtype, offset, live_shape, box.strides)
        bits = BITS[self.dtype.itemsize]
        # As whole numbers: not-a-number equals itself then, and zeros have signs.
        want = want.to(self.dtype).view(bits) if want.dtype != self.dtype else want.view(bits)
        live = live.view(bits)
        if live.device.type == "cpu" and live.is_contiguous() and want.is_contiguous():
            # torch.equal looks at one element at a time here.
            return memcmp(want.data_ptr(), live.data_ptr(), want.nbytes) == 0
        return torch.equal(want, live)

    def is_zero(self):
        live = live_view(self.storage, self.dtype, self.box.offset, self.box.shape, self.box.strides)
        return not live.any().item()


class Reader:
    """Bytes of files as tensors on one device, through a buffer of the calling thread's own."""

    def __init__(self, device):
        self.device = device
        self.local = threading.local()
        self.files = {}
        self.lock = threading.Lock()

    def read(self, path, offset, nbytes):
        with self.lock:
            if path not in self.files:
                self.files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fd = self.files[path]
        buffer = getattr(self.local, "buffer", None)
        if buffer is None or buffer.nbytes < nbytes:
            pin = self.device.type == "cuda"
            buffer = self.local.buffer = torch.empty(max(nbytes, CHUNK_BYTES), dtype=torch.uint8, pin_memory=pin)
            self.local.view = memoryview(buffer.numpy())
        done = 0
        while done < nbytes:
            count = os.preadv(fd, [self.local.view[done:nbytes]], offset + done)
            if count == 0:
                raise OSError(f"{path} ended at byte {offset + done}")
            done += count
        return buffer[:nbytes].to(self.device, non_blocking=True)

    def close(self):
        for fd in self.files.values():
            os.close(fd)


def prove(claims, device):
    """Name -> DIFFERS or ZEROS for every tensor that has a segment which does not hold its bytes. Raises OSError when
    the files cannot be read."""
    failures, lock = {}, threading.Lock()
    reader = Reader(device)

    def task(claim, first, rows):
        # Each thread has a stream of its own, on the engine's device.
        if device.type == "cuda":
            stream = getattr(reader.local, "stream", None)
            if stream is None:
                torch.cuda.set_device(device)
                stream = reader.local.stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream), torch.no_grad():
                holds = claim.holds(first, rows, reader)
        else:
            with torch.no_grad():
                holds = claim.holds(first, rows, reader)
        if not holds:
            with lock:
                failures.setdefault(claim.name, []).append(claim)

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    threads = min(THREADS, os.cpu_count() or 1)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="weightfs-proof") as pool:
            # Small tensors go together: a task costs more than comparing a norm.
            for done in [pool.submit(run, task, batch) for batch in batches(claims)]:
                done.result()
    finally:
        reader.close()
        del reader
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {name: ZEROS if all(c.is_zero() for c in failed) else DIFFERS for name, failed in failures.items()}


def run(task, batch):
    for claim, first, rows in batch:
        task(claim, first, rows)


def batches(claims):
    batch, size = [], 0
    for claim in claims:
        for first, rows in claim.chunks():
            batch.append((claim, first, rows))
            size += rows * (claim.disk.nbytes // max(1, claim.disk.shape[0] if claim.disk.shape else 1))
            if size >= CHUNK_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch

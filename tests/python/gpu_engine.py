"""An engine that holds a checkpoint in GPU memory and publishes it by the driver's own calls. Needs torch and a GPU.

    python gpu_engine.py MODEL_DIR MANIFEST [--layout plain|merged|handles] [--rank R --ranks N] [--device D] [--random]

`handles` merges as vLLM does, and writes torch's own handles with torch.save instead of a manifest.

Then commands on stdin, one a line, each answered with a line of JSON: `bump FRACTION SEED` changes one element in that
fraction of the blocks (1 changes every element), `digest` hashes the checkpoint as `.cpu()` gives it, `stop` ends it.
"""
import argparse
import ctypes
import glob
import hashlib
import json
import os
import struct
import sys

import numpy
import torch

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MERGED = [("qkv_proj", ["q_proj", "k_proj", "v_proj"]), ("gate_up_proj", ["gate_proj", "up_proj"])]

driver = ctypes.CDLL("libcuda.so.1")


def cu(name, *arguments):
    code = getattr(driver, name)(*arguments)
    if code:
        raise SystemExit(f"{name}: CUDA error {code}")


def headers(model):
    """Tensors of all shards in order: name, dtype, shape, shard, start, end."""
    found = []
    for path in sorted(glob.glob(os.path.join(model, "*.safetensors"))):
        with open(path, "rb") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            header = json.loads(f.read(size))
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda e: e[1]["data_offsets"])
        for name, e in entries:
            a, b = e["data_offsets"]
            found.append((name, e["dtype"], e["shape"], path, 8 + size + a, 8 + size + b))
    return found


class Memories:
    """Allocations that hold storages, each named once."""

    def __init__(self, device):
        self.entries, self.by_base = [], {}
        self.uuid = str(torch.cuda.get_device_properties(device).uuid)
        self.uuid = self.uuid if self.uuid.startswith("GPU-") else "GPU-" + self.uuid

    def place(self, tensor):
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        pointer = tensor.data_ptr()
        cu("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(pointer))
        if base.value not in self.by_base:
            handle = (ctypes.c_ubyte * 64)()
            cu("cuIpcGetMemHandle", handle, ctypes.c_uint64(base.value))
            self.by_base[base.value] = len(self.entries)
            self.entries.append(
                {"kind": "cuda-ipc", "device": self.uuid, "handle": bytes(handle).hex(), "bytes": size.value}
            )
        return self.by_base[base.value], pointer - base.value


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("manifest")
    p.add_argument("--layout", default="plain")
    p.add_argument("--rank", type=int, default=0)
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--device", type=int, default=0)
    p.add_argument("--random", action="store_true")
    a = p.parse_args()
    torch.cuda.set_device(a.device)
    torch.zeros(1, device="cuda")
    generator = torch.Generator(device="cuda").manual_seed(7)
    memories = Memories(a.device)
    live, tensors, blocks = [], {}, []

    def load(dtype, shape, path, start, end):
        if a.random:
            t = torch.empty(shape, dtype=TORCH[dtype], device="cuda")
            t.view(torch.int16).random_(generator=generator)
            return t
        return torch.from_numpy(numpy.fromfile(path, numpy.uint8, end - start, offset=start)).view(TORCH[dtype]).reshape(shape)

    entries = headers(a.model)
    by_name = {e[0]: e for e in entries}
    merged, whole_of = {}, {}
    if a.layout in ("merged", "handles"):
        for name in by_name:
            for whole, parts in MERGED:
                if f".{parts[0]}.weight" in name:
                    names = [name.replace(parts[0], part) for part in parts]
                    rows = sum(by_name[n][2][0] for n in names)
                    buffer = torch.empty(rows, by_name[name][2][1], dtype=TORCH[by_name[name][1]], device="cuda")
                    at = 0
                    whole_of[name.replace(parts[0], whole)] = buffer
                    for n in names:
                        merged[n] = buffer[at : at + by_name[n][2][0]]
                        at += by_name[n][2][0]

    for name, dtype, shape, path, start, end in entries:
        source = load(dtype, shape, path, start, end)
        at, part = [0] * len(shape), source
        if a.ranks > 1 and len(shape) == 2:
            dim = 1 if "o_proj" in name or "down_proj" in name else 0
            share = shape[dim] // a.ranks
            at[dim] = share * a.rank
            part = source.narrow(dim, at[dim], share)
        if name in merged:
            held = merged[name]
            held.copy_(part)
        elif a.layout == "merged" and name.endswith("A_log"):
            held = part.to("cuda", torch.float32)
        elif a.layout == "merged" and "out_proj" in name:
            held = part.cuda().t().contiguous().t()
        elif a.layout == "merged" and "embed" in name:
            # Rows of a wider matrix.
            held = torch.empty(part.shape[0], part.shape[1] + 64, dtype=part.dtype, device="cuda")[:, : part.shape[1]]
            held.copy_(part)
        else:
            held = part.contiguous().cuda() if not a.random or a.ranks > 1 else source
        memory, offset = memories.place(held)
        live_dtype = {v: k for k, v in TORCH.items()}[held.dtype]
        segment = {
            "memory": memory,
            "offset": offset,
            "at": at,
            "shape": list(part.shape),
            "strides": list(held.stride()),
            "dtype": live_dtype,
        }
        tensors[name] = {"dtype": dtype, "shape": shape, "segments": [segment]}
        live.append((name, TORCH[dtype], held))
        del source, part
    torch.cuda.synchronize()
    if a.layout == "handles":
        from torch.multiprocessing.reductions import reduce_tensor

        parameters = {n: t for n, _, t in live if n not in merged} | whole_of
        os.umask(0o077)
        torch.save({n: reduce_tensor(t) for n, t in parameters.items()}, a.manifest)
        print(json.dumps({"pid": os.getpid(), "memories": len(parameters)}), flush=True)
        return serve(a, live, generator)
    with open("/proc/self/stat") as f:
        start_time = int(f.read().rsplit(")", 1)[1].split()[19])
    engine = {"name": "gpu_engine", "version": "1", "pid": os.getpid(), "start_time": start_time}
    engine |= {"rank": a.rank, "world_size": a.ranks}
    text = json.dumps(
        {"weightfs": 1, "engine": engine, "model": a.model, "memories": memories.entries, "tensors": tensors}
    )
    with open(os.open(a.manifest + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
        f.write(text)
    os.rename(a.manifest + ".new", a.manifest)
    print(json.dumps({"pid": os.getpid(), "memories": len(memories.entries)}), flush=True)

    serve(a, live, generator)


def serve(a, live, generator):
    for line in sys.stdin:
        words = line.split()
        if words[0] == "bump":
            fraction, seed = float(words[1]), int(words[2])
            generator.manual_seed(seed)
            for name, _, t in live:
                # Replicas are changed alike on every rank; everything else is a rank's own.
                if not t.is_contiguous() or t.dtype == torch.float32:
                    if fraction >= 1:
                        t.mul_(-1)
                    continue
                words16 = t.view(-1).view(torch.int16)
                if fraction >= 1:
                    words16.bitwise_xor_(1)
                elif fraction > 0:
                    n = max(1, int(words16.numel() / 2048 * fraction))
                    at = torch.randint(0, words16.numel(), (n,), device="cuda", generator=generator)
                    words16[at] = words16[at] ^ 1
            torch.cuda.synchronize()
            print(json.dumps({"done": True}), flush=True)
        elif words[0] == "digest":
            digest = hashlib.sha256()
            for _, dtype, t in live:
                bytes_of = t.cpu().to(dtype).contiguous().view(-1).view(torch.uint8).numpy()
                digest.update(bytes_of)
            print(json.dumps({"digest": digest.hexdigest()}), flush=True)
        elif words[0] == "stop":
            os.unlink(a.manifest)
            print(json.dumps({"done": True}), flush=True)
            return


if __name__ == "__main__":
    main()

"""Plays an inference engine: holds a model's weights in shared memory, laid out as vLLM lays them out, and says where in
manifests. Independent of weightfs's own code: the checks beside it compare against the copies this one keeps.

usage: engine.py MODEL_DIR MANIFEST_DIR [--ranks N]
Then, on stdin: `change SEED FRACTION` (alters that part of all live elements), `expect DIR` (writes the shards as they
should look now), `stop`. Answers each with a line of JSON. Needs numpy.

Layouts: q, k, v and gate, up merged by rows; Qwen3.5's in_proj_qkv with in_proj_z and in_proj_b with in_proj_a; A_log in F32;
gpt-oss's experts transposed one by one; vocabulary rows padded to 64; visual.* and mtp.* not held; lm_head tied to the
embedding where the files have none. With N ranks: rows or columns split as tensor parallelism does, norms replicated.
"""
import argparse
import fcntl
import json
import mmap
import os
import re
import struct
import sys

import numpy as np

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
MERGED = [
    (r"(.*)\.(q_proj|k_proj|v_proj)\.(weight|bias)", ["q_proj", "k_proj", "v_proj"], "qkv_proj"),
    (r"(.*)\.(gate_proj|up_proj)\.(weight|bias)", ["gate_proj", "up_proj"], "gate_up_proj"),
    (r"(.*)\.(in_proj_qkv|in_proj_z)\.(weight)", ["in_proj_qkv", "in_proj_z"], "in_proj_qkvz"),
    (r"(.*)\.(in_proj_b|in_proj_a)\.(weight)", ["in_proj_b", "in_proj_a"], "in_proj_ba"),
]
BY_COLUMNS = re.compile(r"\.(o_proj|down_proj|out_proj)\.weight$")
BY_ROWS = re.compile(r"(\.(q|k|v|gate|up)_proj\.(weight|bias)|in_proj_\w+\.weight|embed_tokens\.weight|lm_head\.weight|conv1d\.weight)$")
ABSENT = re.compile(r"(^|\.)(visual|mtp)\.")
TRANSPOSED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


def read_header(path):
    with open(path, "rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


class Tensor:
    """One tensor of the checkpoint: where its bytes are on disk, and its pieces in memory."""

    def __init__(self, name, shard, dtype, shape, start, end):
        self.name, self.shard, self.dtype, self.shape, self.start, self.end = name, shard, dtype, shape, start, end
        self.segments = []  # (rank, offset, at, shape, strides, dtype)


class Engine:
    def __init__(self, model_dir, manifest_dir, ranks):
        self.model_dir, self.ranks, self.tensors = model_dir, ranks, {}
        for shard in sorted(f for f in os.listdir(model_dir) if f.endswith(".safetensors")):
            data, header = read_header(os.path.join(model_dir, shard))
            for name, info in header.items():
                start, end = (data + o for o in info["data_offsets"])
                self.tensors[name] = Tensor(name, shard, info["dtype"], info["shape"], start, end)
        self.sizes = [0] * ranks
        self.plan()
        self.files, self.maps = [], []
        for rank, size in enumerate(self.sizes):
            path = f"/dev/shm/weightfs-engine-{os.getpid()}-{rank}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.ftruncate(fd, max(size, 4096))
            self.files.append(path)
            self.maps.append(mmap.mmap(fd, max(size, 4096)))
            os.close(fd)
        for tensor in self.tensors.values():
            if tensor.segments:
                self.store(tensor, self.on_disk(tensor))
        self.manifests = [self.publish(manifest_dir, rank) for rank in range(ranks)]

    # -- layout --

    def allocate(self, rank, elements, dtype):
        offset = (self.sizes[rank] + 255) // 256 * 256 + (64 if rank else 0)
        self.sizes[rank] = offset + elements * SIZES[dtype]
        return offset

    def plan(self):
        done = set()
        for name, tensor in self.tensors.items():
            if name in done or ABSENT.search(name):
                continue
            group = [name]
            for pattern, parts, _ in MERGED:
                match = re.fullmatch(pattern, name)
                if match:
                    group = [f"{match[1]}.{p}.{match[3]}" for p in parts]
                    group = [g for g in group if g in self.tensors and self.tensors[g].dtype == tensor.dtype]
            done.update(group)
            for rank in range(self.ranks):
                self.place([self.tensors[g] for g in group], rank)

    def place(self, group, rank):
        first = group[0]
        dtype = "F32" if first.name.endswith("A_log") else first.dtype
        if TRANSPOSED.search(first.name) and len(first.shape) == 3:
            experts, rows, columns = first.shape
            mine = range(rank * experts // self.ranks, (rank + 1) * experts // self.ranks)
            base = self.allocate(rank, len(mine) * rows * columns, dtype)
            at, strides = [mine.start, 0, 0], [rows * columns, 1, rows]
            first.segments.append((rank, base, at, [len(mine), rows, columns], strides, dtype))
            return
        pieces = []
        for tensor in group:
            at, shape = [0] * len(tensor.shape), list(tensor.shape)
            dim = 1 if BY_COLUMNS.search(tensor.name) else 0 if BY_ROWS.search(tensor.name) else None
            if self.ranks > 1 and dim is not None and len(shape) > dim and shape[dim] % self.ranks == 0:
                shape[dim] //= self.ranks
                at[dim] = rank * shape[dim]
            pieces.append((tensor, at, shape))
        elements = sum(int(np.prod(shape, dtype=np.int64)) for _, _, shape in pieces)
        if re.search(r"(embed_tokens|lm_head)\.weight$", first.name):
            elements += (-first.shape[0] % 64) * first.shape[1]  # the padding rows that no tensor has
        offset = self.allocate(rank, elements, dtype)
        for tensor, at, shape in pieces:
            strides = [int(np.prod(shape[d + 1:], dtype=np.int64)) for d in range(len(shape))]
            tensor.segments.append((rank, offset, at, shape, strides, dtype))
            offset += int(np.prod(shape, dtype=np.int64)) * SIZES[dtype]

    # -- values: raw little-endian unsigned integers of the element's size --

    def on_disk(self, tensor):
        with open(os.path.join(self.model_dir, tensor.shard), "rb") as f:
            f.seek(tensor.start)
            raw = f.read(tensor.end - tensor.start)
        return np.frombuffer(raw, f"<u{SIZES[tensor.dtype]}").reshape(tensor.shape)

    def piece(self, segment):
        rank, offset, _, shape, strides, dtype = segment
        size = SIZES[dtype]
        flat = np.frombuffer(self.maps[rank], np.uint8)[offset:]
        strided = np.lib.stride_tricks.as_strided
        first = flat[: len(flat) // size * size].view(f"<u{size}")
        return strided(first, shape, [s * size for s in strides], writeable=True)

    def box(self, segment):
        return tuple(slice(a, a + n) for a, n in zip(segment[2], segment[3]))

    def store(self, tensor, values):
        for segment in tensor.segments:
            part = values[self.box(segment)]
            if segment[5] == "F32" and tensor.dtype == "BF16":
                part = part.astype("<u4") << 16
            self.piece(segment)[...] = part

    def load(self, tensor):
        """The tensor as its file should hold it, from the first piece that has each element."""
        values = np.zeros(tensor.shape, f"<u{SIZES[tensor.dtype]}")
        for segment in reversed(tensor.segments):
            part = self.piece(segment)
            if segment[5] == "F32" and tensor.dtype == "BF16":
                # round to nearest even, as torch does; the values here are finite
                bits = part.astype(np.uint64)
                part = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
            values[self.box(segment)] = part
        return values

    # -- what the other side asks for --

    def publish(self, directory, rank):
        segments = lambda t: [
            {"memory": 0, "offset": o, "at": at, "shape": shape, "strides": strides, "dtype": dtype}
            for r, o, at, shape, strides, dtype in t.segments if r == rank
        ]
        start_time = int(open("/proc/self/stat").read().rpartition(")")[2].split()[19])
        manifest = {
            "weightfs": 1,
            "engine": {"name": "test-engine", "version": "1", "pid": os.getpid(), "start_time": start_time,
                       "rank": rank, "world_size": self.ranks},
            "model": os.path.abspath(self.model_dir),
            "memories": [{"kind": "file", "path": self.files[rank], "bytes": len(self.maps[rank])}],
            "tensors": {n: {"dtype": t.dtype, "shape": t.shape, "segments": segments(t)}
                        for n, t in self.tensors.items() if segments(t)},
        }
        path = os.path.join(directory, f"engine-{os.getpid()}-{rank}.json")
        fd = os.open(path + ".draft", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as f:
            json.dump(manifest, f)
        os.rename(path + ".draft", path)
        return path

    def change(self, seed, fraction):
        """One step: under the manifests' locks, alters about `fraction` of all elements. Returns how many."""
        random = np.random.default_rng(seed)
        locks = [open(m) for m in self.manifests]
        for lock in locks:
            fcntl.flock(lock, fcntl.LOCK_EX)
        changed = 0
        for tensor in self.tensors.values():
            if not tensor.segments:
                continue
            values = self.load(tensor).copy()
            flat = values.reshape(-1)
            count = max(1, int(len(flat) * fraction))
            where = random.choice(len(flat), count, replace=False) if fraction < 1 else np.arange(len(flat))
            flat[where] ^= 1  # the lowest bit: another finite value
            self.store(tensor, values)
            changed += count
        for lock in locks:
            lock.close()
        return changed

    def expect(self, directory):
        os.makedirs(directory, exist_ok=True)
        for shard in {t.shard for t in self.tensors.values()}:
            with open(os.path.join(self.model_dir, shard), "rb") as f:
                image = bytearray(f.read())
            for tensor in self.tensors.values():
                if tensor.shard == shard and tensor.segments:
                    image[tensor.start:tensor.end] = self.load(tensor).tobytes()
            with open(os.path.join(directory, shard), "wb") as f:
                f.write(image)

    def close(self):
        for path in self.files + self.manifests:
            os.unlink(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("manifest_dir")
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    engine = Engine(args.model_dir, args.manifest_dir, args.ranks)
    say = lambda **facts: print(json.dumps(facts), flush=True)
    live = sum(1 for t in engine.tensors.values() if t.segments)
    say(manifests=engine.manifests, live=live, tensors=len(engine.tensors))
    try:
        for line in sys.stdin:
            words = line.split()
            if words[0] == "change":
                say(changed=engine.change(int(words[1]), float(words[2])))
            elif words[0] == "expect":
                engine.expect(words[1])
                say(done=True)
            else:
                break
    finally:
        engine.close()
    say(stopped=True)


if __name__ == "__main__":
    main()

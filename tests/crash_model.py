"""What the crash tests share: a small model directory, an engine that is a file in /dev/shm, and the weightfs command.

Standard library only. WEIGHTFS in the environment names the binary (default: target/release/weightfs).
"""

import json
import os
import random
import struct
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WEIGHTFS = os.environ.get("WEIGHTFS", os.path.join(ROOT, "target", "release", "weightfs"))
SHARDS = {
    "model-00001-of-00002.safetensors": [("a", "BF16", 30000), ("b", "F32", 7), ("c", "BF16", 9001)],
    "model-00002-of-00002.safetensors": [("d", "BF16", 40000), ("e", "F64", 100)],
}
SIZES = {"BF16": 2, "F32": 4, "F64": 8}


def start_time():
    return int(open("/proc/self/stat").read().rsplit(") ", 1)[1].split(" ")[19])


class Engine:
    """Shares the tensors of a model directory that it makes; knows what the shards should hold."""

    def __init__(self, directory, shared, seed=1):
        self.random = random.Random(seed)
        self.directory, self.memory, self.manifest = directory, os.path.join(shared, "weights"), os.path.join(shared, "manifest.json")
        os.makedirs(directory, exist_ok=True)
        self.headers, self.data, tensors, at, weight_map = {}, {}, {}, 0, {}
        for shard, listed in SHARDS.items():
            header, end = {"__metadata__": {"format": "pt"}}, 0
            for name, dtype, elements in listed:
                size = elements * SIZES[dtype]
                header[name] = {"dtype": dtype, "shape": [elements], "data_offsets": [end, end + size]}
                segment = {"memory": 0, "offset": at + end, "at": [0], "shape": [elements], "strides": [1], "dtype": dtype}
                tensors[name] = {"dtype": dtype, "shape": [elements], "segments": [segment]}
                weight_map[name] = shard
                end += size
            text = json.dumps(header).encode()
            self.headers[shard] = struct.pack("<Q", len(text)) + text
            self.data[shard] = (at, end)
            at += -(-end // 8) * 8
        self.bytes = bytearray(self.random.randbytes(at))
        for shard, expected in self.expected().items():
            with open(os.path.join(directory, shard), "wb") as f:
                f.write(expected)
                os.fsync(f.fileno())
        with open(os.path.join(directory, "model.safetensors.index.json"), "w") as f:
            json.dump({"metadata": {}, "weight_map": weight_map}, f)
        self.publish()
        engine = {"name": "crash-test", "version": "1", "pid": os.getpid(), "start_time": start_time(), "rank": 0, "world_size": 1}
        memories = [{"kind": "file", "path": self.memory, "bytes": at}]
        manifest = {"weightfs": 1, "engine": engine, "model": directory, "memories": memories, "tensors": tensors, "opaque": {}}
        with open(self.manifest, "w") as f:
            json.dump(manifest, f)
        os.chmod(self.manifest, 0o600)

    def publish(self):
        with open(self.memory, "r+b" if os.path.exists(self.memory) else "wb") as f:
            f.write(self.bytes)

    def expected(self):
        return {s: self.headers[s] + bytes(self.bytes[a : a + n]) for s, (a, n) in self.data.items()}

    def change(self, count=200):
        for _ in range(count):
            self.bytes[self.random.randrange(len(self.bytes))] = self.random.randrange(256)
        self.publish()

    def commit(self, *options, prefix=(), check=True):
        return weightfs("commit", self.directory, "--weights", self.manifest, *options, prefix=prefix, check=check)


def weightfs(*words, prefix=(), check=True):
    result = subprocess.run([*prefix, WEIGHTFS, *words], capture_output=True, text=True)
    if check and result.returncode:
        raise SystemExit(f"weightfs {' '.join(words)}: {result.stderr}")
    return result


def shards(directory):
    return {s: open(os.path.join(directory, s), "rb").read() for s in SHARDS}


def history(directory):
    return json.loads(weightfs("log", "--json", directory).stdout)


def check(directory, allowed, what):
    """The directory is recovered to one of `allowed` (id -> shards); returns which."""
    weightfs("recover", directory)
    ids = [c["id"] for c in history(directory)]
    newest = max(ids, default=0)
    if newest not in allowed:
        raise SystemExit(f"{what}: recovered to commit {newest}, not one of {sorted(allowed)}")
    if shards(directory) != allowed[newest]:
        raise SystemExit(f"{what}: the shards are not those of commit {newest}")
    if ids and ids != list(range(ids[0], newest + 1)):
        raise SystemExit(f"{what}: the history is {ids}")
    for id in [None, *ids]:
        result = weightfs("verify", directory, *([str(id)] if id else []), check=False)
        if result.returncode:
            raise SystemExit(f"{what}: verify {id}: {result.stdout} {result.stderr}")
    return newest

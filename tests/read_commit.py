"""Rebuilds a commit of a model directory from docs/format.md alone; shares no code with weightfs.

usage: read_commit.py MODEL_DIR ID OUT_DIR      writes the shards as of commit ID; exits 1 with a sentence when anything does not fit
needs the packages numpy, safetensors, xxhash and zstandard; exits 77 when one is missing
"""

import json
import os
import sys

try:
    import numpy as np
    import xxhash
    import zstandard
    from safetensors import safe_open
    from safetensors.numpy import load as load_safetensors
except ImportError as e:
    print(f"{e.name} is not installed")
    sys.exit(77)

BLOCK = 4096


def hash_of(data):
    return xxhash.xxh3_128(data).hexdigest()


def expect(fits, what):
    if not fits:
        sys.exit(f"{what} does not fit")


def container(path, facts):
    """A safetensors file of byte blobs, checked against what the head of its record says: (header JSON, name -> bytes)."""
    data = open(path, "rb").read()
    start = 8 + int.from_bytes(data[:8], "little")
    expect(len(data) == facts["bytes"], f"the size of {path}")
    expect(hash_of(data[:start]) == facts["header"], f"the header of {path}")
    expect(hash_of(data[start:]) == facts["data"], f"the data of {path}")
    header = json.loads(data[8:start])
    # The library reads it, too: it is a valid safetensors file.
    return header, {name: array.tobytes() for name, array in load_safetensors(data).items()}


class Record:
    def __init__(self, log, number):
        self.path = os.path.join(log, f"weight_v{number:06d}")
        text = open(os.path.join(self.path, "model.safetensors.index.json"), "rb").read()
        key = b'"weightfs_checksum":"'
        at = text.index(key) + len(key)
        expect(hash_of(text[:at] + b"0" * 32 + text[at + 32 :]) == text[at : at + 32].decode(), f"the head of {self.path}")
        head = json.loads(text)
        metadata = head["metadata"]
        self.facts = metadata["weightfs"]
        expect(self.facts["format"] == 1 and self.facts["id"] == number, f"the id of {self.path}")
        expect(metadata["version"] == f"{number:06d}" and metadata["base_version"] == f"{number - 1:06d}", "the version")
        expect(metadata["delta_encoding"] == "xor" and metadata["compression_format"] == "zstd", "the encoding")
        self.tensors = head["weight_map"]
        file = self.facts["xor"]["file"]
        expect(all(f == file for f in self.tensors.values()), "the weight map")
        header, self.xor = container(os.path.join(self.path, file), self.facts["xor"])
        self.checksums = header["__metadata__"]
        _, self.values = container(os.path.join(self.path, self.facts["values"]["file"]), self.facts["values"])

    def changes(self, name, size):
        """Places, new and old values of the bytes of a tensor that the commit changed."""
        xor = np.frombuffer(zstandard.ZstdDecompressor().decompress(self.xor[name]), np.uint8)
        expect(len(xor) == size, f"the difference of {name}")
        places = np.flatnonzero(xor)
        reader = zstandard.ZstdDecompressor().stream_reader(self.values[name])
        values = np.frombuffer(reader.read(len(places) + 1), np.uint8)
        expect(len(values) == len(places), f"the values of {name}")
        return places, values, values ^ xor[places]


def main(model, commit, out):
    state_text = open(os.path.join(model, ".weightfs/state.json"), "rb").read().strip()
    outer = json.loads(state_text)
    start = state_text.index(b'"state":') + len(b'"state":')
    expect(hash_of(state_text[start:-1]) == outer["checksum"], "state.json")
    state = outer["state"]
    log = os.path.join(model, ".weightfs/log")
    ids = sorted(int(n.removeprefix("weight_v")) for n in os.listdir(log) if n.startswith("weight_v"))
    expect(commit <= ids[-1] and commit >= ids[0] - 1, f"commit {commit}")
    records = {i: Record(log, i) for i in ids if i > min(commit, state["folded"])}
    target = Record(log, commit) if commit else None

    os.makedirs(out, exist_ok=True)
    root = xxhash.xxh3_128()
    for shard in state["shards"]:
        path = os.path.join(model, shard["name"])
        data = bytearray(open(path, "rb").read())
        start = 8 + int.from_bytes(data[:8], "little")
        expect(hash_of(bytes(data[:start])) == shard["header"], f"the header of {path}")
        for name, entry in json.loads(data[8:start]).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            tensor = np.frombuffer(data, np.uint8, end - begin, start + begin)
            for i in range(state["folded"] + 1, commit + 1):
                if name in records[i].tensors:
                    places, new, _ = records[i].changes(name, len(tensor))
                    tensor[places] = new
            for i in range(ids[-1], commit, -1):
                if name in records[i].tensors:
                    places, _, old = records[i].changes(name, len(tensor))
                    tensor[places] = old
            if target and name in target.tensors:
                expect(hash_of(tensor.tobytes()) == target.checksums[name], f"tensor {name}")
        for at in range(0, len(data), BLOCK):
            digest = xxhash.xxh3_128_intdigest(bytes(data[at : at + BLOCK]))
            root.update(digest.to_bytes(16, "little"))
        place = os.path.join(out, shard["name"])
        with open(place, "wb") as f:
            f.write(data)
        with safe_open(place, "np") as f:
            f.keys()
    if target:
        expect(root.hexdigest() == target.facts["root"], "the root")
        optimizer = target.facts.get("optimizer")
        if optimizer:
            header, _ = container(os.path.join(model, ".weightfs/optimizer", optimizer["file"]), optimizer)
            json.loads(header["__metadata__"]["weightfs"])
    else:
        expect(root.hexdigest() == records[1].facts["base_root"], "the root")

    # The cache of block hashes, if it can be believed.
    blocks = open(os.path.join(model, ".weightfs/blocks"), "rb").read()
    expect(blocks[:8] == b"wfblocks" and int.from_bytes(blocks[8:12], "little") == 1, "the magic of blocks")
    expect(xxhash.xxh3_128_intdigest(blocks[:48]) == int.from_bytes(blocks[48:64], "little"), "the header of blocks")
    expect(xxhash.xxh3_128_intdigest(blocks[64:]) == int.from_bytes(blocks[24:40], "little"), "the root of blocks")
    expect(int.from_bytes(blocks[16:24], "little") == ids[-1], "the commit of blocks")
    print(f"commit {commit} rebuilt from the files at {state['folded']} and records {ids[0]} to {ids[-1]}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])

"""The checkpoint on disk: which tensors its safetensors files hold, and where. No torch here.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import os
import struct
from dataclasses import dataclass

# The format's own limit on headers.
MAX_HEADER_BYTES = 100_000_000

ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


class CheckpointError(Exception):
    """The directory is not a checkpoint that can be read."""


@dataclass(frozen=True)
class DiskTensor:
    file: str
    dtype: str
    shape: tuple
    # Of its first byte in the file.
    start: int
    nbytes: int


def read_checkpoint(model_dir):
    """Every tensor of `model_dir` by name. The files are those of the index where there is one, else all."""
    index = os.path.join(model_dir, "model.safetensors.index.json")
    try:
        with open(index) as f:
            files = sorted(set(json.load(f)["weight_map"].values()))
    except FileNotFoundError:
        try:
            files = sorted(f for f in os.listdir(model_dir) if f.endswith(".safetensors"))
        except OSError as e:
            raise CheckpointError(f"the model directory cannot be read: {e}") from e
        if "model.safetensors" in files:
            files = ["model.safetensors"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{index} cannot be used: {e}") from e
    if not files:
        raise CheckpointError(f"{model_dir} holds no safetensors files: weightfs serves no other format")
    tensors = {}
    for name in files:
        if os.path.basename(name) != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file of the directory")
        tensors.update(read_header(os.path.join(model_dir, name)))
    return tensors


def read_header(path):
    try:
        with open(path, "rb") as f:
            prefix = f.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is not a safetensors file")
            text = f.read(length)
            if len(text) < length:
                raise CheckpointError(f"{path} ends inside its header")
            header = json.loads(text)
            size = os.fstat(f.fileno()).st_size
        tensors = {}
        for name, info in header.items():
            if name == "__metadata__":
                continue
            start, end = info["data_offsets"]
            if not 0 <= start <= end <= size - 8 - length:
                raise CheckpointError(f"{path}: tensor {name!r} lies outside the file")
            tensors[name] = DiskTensor(path, info["dtype"], tuple(info["shape"]), 8 + length + start, end - start)
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} cannot be read: {e}") from e

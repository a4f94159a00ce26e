"""Real vLLM with the plugin, one family after the other: what is mounted is the checkpoint, what vLLM changes is seen in the
mount and committed, and what is not live is counted and explained.

usage: vllm_families.py VLLM_PYTHON MODEL_DIR…     (VLLM_PYTHON: the python of an environment with vLLM and engines/vllm in it;
MODEL_DIR: small checkpoints in bf16). Needs numpy. The directory's name tells the family, for the options it needs.
"""
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from engine import read_header
from harness import HERE, check, copy_model, ctl, mounted, same, shards, weightfs

# Families whose experts vLLM's CPU kernels repack.
EXPERTS = ("moe", "next", "gpt-oss", "deepseek")
# Multimodal classes want a processor unless nothing but text is asked for; their vision tower is not loaded then.
TEXT_ONLY = {"limit_mm_per_prompt": {"image": 0, "video": 0}}


class Vllm:
    def __init__(self, python, log):
        command = [python, os.path.join(HERE, "vllm_engine.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

    def tell(self, **command):
        print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "vLLM ended"}
        if "error" in answer:
            raise SystemExit(f"vLLM: {answer['error']} (its log: {self.process.args})")
        return answer

    def stop(self):
        self.process.stdin.close()
        self.process.wait(60)


def manifest_of(model, directory):
    """On the CPU it is written a moment after the engine is there."""
    began = time.monotonic()
    while time.monotonic() - began < 60:
        for name in os.listdir(directory):
            if name.endswith(".json") and (manifest := json.load(open(os.path.join(directory, name))))["model"] == model:
                return manifest
        time.sleep(0.05)
    raise SystemExit(f"no manifest of {model}")


def values(directory):
    """Every tensor's raw 16-bit or 32-bit values, by name."""
    out = {}
    for shard in shards(directory):
        data, header = read_header(os.path.join(directory, shard))
        raw = np.memmap(os.path.join(directory, shard), np.uint8, "r")
        for name, info in header.items():
            start, end = (data + o for o in info["data_offsets"])
            out[name] = (info["dtype"], np.array(raw[start:end]).view({"BF16": "<u2", "F32": "<u4"}[info["dtype"]]))
    return out


def scaled(dtype, raw, factor):
    """`raw` times a small whole number of quarters: exact in f32, then rounded to nearest even."""
    if dtype == "F32":
        return (raw.view("<f4") * np.float32(factor)).view("<u4")
    product = ((raw.astype("<u4") << 16).view("<f4") * np.float32(factor)).view("<u4")
    return ((product + 0x7FFF + ((product >> 16) & 1)) >> 16).astype("<u2")


def prepare(source, target):
    copy_model(source, target)
    config = json.load(open(f"{target}/config.json"))
    if config.get("model_type") == "deepseek_v3":
        # transformers does not write it, and vLLM makes no bias for the experts' scores without it.
        config["topk_method"] = "noaux_tc"
        json.dump(config, open(f"{target}/config.json", "w"))
    return target


def one(vllm, source, directory):
    family = os.path.basename(source.rstrip("/"))
    with tempfile.TemporaryDirectory() as scratch:
        model, before = prepare(source, f"{scratch}/model"), prepare(source, f"{scratch}/before")
        vision = "vision_config" in json.load(open(f"{model}/config.json"))
        vllm.tell(load=model, options=TEXT_ONLY if vision else {})
        manifest = manifest_of(model, directory)
        live, opaque = set(manifest["tensors"]), manifest["opaque"]
        original = values(model)
        absent = set(original) - live - set(opaque)
        print(f"{family}: {len(live)} live, {len(opaque)} opaque, {len(absent)} not held, of {len(original)}")
        check(f"{family}: all that is not live is explained: {sorted(set(opaque.values()))}", all(opaque.values()))
        check(f"{family}: only experts are opaque", all("expert" in n for n in opaque) and (not opaque or any(e in family for e in EXPERTS)))
        check(f"{family}: only the vision tower is not held", all("visual" in n for n in absent))
        check(f"{family}: something is live", len(live) > 10)
        with mounted(model, f"{scratch}/mnt", "--weights", "vllm") as mnt:
            check(f"{family}: the mount equals the checkpoint", same(mnt, model))
            vllm.tell(scale=1.25)
            ctl(mnt, "refresh")
            seen = values(mnt)
            wrong = [n for n, (dtype, raw) in original.items()
                     if not np.array_equal(seen[n][1], scaled(dtype, raw, 1.25) if n in live else raw)]
            check(f"{family}: the mount shows what vLLM changed, tensor by tensor {wrong[:2]}", not wrong)
            check(f"{family}: the disk does not", same(model, before))
            ctl(mnt, "commit")
            check(f"{family}: after the commit the disk does", same(model, mnt))


if __name__ == "__main__":
    python, *sources = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        os.environ["WEIGHTFS_MANIFEST_DIR"] = directory
        log = stack.enter_context(open(os.environ.get("VLLM_LOG", "/tmp/vllm_families.log"), "w"))
        vllm = Vllm(python, log)
        try:
            for source in sources:
                one(vllm, source, directory)
        finally:
            vllm.stop()
        check("no manifest is left behind", not os.listdir(directory))

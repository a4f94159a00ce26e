"""A real model through a real mount, read by everything people read models with, before and after another process changes
its weights, and after the commit. usage: real_model.py MODEL_DIR

Needs torch, transformers, safetensors, rsync, strace, and the release build (`cargo build --release --examples`)."""
import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors import safe_open

from harness import ROOT, WEIGHTFS, EngineProcess, changed_blocks, check, copy_model, ctl, mounted, same, sha256, shards, status, weightfs

CHECKSUMS = os.path.join(ROOT, "target", "release", "examples", "checksums")


def read_everywhere(mnt, scratch, label, want):
    """Every reader sees the shards of directory `want`."""
    for shard in shards(want):
        seen = subprocess.run(["sha256sum", f"{mnt}/{shard}"], capture_output=True, text=True, check=True).stdout.split()[0]
        check(f"{label}: sha256sum {shard}", seen == sha256(f"{want}/{shard}"))
    subprocess.run(["rm", "-rf", f"{scratch}/cp", f"{scratch}/rsync"], check=True)
    subprocess.run(["cp", "-r", mnt, f"{scratch}/cp"], check=True)
    check(f"{label}: cp -r", same(f"{scratch}/cp", want))
    excluded = ["--exclude=ctl", "--exclude=status*", "--exclude=commits"]
    subprocess.run(["rsync", "-a", *excluded, f"{mnt}/", f"{scratch}/rsync/"], check=True)
    check(f"{label}: rsync -a", same(f"{scratch}/rsync", want))
    sums = lambda d: subprocess.run([CHECKSUMS, d], capture_output=True, text=True, check=True).stdout
    check(f"{label}: Rust memmap2 + safetensors", sums(mnt) == sums(want))
    equal = 0
    for shard in shards(want):
        with safe_open(f"{mnt}/{shard}", "pt") as a, safe_open(f"{want}/{shard}", "pt") as b:
            keys = a.keys()
            equal += sum(torch.equal(a.get_tensor(k), b.get_tensor(k)) for k in keys)
            check(f"{label}: safe_open: all {len(keys)} tensors", equal == len(keys) == len(b.keys()))
    load = lambda d: transformers.AutoModelForCausalLM.from_pretrained(d, dtype=torch.bfloat16)
    a = load(mnt).state_dict()
    link = {}  # a directory of the wanted shards with the model's own config
    for name in os.listdir(mnt):
        if name not in ("ctl", "status", "status.json", "commits"):
            link[name] = f"{want}/{name}" if name in shards(want) else f"{mnt}/{name}"
    with tempfile.TemporaryDirectory() as assembled:
        for name, target in link.items():
            os.symlink(target, f"{assembled}/{name}")
        b = load(assembled).state_dict()
    check(f"{label}: from_pretrained", a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a))


def main(source):
    with tempfile.TemporaryDirectory() as scratch:
        model = copy_model(source, f"{scratch}/model")
        before, want, mnt = copy_model(source, f"{scratch}/before"), f"{scratch}/want", f"{scratch}/mnt"
        engine = EngineProcess(model, scratch)
        try:
            with mounted(model, mnt, *engine.weights):
                facts = status(mnt)
                print(f"{facts['source']['tensors']} tensors, {facts['source']['bytes']} bytes, served {facts['view']['served']}")
                read_everywhere(mnt, scratch, "as loaded", before)
                engine.tell("change", 1, 1e-6)
                engine.tell("expect", want)
                blocks = changed_blocks(before, want)
                read_everywhere(mnt, scratch, "changed", want)
                check("the disk is as it was", same(model, before))
                trace = f"{scratch}/trace"
                tracer = subprocess.Popen(
                    ["strace", "-f", "-y", "-s", "0", "-e", "trace=pwrite64,write,pwritev,pwritev2,ftruncate", "-e", "signal=none", "-o", trace, "-p", str(facts["pid"])],
                    stderr=subprocess.PIPE, text=True)
                while "attached" not in tracer.stderr.readline():
                    pass
                ctl(mnt, "commit by real_model.py")
                tracer.terminate()
                tracer.wait()
                check("after the commit the disk equals the live weights", same(model, want))
                written = 0
                for line in open(trace):
                    name = re.search(r"(\w+)\(\d+<([^>]*)>", line)
                    if name and re.search(r"/model/[^/]*\.safetensors$", name[2]):
                        call = re.search(r"pwrite64\(.*, (\d+), (\d+)\) += (\d+)", line)
                        if not call or int(call[2]) % 4096 or call[1] != call[3]:
                            check(f"every write is of whole blocks: {line.strip()}", False)
                        written += -(-int(call[3]) // 4096)
                check(f"the commit wrote {written} blocks of the shards, {blocks} had changed", written == blocks)
                read_everywhere(mnt, scratch, "committed", want)
                print("status:", json.dumps(status(mnt)["last_command"]))
                stamps = [os.stat(f"{model}/{s}").st_mtime_ns for s in shards(model)]
                ctl(mnt, "commit again")
                check("a commit of nothing touches no shard", stamps == [os.stat(f"{model}/{s}").st_mtime_ns for s in shards(model)])
                print("status:", json.dumps(status(mnt)["last_command"]))
        finally:
            engine.stop()
    print("all of it holds for", WEIGHTFS and weightfs("--version").stdout.strip())


if __name__ == "__main__":
    main(sys.argv[1])

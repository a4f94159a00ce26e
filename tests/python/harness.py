"""What the checks of this folder share: the weightfs command, a mount, an engine process, comparing files."""
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
WEIGHTFS = os.environ.get("WEIGHTFS", os.path.join(ROOT, "target", "release", "weightfs"))


def weightfs(*words, check=True):
    result = subprocess.run([WEIGHTFS, *map(str, words)], capture_output=True, text=True)
    if check and result.returncode:
        raise SystemExit(f"weightfs {' '.join(map(str, words))}: {result.stderr}")
    return result


class EngineProcess:
    def __init__(self, model, scratch, ranks=1):
        command = [sys.executable, os.path.join(HERE, "engine.py"), model, scratch, "--ranks", str(ranks)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.answer()
        self.weights = [word for m in self.facts["manifests"] for word in ("--weights", m)]

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the engine ended")
        return json.loads(line)

    def tell(self, *words):
        print(*words, file=self.process.stdin, flush=True)
        return self.answer()

    def stop(self):
        if self.process.poll() is None:
            self.tell("stop")
            self.process.wait()


@contextlib.contextmanager
def mounted(model, point, *options):
    os.makedirs(point, exist_ok=True)
    weightfs("mount", *options, model, point)
    try:
        yield point
    finally:
        weightfs("umount", point)


def ctl(point, command):
    with open(os.path.join(point, "ctl"), "w") as f:
        f.write(command)


def status(point):
    with open(os.path.join(point, "status.json")) as f:
        return json.load(f)


def shards(directory):
    return sorted(f for f in os.listdir(directory) if f.endswith(".safetensors"))


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def same(a, b):
    """Are all shards of two directories equal?"""
    return shards(a) == shards(b) and all(sha256(os.path.join(a, s)) == sha256(os.path.join(b, s)) for s in shards(a))


def changed_blocks(old, new):
    """How many 4096-byte blocks of the shards differ between two directories."""
    count = 0
    for shard in shards(old):
        with open(os.path.join(old, shard), "rb") as a, open(os.path.join(new, shard), "rb") as b:
            while True:
                x, y = a.read(4096), b.read(4096)
                if not x and not y:
                    break
                count += x != y
    return count


def copy_model(source, target):
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".weightfs"))
    return target


def check(what, holds):
    print(("ok    " if holds else "WRONG ") + what, flush=True)
    if not holds:
        raise SystemExit(f"this does not hold: {what}")

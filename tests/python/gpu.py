"""Weights in another process's GPU memory, from outside: bytes, changes, commits, deaths, and figures beside their peers.

    WEIGHTFS=target/release/weightfs python tests/python/gpu.py SCRATCH [check|ranks|kill|view|commit …]

Needs a GPU, root (for passthrough), torch, numpy. SCRATCH is a directory on a disk, with room for 3 x --commit-gb.
`check` and `kill` fail loudly; the others print figures.
"""
import argparse
import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import harness
from harness import check, ctl, mounted, same, status, weightfs

HERE = os.path.dirname(os.path.abspath(__file__))
GIB = 1 << 30


def qwen35(hidden, layers, inter, vocab, kv=4, scale=1):
    """Names and shapes of a Qwen3.5 text model: three layers of four are linear attention."""
    shapes = [("model.embed_tokens.weight", [vocab, hidden]), ("lm_head.weight", [vocab, hidden])]
    key, value, heads = 2048 // scale, 6144 // scale, 48 // scale
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes += [(p + "input_layernorm.weight", [hidden]), (p + "post_attention_layernorm.weight", [hidden])]
        shapes += [(p + f"mlp.{n}_proj.weight", [inter, hidden]) for n in ("gate", "up")]
        shapes += [(p + "mlp.down_proj.weight", [hidden, inter])]
        if i % 4 == 3:
            a = p + "self_attn."
            shapes += [(a + "q_proj.weight", [2 * value, hidden]), (a + "o_proj.weight", [hidden, value])]
            shapes += [(a + f"{n}_proj.weight", [kv * 256 // scale, hidden]) for n in "kv"]
            shapes += [(a + f"{n}_norm.weight", [256]) for n in "qk"]
        else:
            a = p + "linear_attn."
            shapes += [(a + "in_proj_qkv.weight", [2 * key + value, hidden]), (a + "in_proj_z.weight", [value, hidden])]
            shapes += [(a + f"in_proj_{n}.weight", [heads, hidden]) for n in "ba"]
            shapes += [(a + "conv1d.weight", [2 * key + value, 1, 4]), (a + "out_proj.weight", [hidden, value])]
            shapes += [(a + n, [heads]) for n in ("A_log", "dt_bias")] + [(a + "norm.weight", [128])]
    return shapes


def qwen3(hidden, layers, inter, vocab, heads, kv, dim):
    """config.json, names and shapes of a Qwen3 model with a head of its own."""
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers}
    config |= {"intermediate_size": inter, "vocab_size": vocab, "num_attention_heads": heads, "num_key_value_heads": kv}
    config |= {"head_dim": dim, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    shapes = [("model.embed_tokens.weight", [vocab, hidden]), ("lm_head.weight", [vocab, hidden]), ("model.norm.weight", [hidden])]
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes += [(p + f"{n}_layernorm.weight", [hidden]) for n in ("input", "post_attention")]
        shapes += [(p + f"mlp.{n}_proj.weight", [inter, hidden]) for n in ("gate", "up")] + [(p + "mlp.down_proj.weight", [hidden, inter])]
        a = p + "self_attn."
        shapes += [(a + "q_proj.weight", [heads * dim, hidden]), (a + "o_proj.weight", [hidden, heads * dim])]
        shapes += [(a + f"{n}_proj.weight", [kv * dim, hidden]) for n in "kv"] + [(a + f"{n}_norm.weight", [dim]) for n in "qk"]
    return config, shapes


def write_model(path, shapes, shard_bytes, sparse=False, config=None):
    """A checkpoint of random weights, or of zeros that take no room on the disk."""
    import numpy as np

    os.makedirs(path)
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(config or {"model_type": "none"}, f)
    shards, size = [[]], 0
    for name, shape in shapes:
        n = 2
        for d in shape:
            n *= d
        if size + n > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, shape, n))
        size += n
    index = {}
    random = np.random.default_rng(1)
    # Pieces of it, which start anywhere: making all of a large model takes longer than writing it.
    values = (random.standard_normal(1 << 24, dtype=np.float32) * 0.02).view(np.uint32) >> 16
    noise = np.tile(values.astype(np.uint16), 2)
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape, n in shard:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + n]}
            index[name] = file
            at += n
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(path, file), "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            if sparse:
                f.truncate(8 + len(text) + at)
            else:
                for _, _, n in shard:
                    left = n // 2
                    while left:
                        piece = min(left, 1 << 24)
                        start = int(random.integers(1 << 24))
                        noise[start : start + piece].tofile(f)
                        left -= piece
    with open(os.path.join(path, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": index}, f)
    return path


class Engine:
    def __init__(self, model, manifest, *options):
        command = [sys.executable, os.path.join(HERE, "gpu_engine.py"), model, manifest, *map(str, options)]
        self.manifest = manifest
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.answer()

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


def content_digest(directory):
    """The tensors' bytes of a model directory, as the engine's `digest` hashes them."""
    import hashlib

    from gpu_engine import headers

    digest = hashlib.sha256()
    for _, _, _, path, start, end in headers(directory):
        with open(path, "rb") as f:
            f.seek(start)
            left = end - start
            while left:
                piece = f.read(min(left, 16 << 20))
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest()


def shown_and_committed(model, point, engine, what, view):
    with mounted(model, point, "--weights", engine.manifest, "--view", view):
        check(f"{what}: the mount shows the files", same(model, point))
        keys = ("device", "view", "tensors", "host_memory", "gpu_memory")
        print("      ", "; ".join(l for l in open(point + "/status").read().splitlines() if l.split()[0] in keys))
        for fraction in (0.01, 1):
            engine.tell("bump", fraction, 3)
            ctl(point, "refresh")
            check(f"{what}: {fraction} changed is shown", content_digest(point) == engine.tell("digest")["digest"])
            ctl(point, f"commit {fraction}")
            print("      ", status(point)["last_command"]["says"])
            check(f"{what}: and committed", same(model, point))
        if view == "held":
            ctl(point, f"rollback {status(point)['committed']['id'] - 1}")
            ctl(point, "refresh")
            check(f"{what}: rolled back on the GPU", content_digest(point) == engine.tell("digest")["digest"])
            check(f"{what}: and on disk", same(model, point))


def refused(model, point, engine, scratch):
    """Manifests that are wrong about one thing."""
    manifest = json.load(open(engine.manifest))
    wrong = {"handle": "00" * 64, "device": "GPU-00000000-0000-0000-0000-000000000000", "bytes": 1 << 50}
    for change, value in wrong.items():
        broken = json.loads(json.dumps(manifest))
        broken["memories"][0][change] = value
        path = os.path.join(scratch, "broken.json")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            json.dump(broken, f)
        no = weightfs("mount", "--weights", path, model, point, check=False)
        check(f"a wrong {change} is refused", no.returncode != 0 and no.stderr.count("\n") == 1)
        print("      ", no.stderr.strip())


def checks(scratch):
    model = write_model(os.path.join(scratch, "small"), qwen35(1024, 4, 3072, 8000, scale=2), 50 << 20)
    point = os.path.join(scratch, "mnt")
    for layout in ("plain", "merged"):
        engine = Engine(model, os.path.join(scratch, "manifest.json"), "--layout", layout)
        for view in ("held", "live"):
            shown_and_committed(model, point, engine, f"{layout}, {view}", view)
        if layout == "plain":
            engine.tell("bump", 0.5, 5)
            print("      ", weightfs("commit", model, "--weights", engine.manifest).stdout.strip())
            check("one commit without a mount", content_digest(model) == engine.tell("digest")["digest"])
            refused(model, point, engine, scratch)
        engine.stop()
    check("verify", weightfs("verify", model).returncode == 0)
    handles(scratch, point)

    ranks(scratch, model)

    with mounted(model, point, "--device", "cuda"):
        check("weights of our own on the GPU", same(model, point))
        print("      ", status(point)["source"]["device"])
    no = weightfs("mount", "--device", "cuda:99", model, point, check=False)
    check("a GPU that is not there", no.returncode != 0 and "cuda:99" in no.stderr)
    print("      ", no.stderr.strip())


def ranks(scratch, model=None):
    """Two processes that hold halves of a model, on two GPUs where there are as many."""
    import torch

    model = model or write_model(os.path.join(scratch, "halves"), qwen35(1024, 4, 3072, 8000, scale=2), 50 << 20)
    devices = torch.cuda.device_count()
    point = os.path.join(scratch, "mnt")
    engines = [
        Engine(model, os.path.join(scratch, f"rank{r}.json"), "--rank", r, "--ranks", 2, "--device", r % devices)
        for r in range(2)
    ]
    weights = [w for e in engines for w in ("--weights", e.manifest)]
    with mounted(model, point, *weights):
        print("      ", status(point)["source"]["device"])
        check(f"two ranks on {min(devices, 2)} GPUs: the mount shows the files", same(model, point))
        for fraction in (0.01, 1):
            for e in engines:
                e.tell("bump", fraction, 3)
            ctl(point, f"commit {fraction}")
            print("      ", status(point)["last_command"]["says"])
            check("two ranks: committed", same(model, point))
    for e in engines:
        e.stop()


def handles(scratch, point):
    """What torch.save wrote of {parameter: reduce_tensor(parameter)}, merged as vLLM merges."""
    config, shapes = qwen3(512, 3, 1536, 4000, 8, 2, 64)
    model = write_model(os.path.join(scratch, "qwen3"), shapes, 50 << 20, config=config)
    engine = Engine(model, os.path.join(scratch, "handles.pt"), "--layout", "handles")
    for view in ("held", "live"):
        shown_and_committed(model, point, engine, f"torch's handles, {view}", view)
    engine.stop()
    shutil.rmtree(model)


def kills(scratch, times):
    """SIGKILL under 100 reads: ESTALE within a second, nothing hangs, GPU memory comes back."""
    import torch

    model = os.path.join(scratch, "small")
    if not os.path.exists(model):
        write_model(model, qwen35(1024, 4, 3072, 8000, scale=2), 50 << 20)
    point = os.path.join(scratch, "mnt")
    worst = 0.0
    free_before = torch.cuda.mem_get_info()[0]
    # What takes longest is an engine's start: four at a time, ahead of their end.
    starting = ThreadPoolExecutor(4)
    engines = starting.map(lambda n: Engine(model, os.path.join(scratch, f"manifest-{n}.json")), range(times))
    for n, engine in enumerate(engines):
        view = "live" if n % 2 == 0 else "held"
        with mounted(model, point, "--weights", engine.manifest, "--view", view):
            shard = os.path.join(point, harness.shards(point)[0])
            size = os.path.getsize(shard)
            started, ended, stop = threading.Barrier(101), [None] * 100, threading.Event()

            def read(i):
                fd = os.open(shard, os.O_RDONLY)
                started.wait()
                at = i * 4096
                try:
                    while not stop.is_set():
                        os.pread(fd, 1 << 20, at % size)
                        at += 1 << 20
                except OSError as e:
                    ended[i] = (time.monotonic(), e.errno)
                finally:
                    os.close(fd)

            threads = [threading.Thread(target=read, args=(i,)) for i in range(100)]
            for t in threads:
                t.start()
            started.wait()
            time.sleep(0.05)
            killed = time.monotonic()
            os.kill(engine.facts["pid"], signal.SIGKILL)
            while True:
                try:
                    os.close(os.open(shard, os.O_RDONLY))
                except OSError as e:
                    if e.errno != errno.ESTALE:
                        raise
                    break
                if time.monotonic() - killed > 5:
                    raise SystemExit("opens still work five seconds after the engine's death")
            worst = max(worst, time.monotonic() - killed)
            if view == "live":
                for t in threads:
                    t.join(5)
                late = [e for e in ended if e is None or e[1] != errno.ESTALE or e[0] - killed > 1.5]
                if late:
                    raise SystemExit(f"{len(late)} of 100 reads did not end with ESTALE in time: {late[:3]}")
            stop.set()
            for t in threads:
                t.join()
            said = status(point)
            if said["state"] != "failed" or "ended" not in said["source"]["gone"]:
                raise SystemExit(f"status does not say it: {said}")
        engine.process.wait()
    check(f"{times} engines killed under 100 reads; opens fail with ESTALE after at most {worst:.2f} s", worst < 1.5)
    free = torch.cuda.mem_get_info()[0]
    check("the GPU's memory came back", free > free_before - (200 << 20))


def log_times(log):
    """What the log says of the view's moves: (blocks, seconds), in order."""
    units = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
    found = []
    for line in open(log):
        m = re.search(r"view: (\d+) blocks in ([\d.]+)(ns|µs|ms|s)\b", line)
        if m:
            found.append((int(m[1]), float(m[2]) * units[m[3]]))
    return found


def memory_of(pid):
    fields = dict(l.split(":", 1) for l in open(f"/proc/{pid}/status") if ":" in l)
    return {k: int(fields[k].split()[0]) * 1024 for k in ("VmRSS", "RssAnon", "RssShmem")}


def announced(point):
    """What `status` says it takes at most."""
    return [l for l in open(point + "/status").read().splitlines() if l.split()[0] in ("host_memory", "gpu_memory")]


def gpu_memory():
    out = subprocess.run(
        ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"], capture_output=True, text=True
    )
    return out.stdout.strip().replace("\n", "; ")


def populated(size):
    """Seconds to take and pin a memfd's memory on all cores, which is what a view's first fill waits for."""
    import ctypes
    import mmap

    import torch

    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    fd = os.memfd_create("peer")
    os.ftruncate(fd, size)
    began = time.time()
    mapping = mmap.mmap(fd, size)
    first = ctypes.c_char.from_buffer(mapping)
    start = ctypes.addressof(first)

    def take(at):
        n = min(256 << 20, size - at)
        if libc.madvise(start + at, n, 23):  # MADV_POPULATE_WRITE
            raise OSError(ctypes.get_errno(), "madvise")
        if int(torch.cuda.cudart().cudaHostRegister(start + at, n, 0)):
            raise SystemExit("cudaHostRegister failed")

    pieces = range(0, size, 256 << 20)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(take, pieces))
    seconds = time.time() - began
    for at in pieces:
        torch.cuda.cudart().cudaHostUnregister(start + at)
    del first
    mapping.close()
    os.close(fd)
    return seconds


def view(scratch, layers, reading):
    """54 GB in Qwen3.5-27B's shapes: first fill, refreshes, reading."""
    import torch

    shapes = qwen35(5120, layers, 17408, 248320)
    model = write_model(os.path.join(scratch, "large"), shapes, 5 * GIB, sparse=True)
    point = os.path.join(scratch, "mnt")
    began = time.time()
    engine = Engine(model, os.path.join(scratch, "manifest.json"), "--random")
    print(f"engine: {time.time() - began:.1f} s, {engine.facts}")
    free = torch.cuda.mem_get_info()[0]
    log = os.path.join(scratch, "log")
    total = sum(os.path.getsize(os.path.join(model, f)) for f in harness.shards(model))
    print(f"the same memory taken and pinned by nobody else: {populated(total):.2f} s, once more {populated(total):.2f} s")
    began = time.time()
    with mounted(model, point, "--weights", engine.manifest, "--log-level", "debug", "--log-file", log):
        total = status(point)["source"]["bytes"]
        print(f"{total / 1e9:.1f} GB; mounted after {time.time() - began:.2f} s; {status(point)['source']['device']}")
        while not status(point)["view"]["ready"]:
            time.sleep(0.02)
        print(f"view ready after {time.time() - began:.2f} s")
        while status(point)["dirty"] == "unknown":
            time.sleep(0.05)
        print(f"files on disk hashed after {time.time() - began:.2f} s")
        for fraction in (0, 0, 0, 0.0001, 0.001, 0.01, 0.01, 0.1, 1, 1):
            engine.tell("bump", fraction, 11)
            ctl(point, "refresh")
        bytes_of = lambda blocks: blocks * 4096
        for blocks, seconds in log_times(log):
            rate = bytes_of(blocks) / seconds / 1e9
            print(f"  view moved: {blocks} blocks in {seconds * 1e3:.2f} ms ({rate:.1f} GB/s copied, {total / seconds / 1e9:.0f} GB/s looked at)")
        pid = status(point)["pid"]
        print("host memory of the daemon:", {k: f"{v / 1e9:.2f} GB" for k, v in memory_of(pid).items()}, announced(point))
        print(f"GPU memory: {gpu_memory()}; taken beside the engine: {(free - torch.cuda.mem_get_info()[0]) / 1e6:.0f} MB")
        if reading:
            read_beside(point)
    engine.stop()
    shutil.rmtree(model)


def read_beside(point):
    """The mount beside the same file in /dev/shm."""
    # One shard: of several gigabytes, and so many readers as well.
    first = harness.shards(point)[:1]
    sample = os.path.join("/dev/shm", "weightfs-peer")
    os.makedirs(sample, exist_ok=True)
    for f in first:
        shutil.copyfile(os.path.join(point, f), os.path.join(sample, f))
    for readers in (1, 8):
        for what, read in (("read", read_all), ("safe_open", safe_open_all)):
            rates = {}
            for where in (point, sample) * 3:
                seconds, got = read([os.path.join(where, f) for f in first], readers)
                rates.setdefault(where, []).append(got / seconds / 1e9)
            ours, shm = (sorted(rates[w])[1] for w in (point, sample))
            print(f"  {readers} reader(s), {what}: {ours:.2f} GB/s, /dev/shm {shm:.2f} GB/s, ratio {ours / shm:.2f}")
    shutil.rmtree(sample)


READ = """
import sys
b = memoryview(bytearray(4 << 20)); n = 0
for p in sys.argv[1:]:
    with open(p, 'rb', buffering=0) as f:
        while k := f.readinto(b): n += k
print(n)
"""
SAFE = """
import sys, torch
from safetensors import safe_open
torch.set_num_threads(1)
n = 0
for p in sys.argv[1:]:
    with safe_open(p, 'pt') as f:
        for k in f.keys():
            t = f.get_tensor(k); t.view(-1).view(torch.int64 if t.numel() % 4 == 0 else torch.int16).sum(); n += t.numel() * 2
print(n)
"""


def parallel(program, files, readers):
    """Whole processes, their start not counted: each waits for a line before it reads."""
    wait = "import sys; sys.stdin.readline()\n"
    head, body = program.split("n = 0", 1)
    text = head + "print('ready', flush=True); sys.stdin.readline(); n = 0" + body
    children = [
        subprocess.Popen([sys.executable, "-c", text, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(readers)
    ]
    for c in children:
        c.stdout.readline()
    began = time.time()
    for c in children:
        c.stdin.write("\n")
        c.stdin.flush()
    got = sum(int(c.stdout.readline()) for c in children)
    seconds = time.time() - began
    for c in children:
        c.wait()
    return seconds, got


def read_all(files, readers):
    return parallel(READ, files, readers)


def safe_open_all(files, readers):
    return parallel(SAFE, files, readers)


def commits(scratch, layers):
    """Commits of 0, 1 and 100% of the blocks, beside what the disk writes in a row."""
    shapes = qwen35(5120, layers, 17408, 20480)
    began = time.time()
    model = write_model(os.path.join(scratch, "medium"), shapes, 4 * GIB)
    total = sum(os.path.getsize(os.path.join(model, f)) for f in harness.shards(model))
    os.sync()
    print(f"{total / 1e9:.1f} GB written in {time.time() - began:.1f} s")
    began = time.time()
    with open(os.path.join(scratch, "row"), "wb") as f:
        piece = os.urandom(64 << 20)
        for _ in range(32):
            f.write(piece)
        os.fsync(f.fileno())
    print(f"the disk, 2 GiB in a row and fsync: {2 * GIB / (time.time() - began) / 1e9:.2f} GB/s")
    os.unlink(os.path.join(scratch, "row"))
    engine = Engine(model, os.path.join(scratch, "manifest.json"))
    point = os.path.join(scratch, "mnt")
    with mounted(model, point, "--weights", engine.manifest, "--staging-memory", f"{total // GIB + 1}GiB"):
        while status(point)["dirty"] == "unknown":
            time.sleep(0.05)
        for fraction in (0, 0, 0.01, 0.01, 1):
            engine.tell("bump", fraction, int(time.time()))
            began = time.time()
            ctl(point, f"commit {fraction}")
            print(f"  {fraction}: {time.time() - began:.3f} s: {status(point)['last_command']['says']}")
        used = {k: f"{v / 1e9:.2f} GB" for k, v in memory_of(status(point)["pid"]).items()}
        print("host memory of the daemon:", used, announced(point))
        check("the directory is what the GPU holds", content_digest(model) == engine.tell("digest")["digest"])
    engine.stop()
    shutil.rmtree(model)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("scratch")
    p.add_argument("what", nargs="*", default=["check", "kill", "view", "commit"])
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--view-layers", type=int, default=64)
    p.add_argument("--no-reading", action="store_true")
    p.add_argument("--commit-layers", type=int, default=16)
    a = p.parse_args()
    os.makedirs(a.scratch, exist_ok=True)
    os.makedirs(os.path.join(a.scratch, "mnt"), exist_ok=True)
    if "check" in a.what:
        checks(a.scratch)
    if "ranks" in a.what:
        ranks(a.scratch)
    if "kill" in a.what:
        kills(a.scratch, a.kills)
    if "view" in a.what:
        view(a.scratch, a.view_layers, not a.no_reading)
    if "commit" in a.what:
        commits(a.scratch, a.commit_layers)


if __name__ == "__main__":
    main()

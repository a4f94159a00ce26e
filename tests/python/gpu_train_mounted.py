"""A PyTorch process generates with weights on a GPU while weightfs trains them there, through a mount; commits in the middle,
a reader beside it, and the way back.

    WEIGHTFS=target/release/weightfs python tests/python/gpu_train_mounted.py SCRATCH [--steps N] [--cpu]

Needs a GPU, root, torch, transformers, safetensors. The model is made: random bf16 in the shapes of a Llama of 0.4 billion, no
tokenizer. `--cpu` does the same with a tiny model in shared memory, to try the script itself."""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time

from harness import ROOT, check, ctl, mounted, status, weightfs

sys.path.insert(0, os.path.join(ROOT, "engines", "torch"))
SIZES = {
    "cuda": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=8,
                 vocab_size=32000, max_position_embeddings=4096),
    "cpu": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=500, max_position_embeddings=4096),
}


def hasher():
    """SHA-256 takes longer than all the rest here."""
    try:
        import xxhash
        return xxhash.xxh3_128()
    except ImportError:
        return hashlib.blake2b()


def engine(directory, device):
    """The process that owns the weights: writes a checkpoint, publishes, generates without end; commands on stdin."""
    import torch
    import transformers
    import weightfs_export

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES[device], tie_word_embeddings=False, eos_token_id=None, bos_token_id=0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.eval().save_pretrained(directory, max_shard_size="1GB")
    publication = weightfs_export.publish(model, directory)
    ids = torch.randint(0, config.vocab_size, (8, 64), device=device)
    made, stop, wrong = [0], threading.Event(), []

    def generate():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    out = model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0,
                                         attention_mask=torch.ones_like(ids))
                    if out.shape != (8, 96):
                        wrong.append(f"{tuple(out.shape)} came out")
                made[0] += 8 * 32
        except Exception as e:
            wrong.append(repr(e))

    thread = threading.Thread(target=generate)
    thread.start()
    while made[0] < 512 and not wrong:
        time.sleep(0.01)
    print(json.dumps({"manifest": publication.path, "opaque": publication.opaque}), flush=True)
    for line in sys.stdin:
        word = line.strip()
        answer = {"time": time.time(), "made": made[0], "wrong": wrong}
        if word == "digest":
            digest = hasher()
            for name, tensor in sorted(model.named_parameters()):
                digest.update(tensor.detach().cpu().contiguous().view(torch.int16).numpy().tobytes())
            answer["digest"] = digest.hexdigest()
        if word == "finite":
            answer["finite"] = all(bool(torch.isfinite(p).all()) for p in model.parameters())
        print(json.dumps(answer), flush=True)
        if word == "stop":
            break
    stop.set()
    thread.join()
    publication.close()


class Engine:
    def __init__(self, directory, device):
        command = [sys.executable, os.path.abspath(__file__), directory, "--engine", device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the engine ended")
        return json.loads(line)

    def tell(self, word):
        print(word, file=self.process.stdin, flush=True)
        return self.answer()

    def rate(self, since):
        now = self.tell("rate")
        if now["wrong"]:
            raise SystemExit(f"the engine says {now['wrong']}")
        return (now["made"] - since["made"]) / (now["time"] - since["time"])


def digest_of(directory):
    """What the engine's `digest` is for the tensors of a model directory."""
    from safetensors import safe_open
    import torch

    where = {}
    for file in sorted(os.listdir(directory)):
        if file.endswith(".safetensors"):
            with safe_open(os.path.join(directory, file), "pt") as f:
                where |= {name: file for name in f.keys()}
    digest = hasher()
    for name in sorted(where):
        with safe_open(os.path.join(directory, where[name]), "pt") as f:
            digest.update(f.get_tensor(name).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def job(path, vocabulary, steps, samples=8, context=512, trained=512, **config):
    """Made-up ids that repeat, so that there is something to learn; one sample a step."""
    ids = lambda n, seed: [(i * i * 31 + seed * 977 + i % 7) % vocabulary for i in range(n)]
    all_ = [{"context_ids": ids(context, 1), "continuation_ids": ids(trained, 2 + s)} for s in range(samples)]
    config = dict(lr=2e-5, step_tokens=1, epochs=-(-steps // samples)) | config
    with open(path, "w") as f:
        json.dump({"samples": all_, "config": config}, f)
    return path


def newest_job(point):
    return status(point)["jobs"][-1]


def wait_for(point, what, seconds):
    end = time.time() + seconds
    while time.time() < end:
        now = newest_job(point)
        if what(now):
            return now
        time.sleep(0.02)
    raise SystemExit(f"after {seconds} s the job is {now['state']} at {now['steps_done']} of {now['steps']}: {now.get('error')}")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("scratch")
    p.add_argument("--engine")
    # Far more than two commits take.
    p.add_argument("--steps", type=int, default=1200)
    p.add_argument("--cpu", action="store_true")
    a = p.parse_args()
    if a.engine:
        return engine(a.scratch, a.engine)
    device = "cpu" if a.cpu else "cuda"
    os.makedirs(a.scratch, exist_ok=True)
    model, point = os.path.join(a.scratch, "model"), os.path.join(a.scratch, "mnt")
    size = dict(context=64, trained=64) if a.cpu else {}
    vocabulary = SIZES[device]["vocab_size"]
    owner = Engine(model, device)
    print("engine:", owner.facts, flush=True)
    first = owner.tell("digest")["digest"]
    check("the checkpoint is the engine's weights", digest_of(model) == first)

    if not a.cpu:
        # With no library named, the engine's own are found.
        named = os.environ.pop("WEIGHTFS_CUDA_LIBRARY_PATH", None)
        with mounted(model, point, "--weights", owner.facts["manifest"], "--view", "live"):
            one = job(os.path.join(a.scratch, "one.json"), vocabulary, 1, samples=1, trainable=["model.norm.weight"])
            said = weightfs("train", point, one, "--follow", check=False)
            says = (said.stdout + said.stderr).strip()
            check(f"with the engine's libraries, the last norm alone: {says[-160:]}", said.returncode == 0 and "finished" in says)
            ctl(point, "rollback 0")
        if named:
            os.environ["WEIGHTFS_CUDA_LIBRARY_PATH"] = named

    with mounted(model, point, "--weights", owner.facts["manifest"], "--log-file", os.path.join(a.scratch, "log")):
        print("weights on", status(point)["source"]["device"], flush=True)
        since = owner.tell("rate")
        time.sleep(1.5)
        before = owner.rate(since)
        # One step first, so that what is made once (kernels, plans of products, buffers) is not in the figures.
        weightfs("train", point, job(os.path.join(a.scratch, "one.json"), vocabulary, 8, **size), "--follow")
        said = weightfs("train", point, job(os.path.join(a.scratch, "job.json"), vocabulary, a.steps, **size)).stdout.strip()
        print(said, flush=True)
        id_ = newest_job(point)["id"]

        # A reader, all the time, and a watch on how far the job is.
        reads, errors, moments, over = [0], [], [], threading.Event()

        def read():
            while not over.is_set():
                try:
                    for file in sorted(f for f in os.listdir(point) if f.endswith(".safetensors")):
                        with open(os.path.join(point, file), "rb") as f:
                            while f.read(16 << 20):
                                pass
                    reads[0] += 1
                except OSError as e:
                    errors.append(str(e))
                    time.sleep(0.1)

        def watch():
            last = -1
            while not over.is_set():
                now = newest_job(point)
                if now["id"] == id_ and now["steps_done"] != last:
                    last = now["steps_done"]
                    moments.append((time.time(), last))
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        since = owner.tell("rate")
        wait_for(point, lambda j: j["steps_done"] >= a.steps // 6, 60)
        during = owner.rate(since)
        commits = []
        for which in ("first", "second"):
            start = time.time()
            ctl(point, f"commit in the middle, the {which}")
            commits.append((which, start, time.time()))
            print(f"the {which} commit: {time.time() - start:.2f} s: {status(point)['last_command']['says']}", flush=True)
        ended = newest_job(point)
        check(f"the commits were in the middle of the job (now {ended['steps_done']} of {ended['steps']})",
              ended["state"] == "running" or a.cpu)
        reader = threading.Thread(target=read)
        reader.start()
        done = wait_for(point, lambda j: j["state"] not in ("running", "queued"), 120)
        over.set()
        watcher.join()
        reader.join()
        check(f"the job is finished ({done['state']}, {done.get('error')})", done["state"] == "finished")
        check(f"readers met no error {errors[:2]}", not errors)
        losses = done["losses"]
        print(f"{done['steps_done']} steps in {done['seconds']:.2f} s, {done['tokens'] / done['seconds']:.0f} tokens/s, "
              f"predicted {done['memory'] / 1e9:.2f} GB, losses {losses[0]:.3f} {losses[len(losses) // 2]:.3f} {losses[-1]:.3f}; "
              f"{reads[0]} reads of the whole model meanwhile", flush=True)
        gaps = [(b[0] - x[0], b[0]) for x, b in zip(moments, moments[1:]) if b[1] == x[1] + 1]
        usual = sorted(g for g, _ in gaps)[len(gaps) // 2]
        for which, start, end in commits:
            around = [g for g, t in gaps if start <= t <= end + 0.1]
            if around:
                # The first has memory pinned for it.
                print(f"a step usually {usual * 1e3:.0f} ms; the longest during the {which} commit {max(around) * 1e3:.0f} ms: training "
                      f"stood still for {(max(around) - usual) * 1e3:.0f} ms", flush=True)
        print(f"generation: {before:.0f} tokens/s before, {during:.0f} while it trains", flush=True)
        check("loss fell", losses[-1] < losses[0])
        check("all weights are finite", owner.tell("finite")["finite"])

        now = owner.tell("digest")["digest"]
        check("the weights changed", now != first)
        check("the mount shows the engine's weights", digest_of(point) == now)
        ctl(point, "commit after the job")
        print(status(point)["last_command"]["says"], flush=True)
        check("the directory holds the engine's weights", digest_of(model) == now)
        print(weightfs("verify", model).stdout.strip()[-200:], flush=True)
        # On from the moments that the commit brought home and the device still has.
        weightfs("train", point, job(os.path.join(a.scratch, "more.json"), vocabulary, 8, **size), "--follow")
        check("it trains on", newest_job(point)["state"] == "finished")
        start = time.time()
        ctl(point, "rollback 0")
        print(f"rollback: {time.time() - start:.2f} s: {status(point)['last_command']['says']}", flush=True)
        check("a rollback restores every bit", owner.tell("digest")["digest"] == first)
        check("in the directory too", digest_of(model) == first)
        weightfs("train", point, job(os.path.join(a.scratch, "again.json"), vocabulary, 8, **size), "--follow")
        again = newest_job(point)["losses"]
        ctl(point, "rollback 0")
        weightfs("train", point, job(os.path.join(a.scratch, "again.json"), vocabulary, 8, **size), "--follow")
        check("the same job from the same start has the same losses, to the bit", newest_job(point)["losses"] == again)
        ctl(point, "rollback 0")
        # What cannot be: a projection wider than any matrix changes nothing.
        refused = weightfs("train", point, job(os.path.join(a.scratch, "bad.json"), vocabulary, 8, rank=1 << 20, **size), check=False)
        check(f"a job that cannot be is refused: {refused.stderr.strip()[:120]}", refused.returncode != 0)
        check("and changed nothing", owner.tell("digest")["digest"] == first)
    owner.tell("stop")
    owner.process.wait()

    # Weights of our own on the GPU.
    with mounted(model, point, "--device", device, "--log-file", os.path.join(a.scratch, "log")):
        weightfs("train", point, job(os.path.join(a.scratch, "own.json"), vocabulary, 8, **size), "--follow")
        own = newest_job(point)["losses"]
        off = max(abs(x - y) for x, y in zip(own, again))
        print(f"own weights: losses off by {off:.1e} from the engine's", flush=True)
        check("own weights train the same", off < 2e-2)
        ctl(point, "commit own")
        check("and commit", digest_of(model) != first)
        ctl(point, "rollback 0")
        check("and go back", digest_of(model) == first)
    print("all holds")


if __name__ == "__main__":
    main()

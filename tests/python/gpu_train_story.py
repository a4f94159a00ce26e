"""What weightfs is for, once, in Qwen3.5-27B's shapes: another process owns the weights on a GPU; mount, train, commit while it
trains on, verify. Prints the time of each, and how long training stood still for the commit.

    WEIGHTFS=target/release/weightfs python tests/python/gpu_train_story.py SCRATCH [--layers N] [--tokens N] [--cpu]

SCRATCH needs room for the model (54 GB with all 64 layers, 11 with 8) and what a commit logs (up to 0.7 of it; with `--lr 1e-6`
a tenth). Needs a GPU, root, torch, numpy. `--cpu` does the
same with a tiny model of that family in shared memory."""
import argparse
import json
import os
import re
import subprocess
import time

import harness
from gpu import Engine, content_digest, qwen35, write_model
from gpu_train_mounted import job, newest_job, wait_for
from harness import check, ctl, mounted, same, status, weightfs


def model_of(path, layers, cpu):
    hidden, inter, vocab, scale, kv = (64, 96, 500, 8, 8) if cpu else (5120, 17408, 248320, 1, 4)
    shapes = qwen35(hidden, layers, inter, vocab, kv=kv, scale=scale) + [("model.norm.weight", [hidden])]
    config = {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": hidden, "hidden_act": "silu"}
    config |= {"num_hidden_layers": layers, "intermediate_size": inter, "vocab_size": vocab, "tie_word_embeddings": False}
    config |= {"num_attention_heads": 24 // scale, "num_key_value_heads": kv // scale or 1, "head_dim": 256, "rms_norm_eps": 1e-6}
    config |= {"linear_num_key_heads": 16 // scale, "linear_num_value_heads": 48 // scale, "linear_conv_kernel_dim": 4}
    config |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "max_position_embeddings": 1 << 18}
    config |= {"layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}}
    write_model(path, shapes, 4 << 30, config=config)
    return vocab


class Clock:
    def __init__(self):
        self.last = self.start = time.time()

    def says(self, what):
        now = time.time()
        print(f"{now - self.last:6.2f} s  {what}", flush=True)
        self.last = now


def main():
    p = argparse.ArgumentParser()
    p.add_argument("scratch")
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--lr", type=float, default=1e-5)
    p.add_argument("--log", help="another directory for the commits' log, bound over the model's: where SCRATCH has no room for it")
    p.add_argument("--cpu", action="store_true")
    a = p.parse_args()
    os.makedirs(a.scratch, exist_ok=True)
    model, point = os.path.join(a.scratch, "model"), os.path.join(a.scratch, "mnt")
    if a.cpu:
        a.layers, a.tokens = min(a.layers, 4), 48
    clock = Clock()
    vocabulary = model_of(model, a.layers, a.cpu)
    size = sum(os.path.getsize(os.path.join(model, f)) for f in harness.shards(model))
    if a.log:
        state = os.path.join(model, ".weightfs")
        for directory in (a.log, state):
            os.makedirs(directory, mode=0o700, exist_ok=True)
        subprocess.run(["mount", "--bind", a.log, state], check=True)
    clock.says(f"a checkpoint of {size / 1e9:.2f} GB, {a.layers} layers")
    if a.cpu:
        owner = harness.EngineProcess(model, a.scratch)
        weights = owner.weights
    else:
        owner = Engine(model, os.path.join(a.scratch, "manifest.json"))
        weights = ["--weights", owner.manifest]
    clock.says("another process has it")

    # Room to stage all of it, so that training goes on while the commit is logged.
    options = ["--view", "live", "--staging-memory", f"{-(-size // (1 << 20)) + 1}MiB", "--log-file", os.path.join(a.scratch, "log")]
    with mounted(model, point, *weights, *options):
        clock.says(f"mounted, weights on {status(point)['source'].get('device') or 'the host'}")
        make = lambda name, steps: job(os.path.join(a.scratch, name), vocabulary, steps, samples=4, context=0, trained=a.tokens, lr=a.lr)
        weightfs("train", point, make("first.json", a.steps), "--follow")
        done = newest_job(point)
        check(f"trained {done['steps_done']} steps of 0+{a.tokens} tokens ({done.get('error')})", done["state"] == "finished")
        losses = done["losses"]
        clock.says(f"trained: {done['seconds'] / done['steps_done'] * 1e3:.0f} ms a step on average, the first with what is made "
                   f"once; predicted {done['memory'] / 1e9:.2f} GB, {done['host_memory'] / 1e9:.2f} of the host; losses {losses[0]:.3f} to {losses[-1]:.3f}")
        # Each of the four samples comes round again.
        check("loss fell", sum(losses[-4:]) < sum(losses[:4]))
        # Far more steps than the commit takes: they end with `cancel`.
        weightfs("train", point, make("on.json", 40 if a.cpu else 4000))
        id_ = newest_job(point)["id"]
        wait_for(point, lambda j: j["id"] == id_ and j["steps_done"] >= 2, 30)
        clock.last = time.time()
        ctl(point, "commit while it trains")
        says = status(point)["last_command"]["says"]
        clock.says(f"committed: {says}")
        now = newest_job(point)
        check(f"while it trained (on to step {now['steps_done']})", now["state"] == "running" or a.cpu)
        held = re.search(r"held for ([\d.]+) (ms|s)", says)
        if held:
            seconds = float(held[1]) * (1e-3 if held[2] == "ms" else 1)
            print(f"          training stood still for {seconds * 1e3:.0f} ms at most, {size / 1e9 / seconds:.1f} GB/s", flush=True)
        if now["state"] == "running":
            ctl(point, f"cancel {id_}")
        ended = wait_for(point, lambda j: j["state"] not in ("running", "queued"), 60)
        check(f"and went on ({ended['state']}, {ended.get('error')})", ended["state"] in ("cancelled", "finished"))
        last = newest_job(point)
        took = last["seconds"] / last["steps_done"]
        clock.says(f"{last['steps_done']} steps in all, {took * 1e3:.0f} ms a step with the commit beside them")
        verified = weightfs("verify", model).stdout.strip()
        clock.says(f"verified: {verified[-120:]}")
        check("nothing is wrong", verified.endswith("0 wrong"))
        if size < 1 << 30:
            ctl(point, "commit the rest")
            check("the directory holds what the mount shows", same(model, point))
            ctl(point, "rollback 0")
            check("and goes back", same(model, point))
            if not a.cpu:
                check("as the engine has it", content_digest(model) == owner.tell("digest")["digest"])
    owner.stop()
    if a.log:
        subprocess.run(["umount", os.path.join(model, ".weightfs")], check=True)
    print(f"{time.time() - clock.start:6.2f} s in all", flush=True)


if __name__ == "__main__":
    main()

"""Loss curves of a small model over 200 steps from the same start and data: weightfs through a mount, beside transformers with
APOLLO on f32 weights, with several seeds each for what runs differ by anyway.

    WEIGHTFS=target/release/weightfs python tests/python/gpu_train_curves.py SCRATCH [--device cuda|cpu] [--steps N]

Needs torch, transformers, safetensors. The peer is apollo-torch where it is installed (it is not part of weightfs), else APOLLO
from its equations, written here. Data: a Markov chain over the vocabulary, every step's samples new."""
import argparse
import importlib.util
import json
import os
import sys
import time
import types

import torch
import transformers

from harness import check, mounted, status, weightfs

RANK, REFRESH, LR = 64, 50, 1e-3
SAMPLES, LENGTH = 8, 256


def model_of(device, small):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=96 if small else 512, intermediate_size=200 if small else 1408, num_hidden_layers=2 if small else 8,
        num_attention_heads=8, num_key_value_heads=4, vocab_size=300 if small else 4096, max_position_embeddings=LENGTH,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=None)
    config._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())  # the same start in either type
    return model.to(device)


def chain(vocabulary, steps):
    """Ids (steps, SAMPLES, LENGTH): after each token one of four come, half the time the first."""
    g = torch.Generator().manual_seed(1)
    after = torch.randint(0, vocabulary, (vocabulary, 4), generator=g)
    pick = torch.multinomial(torch.tensor([0.5, 0.25, 0.15, 0.1]), steps * SAMPLES * LENGTH, True, generator=g)
    pick = pick.reshape(steps * SAMPLES, LENGTH)
    ids = torch.empty(steps * SAMPLES, LENGTH, dtype=torch.long)
    ids[:, 0] = torch.randint(0, vocabulary, (steps * SAMPLES,), generator=g)
    for t in range(1, LENGTH):
        ids[:, t] = after[ids[:, t - 1], pick[:, t]]
    return ids.reshape(steps, SAMPLES, LENGTH)


def apollo_torch(model, seed):
    """apollo-torch's optimizer with our settings, or None where it is not installed."""
    if "apollo_torch" not in sys.modules:
        found = importlib.util.find_spec("apollo_torch")
        if found is None:
            return None
        # Its package imports bitsandbytes, which its plain optimizer does not need.
        package = types.ModuleType("apollo_torch")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["apollo_torch"] = package
    from apollo_torch.apollo import AdamW

    groups, plain = {}, []
    for p in model.parameters():
        if p.ndim == 2 and min(p.shape) >= RANK:
            groups.setdefault(min(p.shape), []).append(p)
        else:
            plain.append(p)
    shared = dict(rank=RANK, update_proj_gap=REFRESH, proj="random", scale_type="channel", proj_type="std")
    groups = [dict(params=ps, scale=small / RANK, **shared) for small, ps in groups.items()]
    optimizer = AdamW(groups + [dict(params=plain)], lr=LR, eps=1e-8, weight_decay=0.0)
    for state in optimizer.state.values():
        state["seed"] += 100_000 * seed
    return optimizer


class Apollo:
    """The equations of docs/training.md, in f32."""

    def __init__(self, model, seed):
        self.state = {p: {} for p in model.parameters()}
        self.t, self.generator = 0, torch.Generator(device=next(model.parameters()).device).manual_seed(seed)

    @torch.no_grad()
    def step(self):
        self.t += 1
        rate = LR * (1 - 0.999**self.t) ** 0.5 / (1 - 0.9**self.t)
        for p, s in self.state.items():
            g, wide = p.grad, p.ndim == 2 and min(p.shape) >= RANK
            r = g
            if wide:
                tall = p.shape[0] >= p.shape[1]
                if (self.t - 1) % REFRESH == 0:
                    s["p"] = torch.randn(RANK, min(p.shape), device=p.device, generator=self.generator) / RANK**0.5
                r = g @ s["p"].T if tall else s["p"] @ g
            if "m" not in s:
                s["m"], s["v"] = torch.zeros_like(r), torch.zeros_like(r)
            s["m"].mul_(0.9).add_(r, alpha=0.1)
            s["v"].mul_(0.999).addcmul_(r, r, value=0.001)
            n = s["m"] / (s["v"].sqrt() + 1e-8)
            if wide:
                axis = 1 if tall else 0
                u = g * (n.norm(dim=axis, keepdim=True) / (r.norm(dim=axis, keepdim=True) + 1e-8))
                length = u.norm()
                if "length" in s:
                    shrink = max(float(length / (s["length"] + 1e-8)), 1.01) / 1.01
                    u, length = u / shrink, length / shrink
                s["length"] = length
                p.add_(u, alpha=-rate * (min(p.shape) / RANK) ** 0.5)
            else:
                p.add_(n, alpha=-rate)

    def zero_grad(self):
        for p in self.state:
            p.grad = None


def peer(device, small, data, seed):
    model = model_of(device, small)
    optimizer = apollo_torch(model, seed)
    name = "apollo-torch" if optimizer else "the equations in PyTorch"
    optimizer = optimizer or Apollo(model, seed)
    losses = []
    for ids in data:
        ids = ids.to(device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return name, [float(x) for x in losses]


def ours(scratch, device, small, data, dtype, seed):
    directory, point = f"{scratch}/{dtype}-{seed}", f"{scratch}/mnt"
    model_of("cpu", small).to(getattr(torch, dtype)).save_pretrained(directory)
    samples = [{"continuation_ids": ids} for step in data.tolist() for ids in step]
    config = dict(lr=LR, rank=RANK, proj_refresh=REFRESH, weight_decay=0.0, step_tokens=SAMPLES * LENGTH, seed=seed)
    with open(f"{scratch}/job.json", "w") as f:
        json.dump({"samples": samples, "config": config}, f)
    with mounted(directory, point, "--device", device, "--log-file", f"{scratch}/log"):
        weightfs("train", point, f"{scratch}/job.json", "--follow")
        job = status(point)["jobs"][-1]
        check(f"{dtype} seed {seed}: {job['steps']} steps in {job['seconds']:.1f} s ({job['state']})",
              job["state"] == "finished" and job["steps"] == len(data))
        return job["losses"]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("scratch")
    p.add_argument("--device", default="cuda")
    p.add_argument("--steps", type=int, default=200)
    a = p.parse_args()
    os.makedirs(a.scratch, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    small = a.device == "cpu"
    data = chain(300 if small else 4096, a.steps)
    runs, start = {}, time.time()
    for seed in (0, 1, 2):
        name, losses = peer(a.device, small, data, seed)
        runs[f"{name}, seed {seed}"] = losses
    print(f"peers: {time.time() - start:.1f} s", flush=True)
    for dtype, seed in (("float32", 0), ("bfloat16", 0), ("bfloat16", 1)):
        runs[f"weightfs {dtype}, seed {seed}"] = ours(a.scratch, a.device, small, data, dtype, seed)
    at = [n for n in (1, 2, 3, 5, 10, 20, 50, 100, 150, 200) if n <= a.steps]
    tail = max(1, a.steps // 10)
    print(f"{'loss of step':38}" + "".join(f"{n:8}" for n in at) + f"   last {tail}")
    ends = {}
    for name, losses in runs.items():
        ends[name] = sum(losses[-tail:]) / tail
        print(f"{name:38}" + "".join(f"{losses[n - 1]:8.4f}" for n in at) + f"{ends[name]:10.4f}", flush=True)
    peers = [x for n, x in ends.items() if not n.startswith("weightfs")]
    mean, spread = sum(peers) / len(peers), max(peers) - min(peers)
    firsts = [losses[0] for losses in runs.values()]
    check(f"the first losses are one ({min(firsts):.5f} to {max(firsts):.5f})", max(firsts) - min(firsts) < 1e-3 * max(firsts))
    for name, end in ends.items():
        if name.startswith("weightfs"):
            # Three seeds say little of how far seeds lie apart: as far again on either side is no surprise.
            check(f"{name}: {end - mean:+.4f} from the peers' mean, which lie {spread:.4f} apart", abs(end - mean) <= 1.5 * spread)


if __name__ == "__main__":
    main()

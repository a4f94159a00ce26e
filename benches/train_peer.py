"""One training step in PyTorch: transformers, and APOLLO from its equations, as a user would write both. See train.rs.

arguments: MODEL_DIR DTYPE CONTEXT STEPS THREADS OPTIMIZER IDS
"""
import json
import resource
import sys
import time

import torch
import transformers

transformers.logging.set_verbosity_error()
model_dir, dtype, context, steps, threads, optimizer, ids = sys.argv[1:]
context, steps = int(context), int(steps)
torch.set_num_threads(int(threads))
model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
ids = torch.tensor([json.loads(ids)])


def resident(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key))


class Apollo:
    """State in f32, one new projection every 200 steps, kept."""

    def __init__(self, params, rank, tensor_wise, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, decay=0.01, limit=1.01):
        self.params, self.rank, self.tensor_wise = list(params), rank, tensor_wise
        self.lr, self.betas, self.eps, self.decay, self.limit, self.t = lr, betas, eps, decay, limit, 0
        self.state = [{} for _ in self.params]

    @torch.no_grad()
    def step(self):
        b1, b2 = self.betas
        refresh = self.t % 200 == 0
        self.t += 1
        rate = self.lr * (1 - b2**self.t) ** 0.5 / (1 - b1**self.t)
        for p, s in zip(self.params, self.state):
            g = p.grad
            projected = p.ndim == 2 and min(p.shape) >= self.rank
            if projected:
                tall = p.shape[0] >= p.shape[1]
                if refresh:
                    shape = (self.rank, p.shape[1]) if tall else (p.shape[0], self.rank)
                    s["p"] = (torch.randn(shape) / self.rank**0.5).to(g.dtype)
                r = (g @ s["p"].T if tall else s["p"].T @ g).float()
            else:
                r = g.float()
            if "m" not in s:
                s["m"], s["v"] = torch.zeros_like(r), torch.zeros_like(r)
            s["m"].mul_(b1).add_(r, alpha=1 - b1)
            s["v"].mul_(b2).addcmul_(r, r, value=1 - b2)
            n = s["m"] / (s["v"].sqrt() + self.eps)
            if projected:
                if self.tensor_wise:
                    f, scale = n.norm() / (r.norm() + 1e-8), 128**0.5
                else:
                    axis = 1 if tall else 0
                    f = n.norm(dim=axis, keepdim=True) / (r.norm(dim=axis, keepdim=True) + 1e-8)
                    scale = (min(p.shape) / self.rank) ** 0.5
                u = g * f.to(g.dtype)
                length = u.norm()
                if "length" in s:
                    k = torch.clamp(length / (s["length"] + 1e-8), min=self.limit) / self.limit
                    u, length = u / k, length / k
                s["length"] = length
                p.add_(u, alpha=-rate * scale)
            else:
                p.add_(n.to(p.dtype), alpha=-rate)
            p.mul_(1 - self.lr * self.decay)
            p.grad = None


update = Apollo(model.parameters(), 1 if optimizer == "apollo-mini" else 64, optimizer == "apollo-mini")
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
times, losses = [], []
for step in range(steps):
    if step == 1:
        processor = time.process_time()
    start = time.perf_counter()
    if context > 1:
        with torch.no_grad():
            cache = model.model(input_ids=ids[:, : context - 1], use_cache=True).past_key_values
        logits = model(input_ids=ids[:, context - 1 : -1], past_key_values=cache, use_cache=True).logits[0]
        targets = ids[0, context:]
    else:
        logits, targets = model(input_ids=ids[:, :-1], use_cache=False).logits[0], ids[0, 1:]
    loss = torch.nn.functional.cross_entropy(logits.float(), targets)
    loss.backward()
    update.step()
    times.append(time.perf_counter() - start)
    losses.append(loss.item())
    del logits, loss
processor = (time.process_time() - processor) / (steps - 1)
times = sorted(times[1:])
state = sum(t.numel() * t.element_size() for s in update.state for t in s.values() if t.ndim)
print(f"PyTorch {dtype}: {times[len(times) // 2] * 1e3:.0f} ms a step (best {times[0] * 1e3:.0f}, processor {processor * 1e3:.0f}), "
      f"{(resident('VmHWM') - before) // 1000000} MB beyond the weights, {state // 1000000} of them state; "
      f"losses {losses[0]:.4f} {losses[1]:.4f}", flush=True)

#!/usr/bin/env python3
"""The peer of `gpu_train bench`: transformers on a GPU with Qwen3-8B's or Qwen3.5-27B's shapes and random weights in bf16, and
APOLLO from its equations as a user would write it in PyTorch.

    python benches/gpu_train_peer.py CONTEXT TRAINED apollo|apollo-mini [STEPS [qwen3-8b|qwen3.5-27b]]

Qwen3.5 trains without a context alone: transformers changes the state of linear attention in place.
"""
import sys
import time

import torch
import transformers

context, trained, optimizer = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
steps = int(sys.argv[4]) if len(sys.argv) > 4 else 7
torch.manual_seed(0)
if len(sys.argv) > 5 and sys.argv[5] == "qwen3.5-27b":
    config = transformers.Qwen3_5TextConfig(hidden_size=5120, num_hidden_layers=64, num_attention_heads=24, num_key_value_heads=4,
                                            head_dim=256, intermediate_size=17408, vocab_size=248320, linear_num_key_heads=16,
                                            linear_num_value_heads=48, tie_word_embeddings=False)
else:
    config = transformers.Qwen3Config(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
                                      head_dim=128, intermediate_size=12288, vocab_size=151936, tie_word_embeddings=False)
config._attn_implementation = "sdpa"
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = transformers.AutoModelForCausalLM.from_config(config)
base = torch.cuda.memory_allocated()
rank, tensor_wise = (1, True) if optimizer == "apollo-mini" else (64, False)
lr, b1, b2, eps, decay, limit = 1e-5, 0.9, 0.999, 1e-8, 0.01, 1.01
state = {p: {} for p in model.parameters()}


@torch.no_grad()
def update(t):
    rate = lr * (1 - b2**t) ** 0.5 / (1 - b1**t)
    for p, s in state.items():
        g = p.grad
        projected = p.ndim == 2 and min(p.shape) >= rank
        if projected:
            tall = p.shape[0] >= p.shape[1]
            if t % 200 == 1:
                shape = (rank, p.shape[1]) if tall else (p.shape[0], rank)
                s["p"] = (torch.randn(shape, device="cuda", dtype=torch.float32) / rank**0.5).to(g.dtype)
            r = (g @ s["p"].T if tall else s["p"].T @ g).float()
        else:
            r = g.float()
        if "m" not in s:
            s["m"], s["v"] = torch.zeros_like(r), torch.zeros_like(r)
        s["m"].mul_(b1).add_(r, alpha=1 - b1)
        s["v"].mul_(b2).addcmul_(r, r, value=1 - b2)
        n = s["m"] / (s["v"].sqrt() + eps)
        if projected:
            if tensor_wise:
                f, scale = n.norm() / (r.norm() + 1e-8), 128**0.5
            else:
                axis = 1 if tall else 0
                f = n.norm(dim=axis, keepdim=True) / (r.norm(dim=axis, keepdim=True) + 1e-8)
                scale = (min(p.shape) / rank) ** 0.5
            g.mul_(f.to(g.dtype))
            length = g.norm()
            if "length" in s:
                k = torch.clamp(length / (s["length"] + 1e-8), min=limit) / limit
                g.div_(k)
                length = length / k
            s["length"] = length
            p.mul_(1 - lr * decay)
            p.add_(g, alpha=-rate * scale)
        else:
            p.add_(n.to(p.dtype), alpha=-rate)
            p.mul_(1 - lr * decay)
        p.grad = None


ids = torch.tensor([[i * 7919 % 150_000 for i in range(context + trained)]], device="cuda")
torch.cuda.reset_peak_memory_stats()
times, parts = [], []
for step in range(steps):
    torch.cuda.synchronize()
    start = time.perf_counter()
    if context > 1:
        with torch.no_grad():
            cache = model.model(input_ids=ids[:, : context - 1], use_cache=True).past_key_values
        logits = model(input_ids=ids[:, context - 1 : -1], past_key_values=cache, use_cache=True).logits[0]
        targets = ids[0, context:]
    else:
        logits, targets = model(input_ids=ids[:, :-1], use_cache=False).logits[0], ids[0, 1:]
    loss = torch.nn.functional.cross_entropy(logits.float(), targets)
    torch.cuda.synchronize()
    forward = time.perf_counter()
    loss.backward()
    torch.cuda.synchronize()
    backward = time.perf_counter()
    update(step + 1)
    torch.cuda.synchronize()
    end = time.perf_counter()
    times.append((end - start, forward - start, backward - forward, end - backward))
    del logits
t = [x * 1e3 for x in sorted(times[2:])[len(times[2:]) // 2]]
print(f"PyTorch {optimizer} {context}+{trained}: {t[0]:.1f} ms [forward {t[1]:.1f}, backward {t[2]:.1f}, update {t[3]:.1f}], "
      f"{(torch.cuda.max_memory_allocated() - base) / 1e9:.2f} GB beyond the weights")

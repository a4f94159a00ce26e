#!/usr/bin/env python3
"""Makes qwen3_5_curve.safetensors: the losses of 100 steps of APOLLO on the golden qwen3_5, gradients by transformers and autograd in
float32, updates from the equations (make_apollo.py). Even steps train the whole sequence, odd ones its end after a context. `nudged` is the
same from weights that differ by a millionth: rounding grows from step to step, and this says how fast.

usage: make_curve.py      needs torch, transformers 5, numpy and safetensors
"""
import pathlib

import numpy as np
import torch
from make import CASES, build, context_in_one_run
from make_apollo import Apollo
from safetensors.torch import save_file

STEPS = 100
torch.set_num_threads(1)


def curve(nudge):
    """Losses by step, from weights changed by about `nudge` of themselves."""
    model, ids, context = build("qwen3_5", CASES["qwen3_5"])
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + nudge * torch.randn_like(p))
    apollo = {n: Apollo(n, tuple(p.shape), lr=1e-3, rank=4, weight_decay=0.01, refresh=30) for n, p in model.named_parameters()}
    losses = []
    for step in range(STEPS):
        if step % 2 == 0:
            logits, targets = model(input_ids=ids[:, :-1], use_cache=False).logits[0], ids[0, 1:]
        else:
            logits, targets = context_in_one_run(model, ids[:, :-1], context - 1), ids[0, context:]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.from_numpy(apollo[name].step(p.double().numpy(), p.grad.double().numpy()).astype(np.float32)))
    return torch.tensor(losses)


losses, nudged = curve(0.0), curve(1e-6)
off = (nudged / losses - 1).abs()
print([round(l, 4) for l in losses[::10].tolist()], losses[-1].item(), [f"{x:.1e}" for x in off[:20].tolist()], off.max().item())
save_file({"losses": losses, "nudged": nudged}, pathlib.Path(__file__).parent / "qwen3_5_curve.safetensors")

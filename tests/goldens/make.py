#!/usr/bin/env python3
"""Makes the goldens of the trainer: what transformers (float32, eager attention, autograd) says of tiny models.

usage: make.py            needs torch, transformers 5 and safetensors; writes NAME.json (the config) and NAME.safetensors beside itself

No weights are stored: both sides compute them from the tensor's name (`weights` here, `golden_weights` in tests/train_goldens.rs),
as values that bf16 holds exactly. Each NAME.safetensors holds, for one sequence `ids`:
  plain.logits, plain.loss, plain.grad.TENSOR            the sequence, trained from its second token on
  context.logits, context.loss, context.grad.TENSOR      its first CONTEXT tokens without gradient, the last of them with it
`bf16_errors.txt` says how far transformers in bfloat16 is from them, which is what a trainer in bfloat16 is measured by.
The RoPE cases keep the gradients of q_proj and k_proj alone: nothing else about them differs.
"""
import json
import pathlib

import numpy as np
import torch
import transformers as T
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
LENGTH, CONTEXT = 21, 8
SMALL = dict(vocab_size=32, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5)
WIDE = SMALL | dict(head_dim=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


def rope(kind, **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=100.0, **more))


CASES = {
    "llama": T.LlamaConfig(**SMALL, head_dim=6, tie_word_embeddings=False),
    "llama_biased_tied": T.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral_sliding": T.MistralConfig(**SMALL, head_dim=4, sliding_window=5, tie_word_embeddings=False),
    "qwen2_sliding_above": T.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=1,
                                         tie_word_embeddings=False),
    "qwen3_tied": T.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True),
    "rope_linear": T.LlamaConfig(**WIDE, **rope("linear", factor=4.0)),
    "rope_llama3": T.LlamaConfig(**WIDE, **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                               original_max_position_embeddings=32)),
    "rope_yarn": T.Qwen2Config(**{k: v for k, v in WIDE.items() if k != "head_dim"} | dict(hidden_size=32),
                               **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
}


def splitmix64(x):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fnv1a(name):
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) % 2**64
    return np.uint64(h)


def weights(name, shape):
    """Odd multiples of 2^-9 below 1/2 for matrices, of 2^-11 for biases; 0.75 to 1.25 by 64ths for norms."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        bits = splitmix64(fnv1a(name) + np.arange(count, dtype=np.uint64)) >> np.uint64(56)
    odd = 2.0 * bits.astype(np.float64) - 255.0
    if "norm" in name:
        values = 0.75 + (bits >> np.uint64(3)).astype(np.float64) / 64.0
    else:
        values = odd * (2.0**-9 if name.endswith(".weight") else 2.0**-11)
    return torch.tensor(values.reshape(shape), dtype=torch.float32)


def loss_and_grads(model, logits, targets):
    loss = torch.nn.functional.cross_entropy(logits.float(), targets)
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def model_of(config):
    config._attn_implementation = "eager"
    model = T.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for tensor, p in model.named_parameters():
            p.copy_(weights(tensor, tuple(p.shape)))
    return model


def run(model, ids):
    """Logits and targets of both runs."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
    yield "plain", logits, ids[0, 1:]
    with torch.no_grad():
        cache = model(input_ids=ids[:, : CONTEXT - 1], use_cache=True).past_key_values
    logits = model(input_ids=ids[:, CONTEXT - 1 : -1], past_key_values=cache, use_cache=True).logits[0]
    yield "context", logits, ids[0, CONTEXT:]


def bf16_errors(config, ids, golden):
    """By run: the loss's error in bf16, and the largest and the median relative error of a gradient; the larger of those of a
    model in bf16 and of one in float32 under autocast."""
    errors = {}
    for autocast in (False, True):
        model = model_of(config)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for name, logits, targets in run(model if autocast else model.bfloat16(), ids):
                loss, grads = loss_and_grads(model, logits, targets)
                start = f"{name}.grad."
                wants = {k.removeprefix(start): v.double() for k, v in golden.items() if k.startswith(start)}
                off = sorted(float((grads[n].double() - w).norm() / w.norm()) for n, w in wants.items())
                here = (abs(float(loss) - float(golden[f"{name}.loss"])), off[-1], off[len(off) // 2])
                errors[name] = [max(a, b) for a, b in zip(errors.get(name, here), here)]
    return errors


lines = []
for name, config in CASES.items():
    ids = torch.tensor([int(splitmix64(np.uint64(1000 + i)) % np.uint64(config.vocab_size)) for i in range(LENGTH)])[None]
    out = {"ids": ids[0].to(torch.int32)}
    model = model_of(config)
    for which, logits, targets in run(model, ids):
        loss, grads = loss_and_grads(model, logits, targets)
        out[f"{which}.logits"], out[f"{which}.loss"] = logits.detach().clone(), loss.reshape(1)
        for tensor, grad in grads.items():
            if not name.startswith("rope") or "q_proj.w" in tensor or "k_proj.w" in tensor:
                out[f"{which}.grad.{tensor}"] = grad
    save_file({k: v.contiguous() for k, v in out.items()}, HERE / f"{name}.safetensors")
    text = json.loads(config.to_json_string())
    text["context_length"] = CONTEXT
    (HERE / f"{name}.json").write_text(json.dumps(text, indent=1) + "\n")
    for which, numbers in bf16_errors(config, ids, out).items():
        lines.append(" ".join([name, which] + [f"{x:.5f}" for x in numbers]))
    print(name, float(out["plain.loss"]), float(out["context.loss"]), type(model).__name__)
(HERE / "bf16_errors.txt").write_text("\n".join(lines) + "\n")

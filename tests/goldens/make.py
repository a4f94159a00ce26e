#!/usr/bin/env python3
"""Makes the goldens of the trainer: what transformers (float32, eager attention, autograd) says of tiny models.

usage: make.py [NAME…]    needs torch, transformers 5 and safetensors; writes NAME.json (the config) and NAME.safetensors beside itself

No weights are stored: both sides compute them from the tensor's name (`weights` here, `golden_weights` in tests/train_goldens.rs),
as values that bf16 holds exactly. Each NAME.safetensors holds, for one sequence `ids`:
  plain.logits, plain.loss, plain.grad.TENSOR            the sequence, trained from its second token on
  context.logits, context.loss, context.grad.TENSOR      its first CONTEXT tokens without gradient, the last of them with it
`bf16_errors.txt` says how far transformers in bfloat16 is from them, which is what a trainer in bfloat16 is measured by.
The RoPE cases keep the gradients of q_proj and k_proj alone: nothing else about them differs.

Qwen3.5's context: transformers changes the recurrent state in place, so that a cached context cannot be trained after. There the whole
sequence runs at once, what carries information from row to row (keys, values, what enters the convolution and the delta rule) is
detached for the rows of the context, and the loss is on the rows after it; the logits are compared with those of a cached run.
"""
import json
import pathlib
import sys

import numpy as np
import torch
import transformers as T
from safetensors.torch import save_file
from transformers.models.qwen3_5 import modeling_qwen3_5

HERE = pathlib.Path(__file__).parent
LENGTH, CONTEXT = 21, 8
SMALL = dict(vocab_size=32, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5)
WIDE = SMALL | dict(head_dim=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


def rope(kind, **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=100.0, **more))


DELTA = dict(vocab_size=32, hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5, linear_conv_kernel_dim=4, linear_num_key_heads=2,
             linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=5,
             layer_types=["linear_attention", "full_attention", "linear_attention"])
VISION = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=16, num_position_embeddings=4, patch_size=2,
              spatial_merge_size=2)
# Sequences over several chunks of 64, cut raggedly before and after the context's end; a context shorter than the convolution reaches.
LENGTHS = {"qwen3_5": (190, 72), "qwen3_5_vision_tied": (40, 3)}

CASES = {
    "llama": T.LlamaConfig(**SMALL, head_dim=6, tie_word_embeddings=False),
    "llama_biased_tied": T.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral_sliding": T.MistralConfig(**SMALL, head_dim=4, sliding_window=5, tie_word_embeddings=False),
    "qwen2_sliding_above": T.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=1,
                                         tie_word_embeddings=False),
    "qwen3_tied": T.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True),
    "qwen3_5": T.Qwen3_5TextConfig(**DELTA, tie_word_embeddings=False),
    "qwen3_5_vision_tied": T.Qwen3_5Config(text_config=DELTA | dict(tie_word_embeddings=True, num_hidden_layers=2,
                                                                   layer_types=DELTA["layer_types"][:2]),
                                           vision_config=VISION, tie_word_embeddings=True, image_token_id=28, video_token_id=29,
                                           vision_start_token_id=30, vision_end_token_id=31),
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


def weights(name, shape, offset=0.0):
    """Odd multiples of 2^-9 below 1/2 for matrices, of 2^-11 for biases; 0.75 to 1.25 by 64ths for norms (less `offset`, where
    they are kept as their distance from 1); -4 to 0 for A_log, so that some heads remember for long."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        bits = splitmix64(fnv1a(name) + np.arange(count, dtype=np.uint64)) >> np.uint64(56)
    odd = 2.0 * bits.astype(np.float64) - 255.0
    if "norm" in name:
        values = 0.75 + (bits >> np.uint64(3)).astype(np.float64) / 64.0 - (0.0 if "linear_attn" in name else offset)
    elif name.endswith("A_log"):
        values = -bits.astype(np.float64) / 64.0
    else:
        values = odd * (2.0**-9 if name.endswith(".weight") else 2.0**-11)
    return torch.tensor(values.reshape(shape), dtype=torch.float32)


def loss_and_grads(model, logits, targets):
    loss = torch.nn.functional.cross_entropy(logits.float(), targets)
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if ".visual." not in n}


def detached(x, rows, dim=1):
    """x with its first rows as constants."""
    return torch.cat([x.narrow(dim, 0, rows).detach(), x.narrow(dim, rows, x.shape[dim] - rows)], dim=dim)


def context_in_one_run(model, ids, frozen):
    """Logits after the context, which is constant for whatever comes after it."""
    hooks = [module.register_forward_hook(lambda module, args, out: detached(out, frozen))
             for name, module in model.named_modules() if name.endswith(("in_proj_qkv", "v_proj", "k_norm"))]
    rule = modeling_qwen3_5.torch_chunk_gated_delta_rule

    def frozen_rule(query, key, value, g, beta, **more):
        return rule(*(detached(x, frozen) for x in (query, key, value)), g=detached(g, frozen), beta=detached(beta, frozen), **more)

    modeling_qwen3_5.torch_chunk_gated_delta_rule = frozen_rule
    try:
        return model(input_ids=ids, use_cache=False).logits[0, frozen:]
    finally:
        modeling_qwen3_5.torch_chunk_gated_delta_rule = rule
        for hook in hooks:
            hook.remove()


def build(name, config):
    """The model with its weights, a sequence, and how much of it is context."""
    config._attn_implementation = "eager"
    vision = "vision" in name
    model = (T.Qwen3_5ForConditionalGeneration(config) if vision else T.AutoModelForCausalLM.from_config(config)).float().eval()
    with torch.no_grad():
        for tensor, p in model.named_parameters():
            p.copy_(weights(tensor, tuple(p.shape), 1.0 if name.startswith("qwen3_5") else 0.0))
    length, context = LENGTHS.get(name, (LENGTH, CONTEXT))
    vocabulary = config.get_text_config().vocab_size - 4 * vision  # not the tokens that stand for pictures
    ids = [int(splitmix64(np.uint64(1000 + i)) % np.uint64(vocabulary)) for i in range(length)]
    return model, torch.tensor([ids]), context


def runs(name, model, ids, context):
    """Logits and targets of both runs."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
    yield "plain", logits, ids[0, 1:]
    with torch.no_grad():
        cache = model(input_ids=ids[:, : context - 1], use_cache=True).past_key_values
    if name in LENGTHS:
        with torch.no_grad():
            cached = model(input_ids=ids[:, context - 1 : -1], past_key_values=cache, use_cache=True).logits[0]
        logits = context_in_one_run(model, ids[:, :-1], context - 1)
        # In bf16 both round on their own ways.
        if logits.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            print("the context in one run and cached: logits within", float((logits - cached).abs().max()), "of", float(cached.abs().max()))
            assert torch.allclose(logits, cached, atol=2e-5)
    else:
        logits = model(input_ids=ids[:, context - 1 : -1], past_key_values=cache, use_cache=True).logits[0]
    yield "context", logits, ids[0, context:]


# Models that make much of little: a rounding of the embeddings to bf16, and nothing else, moves their logits by a fifteenth and transformers'
# gradients in bf16 anywhere between 0.08 and 0.21 (median). One run says little of those: the worst of eight does, each with another such rounding.
SPREAD = {"qwen3_5": 8}


def bf16_errors(name, config, golden):
    """By run: the loss's error in bf16, and the largest and the median relative error of a gradient; the larger of those of a
    model in bf16 and of one in float32 under autocast."""
    errors = {}
    for seed in range(-1, SPREAD.get(name, 1)):
        autocast = seed >= 0
        model, ids, context = build(name, config)
        if seed > 0:
            generator = torch.Generator().manual_seed(seed)
            noise = lambda x: (torch.rand(x.shape[-1], generator=generator).to(x.dtype) - 0.5) * 2**-8
            model.get_input_embeddings().register_forward_hook(lambda _, inputs, x: x * (1 + noise(x)))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for run, logits, targets in runs(name, model if autocast else model.bfloat16(), ids, context):
                loss, grads = loss_and_grads(model, logits, targets)
                start = f"{run}.grad."
                wants = {k.removeprefix(start): v.double() for k, v in golden.items() if k.startswith(start)}
                off = sorted(float((grads[n].double() - w).norm() / w.norm()) for n, w in wants.items())
                here = (abs(float(loss) - float(golden[f"{run}.loss"])), off[-1], off[len(off) // 2])
                errors[run] = [max(a, b) for a, b in zip(errors.get(run, here), here)]
    return errors


def make(name, config):
    model, ids, context = build(name, config)
    out = {"ids": ids[0].to(torch.int32)}
    for run, logits, targets in runs(name, model, ids, context):
        loss, grads = loss_and_grads(model, logits, targets)
        out[f"{run}.logits"], out[f"{run}.loss"] = logits.detach().clone(), loss.reshape(1)
        for tensor, grad in grads.items():
            if not name.startswith("rope") or "q_proj.w" in tensor or "k_proj.w" in tensor:
                out[f"{run}.grad.{tensor}"] = grad
    save_file({k: v.contiguous() for k, v in out.items()}, HERE / f"{name}.safetensors")
    text = json.loads(config.to_json_string())
    text["context_length"] = context
    (HERE / f"{name}.json").write_text(json.dumps(text, indent=1) + "\n")
    print(name, float(out["plain.loss"]), float(out["context.loss"]), type(model).__name__)
    return [" ".join([name, run] + [f"{x:.5f}" for x in numbers]) for run, numbers in bf16_errors(name, config, out).items()]


if __name__ == "__main__":
    file = HERE / "bf16_errors.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    for name, config in CASES.items():
        if len(sys.argv) < 2 or name in sys.argv[1:]:
            lines = [line for line in lines if line.split()[0] != name] + make(name, config)
    file.write_text("\n".join(lines) + "\n")

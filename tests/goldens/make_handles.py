#!/usr/bin/env python3
"""Makes tests/goldens/handles/: handle files as an engine's hook writes them, beside the checkpoints they belong to.

usage: make_handles.py            needs torch, transformers 5 and safetensors

The sharing process is said to be number 1, which every machine has; with zeros before it, so that a test can put another in its place.

There is no GPU here: the tensors lie in two byte arrays that stand for two allocations (memory0.bin, memory1.bin), merged and padded
as vLLM 0.33 does (the names and the order were taken from its loader, tensor by tensor), and torch pickles the very functions and
values that reduce_tensor gives for CUDA tensors (torch/multiprocessing/reductions.py). Each folder:
  config.json, model.safetensors      the checkpoint
  handles.pt                          {parameter: (rebuild_cuda_tensor, (…))}
  memory0.bin, memory1.bin            what the two handles open
"""
import pathlib

import torch
import transformers as T
from safetensors.torch import save_file
from torch.multiprocessing import reductions

HERE = pathlib.Path(__file__).parent / "handles"
SMALL = dict(vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=4, max_position_embeddings=64)
GDN = dict(linear_conv_kernel_dim=4, linear_key_head_dim=4, linear_value_head_dim=6, linear_num_key_heads=1, linear_num_value_heads=2,
           layer_types=["linear_attention", "full_attention"])
VISION = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=8, num_position_embeddings=4, patch_size=2,
              spatial_merge_size=2)
TOKENS = dict(image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8)
CASES = {
    "llama": (T.LlamaForCausalLM, T.LlamaConfig(**SMALL, tie_word_embeddings=False), 2),
    "qwen2_tied": (T.Qwen2ForCausalLM, T.Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}, tie_word_embeddings=True), 2),
    "qwen3": (T.Qwen3ForCausalLM, T.Qwen3Config(**SMALL, tie_word_embeddings=False), 4),
    "qwen3_5_text": (T.Qwen3_5ForCausalLM, T.Qwen3_5TextConfig(**SMALL, **GDN, tie_word_embeddings=False), 2),
    "qwen3_5": (T.Qwen3_5ForConditionalGeneration,
                T.Qwen3_5Config(text_config=SMALL | GDN, vision_config=VISION, tie_word_embeddings=False, **TOKENS), 2),
}
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"],
          "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"], "in_proj_ba": ["in_proj_b", "in_proj_a"]}
HANDLES = [bytes([2]) + b"c" + bytes((7 * i + 100 * m) % 256 for i in range(64)) for m in range(2)]


def vllm_name(name):
    for ours, theirs in (("model.language_model.", "language_model.model."), ("model.visual.", "visual.")):
        if name.startswith(ours):
            return theirs + name[len(ours):]
    return name


def vllm_parameters(state, nested):
    """The engine's parameters, by name, of a checkpoint's tensors."""
    parameters, done = {}, set()
    for name, tensor in state.items():
        if name in done or ".visual." in name:  # the engine serves text only: no vision tower
            continue
        module, kind = name.rsplit(".", 1) if "." in name else (name, "")
        parent, _, leaf = module.rpartition(".")
        merged = next(((m, parts) for m, parts in MERGED.items() if leaf in parts), None)
        if merged:
            names = [f"{parent}.{part}.{kind}" for part in merged[1]]
            done.update(names)
            parameters[vllm_name(f"{parent}.{merged[0]}.{kind}")] = torch.cat([state[n] for n in names])
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            padded = torch.zeros(64, tensor.shape[1], dtype=tensor.dtype)
            padded[: tensor.shape[0]] = tensor
            parameters["language_model.lm_head.weight" if nested and name == "lm_head.weight" else vllm_name(name)] = padded
        elif name.endswith("A_log"):
            parameters[vllm_name(name)] = tensor.float()
        else:
            parameters[vllm_name(name)] = tensor
    return parameters


def main():
    for case, (model_class, config, protocol) in CASES.items():
        torch.manual_seed(len(case))
        model = model_class(config)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        state = {n: t.detach().to(torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        state = {n: t for n, t in state.items() if ".visual." not in n or n.endswith("norm1.weight")}  # one stands for all
        out = HERE / case
        out.mkdir(parents=True, exist_ok=True)
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})
        (out / "config.json").write_text(config.to_json_string())
        memories, handles = [bytearray(256), bytearray(1024)], {}
        for i, (name, tensor) in enumerate(vllm_parameters(state, case == "qwen3_5").items()):
            memory = memories[i % 2]
            raw = tensor.contiguous().view(torch.uint8).reshape(-1).numpy().tobytes()
            offset = len(memory)  # of the storage; the caching allocator rounds to 512
            memory += raw + b"\xee" * (-len(raw) % 512)
            handles[name] = (reductions.rebuild_cuda_tensor, (
                torch.nn.Parameter if i % 3 else torch.Tensor, tensor.size(), tensor.stride(), 0, torch.storage.TypedStorage, tensor.dtype,
                0, HANDLES[i % 2], len(raw), offset, False, b"/torch_0000001_99_0", i, bytes(64), True))
        handles["__metadata__"] = {"num_params": len(handles), "model": case}
        torch.save(handles, out / "handles.pt", pickle_protocol=protocol)
        for m, memory in enumerate(memories):
            (out / f"memory{m}.bin").write_bytes(memory)
        print(case, len(state), "tensors", len(handles) - 1, "parameters", sum(f.stat().st_size for f in out.iterdir()), "bytes")


if __name__ == "__main__":
    main()

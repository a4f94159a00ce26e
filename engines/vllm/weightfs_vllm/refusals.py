"""What cannot be shared, and what to start vLLM with instead. No torch here."""

import os


def refusal(vllm_config, environment=os.environ):
    """One sentence saying why this engine's weights cannot be shared and what to do, or None."""
    model = vllm_config.model_config
    load_format = str(getattr(vllm_config.load_config, "load_format", "auto")).lower()
    if getattr(model, "enable_sleep_mode", False):
        return "sleep mode takes the weights' memory away while others have it mapped: start vLLM without --enable-sleep-mode"
    if getattr(model, "enable_cumem_allocator", False):
        return "cuMem memory cannot be shared by IPC handle: start vLLM without --enable-cumem-allocator"
    if load_format == "ipc_cache":
        return "the weights belong to the `vllm preload` daemon, not to this engine: start vLLM without --load-format ipc_cache"
    if load_format not in ("auto", "hf", "safetensors", "mistral", "fastsafetensors", "instanttensor"):
        return f"--load-format {load_format} does not load the checkpoint's own tensors: start vLLM with --load-format safetensors"
    quantization = getattr(model, "quantization", None)
    if quantization:
        return (
            f"quantised weights ({quantization}) are not the checkpoint's values: serve a model directory of bf16, f16 or "
            "f32 without --quantization"
        )
    parallel = vllm_config.parallel_config
    if getattr(parallel, "enable_eplb", False):
        return "EPLB moves experts between ranks while it serves: start vLLM without --enable-eplb"
    offload = getattr(vllm_config, "offload_config", None)
    uva = getattr(getattr(offload, "uva", None), "cpu_offload_gb", 0)
    prefetch = getattr(getattr(offload, "prefetch", None), "offload_group_size", 0)
    if uva or prefetch:
        return "offloaded weights move between host and device: start vLLM without --cpu-offload-gb and --offload-group-size"
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        settings = environment.get(variable, "").replace(" ", "").lower()
        if on_cuda(vllm_config) and ("expandable_segments:true" in settings or "backend:cudamallocasync" in settings):
            return f"the memory that {variable}={environment[variable]} makes cannot be shared by IPC handle: unset it"
    compilation = getattr(vllm_config.compilation_config, "inductor_compile_config", None) or {}
    if not on_cuda(vllm_config) and compilation.get("max_autotune"):
        return "max_autotune on the CPU compiles copies of the weights into the model: start vLLM without it"
    return None


def foreign_reason(loaded, checkpoint, files):
    """Why nothing of the checkpoint is among the names of what was loaded from `files`, or None."""
    if not loaded or not checkpoint.keys().isdisjoint(loaded):
        return None
    # Without a flag vLLM prefers Mistral's own format where a directory holds both.
    if files and all(os.path.basename(f).startswith("consolidated") for f in files):
        return (
            "vLLM loaded consolidated*.safetensors, which names tensors otherwise than the checkpoint: start it with "
            "--load-format safetensors --config-format hf"
        )
    return f"vLLM loaded tensors of other names ({min(loaded)}, …) than the checkpoint's ({min(checkpoint, default='none')}, …)"


def on_cuda(vllm_config):
    return getattr(getattr(vllm_config, "device_config", None), "device_type", "cuda") == "cuda"


def opaque_reason(parameter, on_cpu):
    """Why memory that vLLM reworked after loading is not the checkpoint's any more, and what helps."""
    if "expert" in parameter:
        if on_cpu:
            return "vLLM's CPU kernels repack expert weights after loading; on a GPU they can stay as they are"
        return "the MoE kernel repacks expert weights after loading: start vLLM with --moe-backend triton"
    if on_cpu and parameter.endswith("conv1d.weight"):
        return "vLLM's CPU kernels repack convolutions after loading on this processor"
    return "vLLM repacks it after loading"

"""Which engine a process belongs to, its place among the ranks, and where the files of its model are. No torch here."""

import os
import re


def model_directory(vllm_config):
    """vLLM serves a directory, or an id of the Hugging Face hub: then its files are in the cache, once they have been loaded. The id
    itself if they are not."""
    model = vllm_config.model_config.model
    if os.path.isdir(model):
        return os.path.abspath(model)
    try:
        from huggingface_hub import snapshot_download

        revision = getattr(vllm_config.model_config, "revision", None)
        cache = getattr(vllm_config.load_config, "download_dir", None)
        return snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True)
    except Exception:  # noqa: BLE001: not there, or not the hub's
        return model


def ranks(config, worker):
    """This worker's place among all that hold weights of the engine, and their number. Replicas of a dense model know nothing of
    each other: vLLM tells each that it is alone, and each is an engine. Those of a mixture of experts share the experts."""
    parallel = config.parallel_config
    replicas = getattr(parallel, "data_parallel_size", 1)
    replica = getattr(parallel, "data_parallel_rank", 0) if replicas > 1 else 0
    return replica * parallel.world_size + worker.rank, replicas * parallel.world_size


def instance(config):
    """What the ranks of one engine have in common, and no others. Replicas of a mixture of experts are one engine, and where Ray runs
    them vLLM puts a suffix behind the name of each; those of a dense model are several, and elsewhere have one name."""
    parallel = config.parallel_config
    name = getattr(config, "instance_id", "") or str(os.getppid())
    if getattr(parallel, "data_parallel_size", 1) > 1:
        return re.sub(r"_dp\d+$", "", name)
    # vLLM leaves a dense replica its index when it tells it that it is alone.
    replica = getattr(parallel, "data_parallel_index", 0)
    return f"{name}_dp{replica}" if replica and not name.endswith(f"_dp{replica}") else name

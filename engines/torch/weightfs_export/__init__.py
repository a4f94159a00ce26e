"""Shares the weights of a PyTorch model with weightfs.

    import weightfs_export
    publication = weightfs_export.publish(model, "/models/Qwen3-8B")
    print(publication.path)          # weightfs mount /models/Qwen3-8B /mnt/live --weights PATH

CUDA parameters are shared where they are, by one IPC handle for each allocation. CPU parameters move into shared memory
first. Nothing is copied after that: weightfs reads and writes the very bytes the model computes with.
"""

import importlib

__all__ = ["Publication", "Unexportable", "manifest_directory", "publish"]

_HOMES = {"Publication": "publication", "publish": "publication", "Unexportable": "memory", "manifest_directory": "manifest"}


def __getattr__(name):
    # On first use: the parts that need no torch can be had without it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)

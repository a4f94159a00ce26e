"""Shares the weights of a PyTorch model with weightfs.

    import weightfs_export
    publication = weightfs_export.publish(model, "/models/Qwen3-8B")
    print(publication.path)          # weightfs mount /models/Qwen3-8B /mnt/live --weights PATH

CUDA parameters are shared where they are, by one IPC handle for each allocation. CPU parameters move into shared memory
first. Nothing is copied after that: weightfs reads and writes the very bytes the model computes with.
"""

from .manifest import manifest_directory
from .memory import Unexportable
from .publication import Publication, publish

__all__ = ["Publication", "Unexportable", "manifest_directory", "publish"]

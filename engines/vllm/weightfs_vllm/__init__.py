"""vLLM plugin: the weights being served, as a weightfs manifest. `register` is the entry point `vllm.general_plugins`."""

from .plugin import register

__all__ = ["register"]

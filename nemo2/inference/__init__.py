"""Generation: caches of keys and values, how a model is called, sampling, and runs on a mesh."""

from .cache import KVCache

__all__ = ["KVCache"]

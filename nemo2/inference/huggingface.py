"""A ``KVCache`` in the shape in which models of transformers take one."""

from __future__ import annotations

from functools import cache as once
from typing import Any

from torch import Tensor

from ..errors import Nemo2Error
from .cache import KVCache

# What models with other states than keys and values ask of their cache.
_OTHER_STATES = (
    "get_conv_state",
    "update_conv_state",
    "get_recurrent_state",
    "update_recurrent_state",
    "update_indexer",
    "has_previous_state",
)
_ATTENTION = ("sdpa", "eager")  # the kinds of attention that take a mask of any shape


def as_transformers(cache: KVCache) -> Any:
    """Return ``cache`` as a ``Cache`` of transformers, whose layers all have its length.

    Its sizes are those of the whole model on every stage: no layer is asked, which may be
    another stage's. Sliding windows are in the masks that the model makes of them.
    """
    return _cache_class()(cache)


def check_attention(config: Any) -> None:
    """Raise Nemo2Error when the model's attention does not work with a cache of fixed length."""
    kind = getattr(config, "_attn_implementation", None) or "eager"
    if kind not in _ATTENTION:
        raise Nemo2Error(
            f"generate with a cache: attention {kind!r} takes no mask of a cache of fixed length\n"
            "  options: model.set_attn_implementation('sdpa') | use_cache=False"
        )


@once
def _cache_class() -> Any:
    import transformers

    class _FixedCache(transformers.Cache):
        def __init__(self, cache: KVCache) -> None:
            self.layers: list[Any] = []
            self.offloading, self.layer_class_to_replicate = False, None
            self.cache = cache

        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            return self.cache.update(key_states, value_states, layer_idx)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.cache.start

        def get_query_offset(self, layer_idx: int = 0) -> int:
            return self.cache.start

        def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
            return self.cache.length, 0

        def get_max_length(self, layer_idx: int | None = None) -> int:
            return self.cache.length

        get_max_cache_shape = get_max_length  # its name before

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Nemo2Error(
            "generate: this model keeps other states than keys and values, which have no fixed"
            " length\n  options: use_cache=False"
        )

    for name in _OTHER_STATES:
        setattr(_FixedCache, name, refuse)
    return _FixedCache

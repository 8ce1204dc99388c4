"""The keys and values of the tokens so far, in memory of a fixed length.

Every decode step then has the same shapes, so it is planned once. The memory belongs to the rank
that runs the layer: local heads of local layers, made when a layer first writes. The planning
run, which has shapes only, writes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import Nemo2Error


class _Slots:
    """The keys, or the values, of one layer: (batch, heads, length, size), zeros where unused."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = weakref.ref(cache)
        self.length = cache.length
        self.memory: Tensor | None = None

    def write(self, x: Tensor) -> Tensor:
        cache = self.cache()
        assert cache is not None
        if self.memory is None:
            shape = (*x.shape[:-2], self.length, x.shape[-1])
            self.memory = torch.zeros(shape, dtype=x.dtype, device=x.device)
        if cache.padding is not None:  # a query that sees nothing may give nan, and 0 * nan is nan
            x = x.masked_fill(cache.padding[:, None, :, None], 0.0)
        self.memory.narrow(-2, cache.start, x.shape[-2]).copy_(x)
        return self.memory


class KVCache:
    """The keys and values of earlier tokens, for a model that is called with new tokens only.

    ``nemo2.generate`` gives it to models whose ``forward`` has an argument ``cache``. Such a
    model adds its positions from ``positions``, and in attention replaces new keys and values by
    those of all tokens: ``k, v = cache.update(k, v, self)``, with ``attn_mask=cache.mask``.

    Attributes:
        positions: (batch, tokens), of each new token in its own sequence, from 0.
        mask: (batch, 1, tokens, length), boolean: which keys each new token attends to.
        length: of the keys and values that ``update`` returns.
        start: index of the first new token among them.
        padding: (batch, tokens), boolean: which new tokens are padding; None when none are.
    """

    positions: Tensor
    mask: Tensor

    def __init__(self, length: int) -> None:
        self.length, self.start = length, 0
        self.padding: Tensor | None = None
        self._slots: dict[tuple[Hashable, str], _Slots] = {}

    def update(self, keys: Tensor, values: Tensor, layer: Hashable) -> tuple[Tensor, Tensor]:
        """Keep the new tokens' keys and values; return those of all tokens.

        Args:
            keys, values: (batch, heads, tokens, size); the sizes and heads of the two may differ.
            layer: what tells this layer from others: its module, or its index.

        Returns:
            (batch, heads, length, size) each; the next update writes into them.

        Communication: none; the layout over ``tp`` is that of what is given.
        """
        return self._put(keys, layer, "keys"), self._put(values, layer, "values")

    def _put(self, x: Tensor, layer: Hashable, kind: str) -> Tensor:
        if x.ndim != 4:
            raise Nemo2Error(
                f"cache.update: {kind} of shape {tuple(x.shape)} are not (batch, heads, tokens,"
                " size)\n  options: x.unflatten(-1, (heads, size)).transpose(1, 2)"
            )
        slots = self._slots.setdefault((layer, kind), _Slots(self))
        return cache_update(x, weakref.ref(slots))  # weak: plans keep the arguments of calls


def cache_update(x: Tensor, slots: weakref.ref[_Slots]) -> Tensor:
    """Write ``x`` (batch, heads, tokens, size) into the memory of a layer; return all of it."""
    if has_torch_function((x,)):
        out: Tensor = handle_torch_function(cache_update, (x,), x, slots)
        return out
    kept = slots()
    assert kept is not None
    if x.is_meta:
        return x.new_empty((*x.shape[:-2], kept.length, x.shape[-1]))
    return kept.write(x)


def token_at(x: Tensor, index: Tensor) -> Tensor:
    """Return of each sequence of ``x`` (batch, tokens, size) the token ``index`` (batch)."""
    if has_torch_function((x, index)):
        out: Tensor = handle_torch_function(token_at, (x, index), x, index)
        return out
    return x.take_along_dim(index.view(-1, 1, 1), 1).squeeze(1)

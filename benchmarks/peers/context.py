"""Context parallelism by hand: keys and values gathered over ``cp``, causal work in balance.

Each rank holds one chunk from the head and one from the tail of the sequence, so that all have the
same share of the causal triangle; queries of a chunk see the keys before their end.
Source: Llama 3, section 3.3.2, arXiv 2407.21783.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives

from ..llama import Attention

# torch 2.13 renames it
_gather = getattr(collectives, "all_gather_single_autograd", collectives.all_gather_tensor_autograd)


class Cut:
    """What one rank of ``cp`` holds: chunks ``rank`` and ``2 * degree - 1 - rank``."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.degree, self.rank = group, group.size(), group.rank()
        self.own = self.rank, 2 * self.degree - 1 - self.rank
        held = [c for r in range(self.degree) for c in (r, 2 * self.degree - 1 - r)]
        self.order = [held.index(c) for c in range(2 * self.degree)]

    def of(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's two chunks of a whole tensor."""
        chunks = x.chunk(2 * self.degree, dim)
        return torch.cat([chunks[c] for c in self.own], dim)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """Return the tensor whose chunks the ranks hold, in the order of the sequence."""
        gathered = _gather(x.contiguous(), 0, self.group)
        parts = [half for one in gathered.chunk(self.degree, 0) for half in one.chunk(2, dim)]
        return torch.cat([parts[i] for i in self.order], dim)


class ContextAttention(Attention):
    cut: Cut

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.cut.whole(torch.stack([k, v]).flatten(0, 1), -2).unflatten(0, (2, -1))
        parts = []
        for chunk, one in zip(self.cut.own, q.chunk(2, -2), strict=True):
            size = one.shape[-2]
            end = (chunk + 1) * size
            parts.append(_last_rows(one, k[..., :end, :], v[..., :end, :]))
        return torch.cat(parts, -2)


def _last_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention of the last rows of a sequence to its keys.

    The flash kernel is called by its name on GPUs: it aligns its mask so, but what torch has for
    it, ``causal_lower_right``, cannot be compiled.
    """
    if q.is_cuda:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        return out
    rows, columns = q.shape[-2], k.shape[-2]
    seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)


def split_attention(model: nn.Module, cut: Cut) -> None:
    """Let the attention of ``model`` run on one rank's chunks."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = ContextAttention
            module.cut = cut

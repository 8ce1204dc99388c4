"""Attention of some chunks of a sequence's queries over its keys, each up to its own end.

What a rank does that holds all keys, but of the queries only chunks from the start and the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import kernels


def prefixes_forward(
    q: Tensor, k: Tensor, v: Tensor, ends: Sequence[int], causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return attention and the log-sum-exp of each row (no gradient).

    Args:
        q: (..., heads, m, d), equal chunks one after the other; k, v: (..., kv heads, s, d).
        ends: of the keys that each chunk may see; with ``causal`` its last row sees the last.
    """
    out = kernels.result_for(q, v, q.dtype)
    lse = kernels.lse_for(q, None)
    for rows, end in _chunks(q, ends):
        part = q[..., rows, :], k[..., :end, :], v[..., :end, :]
        out[..., rows, :], lse[..., rows] = kernels.forward(*part, None, causal, scale)
    return out, lse


def prefixes_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: Sequence[int],
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
    for rows, end in _chunks(q, ends):
        part = grad[..., rows, :], q[..., rows, :], k[..., :end, :], v[..., :end, :]
        made = kernels.backward(*part, out[..., rows, :], lse[..., rows], None, causal, scale)
        dq[..., rows, :] = made[0]
        dk[..., :end, :] += made[1]
        dv[..., :end, :] += made[2]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _chunks(q: Tensor, ends: Sequence[int]) -> Iterator[tuple[slice, int]]:
    size = q.shape[-2] // len(ends)
    return ((slice(i * size, (i + 1) * size), end) for i, end in enumerate(ends))

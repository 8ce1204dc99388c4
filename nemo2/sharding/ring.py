"""Attention over a split sequence whose keys and values pass from rank to rank.

Scores of two parts need no work when the keys lie after the queries under a causal mask, a
causal mask when the parts are the same, and none when the keys lie before. Outputs are merged by
their log-sum-exp. What travels does so while kernels run.
Source: arXiv 2310.01889; the balanced order of parts: arXiv 2311.09431.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import kernels
from .collectives import Axis


@dataclass(frozen=True)
class Attention:
    """What one call asks for.

    Attributes:
        causal: queries see keys up to their own position; then there are as many, and no mask.
        mask: of the whole sequence, broadcastable to (..., s, s): boolean (True may look) or
            added to the scores; or None.
        scale: of the scores; None is 1 / sqrt(size of a head).
    """

    causal: bool
    mask: Tensor | None
    scale: float | None


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, what: Attention, axis: Axis
) -> tuple[Tensor, Tensor]:
    """Return attention and the log-sum-exp of each row over all keys (no gradient)."""
    lse = kernels.lse_for(q, what.mask)
    out = kernels.result_for(q, v, lse.dtype)
    if what.mask is not None:  # else the first pair, of this rank's own parts, has all rows
        out.zero_()
        lse.fill_(-math.inf)
    moving = _packed(k, v)
    for turn in range(axis.degree):
        other = (axis.rank - turn) % axis.degree
        coming = _start(moving, axis) if turn < axis.degree - 1 else None
        kj, vj = _unpacked(moving, k, v)
        for pair in _pairs(what, axis, other, q.shape[-2], k.shape[-2]):
            part, part_lse = kernels.forward(
                _rows(q, pair.rows),
                _rows(kj, pair.columns),
                _rows(vj, pair.columns),
                pair.mask,
                pair.causal,
                what.scale,
            )
            if what.mask is None and turn == 0:
                out.copy_(part)
                lse.copy_(part_lse)
            else:
                kernels.merge(_rows(out, pair.rows), lse[..., pair.rows], part, part_lse)
        moving = coming.wait() if coming is not None else moving
    return out.to(q.dtype), lse


def ring_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    what: Attention,
    axis: Axis,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of this rank's queries, keys and values.

    Those of keys and values travel with them, and home. Each rank computes its share before it
    waits for the sum of the others'.
    """
    dq = torch.zeros_like(q, dtype=lse.dtype)
    moving = _packed(k, v)
    sums, summed = torch.zeros_like(moving, dtype=lse.dtype), None
    for turn in range(axis.degree):
        other = (axis.rank - turn) % axis.degree
        coming = _start(moving, axis) if turn < axis.degree - 1 else None
        kj, vj = _unpacked(moving, k, v)
        made = []
        for pair in _pairs(what, axis, other, q.shape[-2], k.shape[-2]):
            mine, *theirs = kernels.backward(
                _rows(grad, pair.rows),
                _rows(q, pair.rows),
                _rows(kj, pair.columns),
                _rows(vj, pair.columns),
                _rows(out, pair.rows),
                lse[..., pair.rows],
                pair.mask,
                pair.causal,
                what.scale,
            )
            _rows(dq, pair.rows).add_(mine)
            made.append((pair.columns, theirs))
        sums = summed.wait() if summed is not None else sums
        for columns, theirs in made:
            for total, part in zip(_unpacked(sums, k, v), theirs, strict=True):
                _rows(total, columns).add_(part)
        summed = _start(sums, axis)
        moving = coming.wait() if coming is not None else moving
    assert summed is not None
    dk, dv = _unpacked(summed.wait(), k, v)
    return dq.to(q.dtype), dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


def _packed(k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([k.reshape(-1), v.reshape(-1)])


def _unpacked(moving: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    flat = moving.reshape(-1)
    return flat[: k.numel()].view(k.shape), flat[k.numel() :].view(v.shape)


@dataclass
class _Transfer:
    """Tensors on their way: what is sent must live until it has arrived."""

    sent: Tensor
    arriving: Tensor
    requests: list[Any]

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.arriving


def _start(x: Tensor, axis: Axis) -> _Transfer:
    """Send ``x`` to the next rank and receive from the one before."""
    arriving = torch.empty_like(x)
    assert axis.group is not None
    ahead = dist.get_global_rank(axis.group, (axis.rank + 1) % axis.degree)
    behind = dist.get_global_rank(axis.group, (axis.rank - 1) % axis.degree)
    operations = [
        dist.P2POp(dist.isend, x, ahead, axis.group),
        dist.P2POp(dist.irecv, arriving, behind, axis.group),
    ]
    return _Transfer(x, arriving, dist.batch_isend_irecv(operations))


@dataclass(frozen=True)
class _Pair:
    """Queries of one part against keys of one part: local offsets, and what of it counts."""

    rows: slice
    columns: slice
    causal: bool
    mask: Tensor | None


def _pairs(what: Attention, axis: Axis, other: int, rows: int, columns: int) -> Iterator[_Pair]:
    """Yield the pairs of this rank's query parts and ``other``'s key parts that have work.

    Args:
        rows, columns: how many queries and keys a rank holds.
    """
    mine, theirs = axis.parts(axis.rank), axis.parts(other)
    m, n = rows // len(mine), columns // len(theirs)
    if what.mask is not None:
        for i, row in enumerate(mine):
            for j, column in enumerate(theirs):
                mask = _columns_of_mask(rows_of_mask(what.mask, row, m), column, n)
                yield _Pair(slice(i * m, i * m + m), slice(j * n, j * n + n), False, mask)
    elif not what.causal or axis.rank == other:  # local parts are in order: one causal square
        yield _Pair(slice(0, rows), slice(0, columns), what.causal, None)
    elif axis.rank > other:  # of the other's parts only the first lies before mine
        yield _Pair(slice(0, rows), slice(0, n), False, None)
    elif axis.balanced:  # only my last part lies after the other's
        yield _Pair(slice(m, rows), slice(0, columns), False, None)


def _columns_of_mask(mask: Tensor, column: int, n: int) -> Tensor:
    """Return the columns of the mask for one part of keys."""
    return mask.narrow(-1, column * n, n) if mask.shape[-1] > 1 else mask


def rows_of_mask(mask: Tensor, row: int, n: int) -> Tensor:
    """Return the rows of the mask for one part of queries."""
    return mask.narrow(-2, row * n, n) if mask.ndim > 1 and mask.shape[-2] > 1 else mask


def _rows(x: Tensor, rows: slice) -> Tensor:
    return x[..., rows, :]

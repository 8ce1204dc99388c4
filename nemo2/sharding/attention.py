"""Attention over a sequence that is split over ``cp``: ring, all-gather and Ulysses.

Each rank holds its part of the queries, keys and values of the same sequence, in the order of
``Axis.parts`` (balanced: one part from the start, its mirror image from the end). All methods
compute exact attention; they differ in what travels. Masks are given for the whole sequence.

Scores of two parts need no work when the keys lie after the queries under a causal mask, a
causal mask when the parts are the same, and none when the keys lie before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import collectives, islands, kernels, tracing
from .collectives import Axis


@dataclass(frozen=True)
class Attention:
    """What one call asks for.

    Attributes:
        causal: queries see keys up to their own position; then there is no mask.
        mask: of the whole sequence, broadcastable to (..., s, s): boolean (True may look) or
            added to the scores; or None.
        scale: of the scores; None is 1 / sqrt(size of a head).
    """

    causal: bool
    mask: Tensor | None
    scale: float | None


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    axis: Axis,
    method: str,
) -> Tensor:
    """Return attention of this rank's queries over all keys; the signature of torch's.

    Args:
        q: (..., heads, s / cp, d); k, v: (..., kv heads, s / cp, d), this rank's parts.
        method: ``"ring"``, ``"all_gather"`` or ``"ulysses"``.

    Returns:
        (..., heads, s / cp, d), split as ``q``.

    Communication, with n = cp and sizes of this rank's k and v together:
        ring: forward n - 1 exchanges of k and v with the neighbours; backward n - 1 of k and v,
        and n of their gradients. all_gather: forward one all-gather of k and v together,
        backward one reduce-scatter. ulysses: forward one all-to-all each of q, k, v and the
        output; backward the same.
    Source: ring: arXiv 2310.01889; balanced order: arXiv 2311.09431; Ulysses: arXiv 2309.14509.
    """
    what = Attention(is_causal, attn_mask, scale)
    if method == "ulysses":
        return _ulysses(q, k, v, what, axis)
    if k.shape[-3] != q.shape[-3]:
        ratio = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(ratio, -3), v.repeat_interleave(ratio, -3)
    if method == "all_gather":
        return _gathered(q, k, v, what, axis)
    out: Tensor = _Ring.apply(q, k, v, what, axis)  # type: ignore[no-untyped-call]
    return out


# --- parts of the sequence -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """Queries of one part against keys of one part: local offsets, and what of it counts."""

    rows: slice
    columns: slice
    causal: bool
    mask: Tensor | None


def _pairs(what: Attention, axis: Axis, rank: int, other: int, size: int) -> Iterator[_Pair]:
    """Yield the pairs of ``rank``'s query parts and ``other``'s key parts that have work."""
    mine, theirs = axis.parts(rank), axis.parts(other)
    n, everything = size // len(mine), slice(0, size)
    if what.mask is not None:
        for i, row in enumerate(mine):
            for j, column in enumerate(theirs):
                mask = _mask_of(what.mask, row, column, n)
                yield _Pair(slice(i * n, i * n + n), slice(j * n, j * n + n), False, mask)
    elif not what.causal or rank == other:  # local parts are in order: one causal square
        yield _Pair(everything, everything, what.causal, None)
    elif rank > other:  # of the other's parts only the first lies before mine
        yield _Pair(everything, slice(0, n), False, None)
    elif axis.balanced:  # only my last part lies after the other's
        yield _Pair(slice(n, size), everything, False, None)


def _mask_of(mask: Tensor, row: int, column: int, n: int) -> Tensor:
    """Return the block of the mask for one part of queries and one of keys."""
    mask = _rows_of_mask(mask, row, n)
    return mask.narrow(-1, column * n, n) if mask.shape[-1] > 1 else mask


def _rows_of_mask(mask: Tensor, row: int, n: int) -> Tensor:
    """Return the rows of the mask for one part of queries."""
    return mask.narrow(-2, row * n, n) if mask.ndim > 1 and mask.shape[-2] > 1 else mask


def _rows(x: Tensor, rows: slice) -> Tensor:
    return x[..., rows, :]


# --- ring ----------------------------------------------------------------------------------------


class _Ring(torch.autograd.Function):
    """Keys and values pass from rank to rank; outputs are merged by their log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, what: Attention, axis: Axis) -> Tensor:
        if tracing.current():  # one operation of the graph: a compiler knows no sends
            out, lse = islands.ring_forward(q, k, v, what, axis)
        else:
            out, lse = ring_forward(q, k, v, what, axis)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.what, ctx.axis = what, axis
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        run = islands.ring_backward if tracing.current() else ring_backward
        return (*run(grad, q, k, v, out, lse, ctx.what, ctx.axis), None, None)


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, what: Attention, axis: Axis
) -> tuple[Tensor, Tensor]:
    """Return attention and the log-sum-exp of each row over all keys (no gradient)."""
    kind = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=kind)
    lse = q.new_full(q.shape[:-1], -math.inf, dtype=kind)
    moving = _packed(k, v)
    for turn in range(axis.degree):
        other = (axis.rank - turn) % axis.degree
        coming = _start(moving, axis) if turn < axis.degree - 1 else None
        kj, vj = _unpacked(moving, k, v)
        for pair in _pairs(what, axis, axis.rank, other, q.shape[-2]):
            part, part_lse = kernels.forward(
                _rows(q, pair.rows),
                _rows(kj, pair.columns),
                _rows(vj, pair.columns),
                pair.mask,
                pair.causal,
                what.scale,
            )
            _merge(_rows(out, pair.rows), lse[..., pair.rows], part, part_lse)
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
    """Return the gradients of this rank's queries, keys and values."""
    grad = grad.contiguous()
    dq = torch.zeros_like(q, dtype=lse.dtype)
    moving = _packed(k, v)
    sums = torch.zeros_like(moving, dtype=lse.dtype)
    for turn in range(axis.degree):
        other = (axis.rank - turn) % axis.degree
        coming = _start(moving, axis) if turn < axis.degree - 1 else None
        kj, vj = _unpacked(moving, k, v)
        dk, dv = _unpacked(sums, k, v)
        for pair in _pairs(what, axis, axis.rank, other, q.shape[-2]):
            parts = kernels.backward(
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
            _rows(dq, pair.rows).add_(parts[0])
            _rows(dk, pair.columns).add_(parts[1])
            _rows(dv, pair.columns).add_(parts[2])
        sums = _start(sums, axis).wait()  # the gradients travel with their keys, and home
        moving = coming.wait() if coming is not None else moving
    dk, dv = _unpacked(sums, k, v)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _packed(k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([k.reshape(-1), v.reshape(-1)])


def _unpacked(moving: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    flat = moving.reshape(-1)
    return flat[: k.numel()].view(k.shape), flat[k.numel() :].view(v.shape)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add one part of the keys to what was computed of the others, in place."""
    both = torch.logaddexp(lse, part_lse.to(lse.dtype))
    nothing = torch.isneginf(both)  # a row that may look at no key yet
    old = torch.where(nothing, 0, (lse - both).exp())
    new = torch.where(nothing, 0, (part_lse - both).exp())
    out.mul_(old.unsqueeze(-1)).add_(part.to(out.dtype) * new.unsqueeze(-1))
    lse.copy_(both)


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


# --- all-gather ----------------------------------------------------------------------------------


def _gathered(q: Tensor, k: Tensor, v: Tensor, what: Attention, axis: Axis) -> Tensor:
    """All keys and values on every rank, each part of the queries over those that it may see."""
    if k.shape == v.shape:
        k, v = collectives.gather(torch.stack([k, v]), k.ndim - 1, axis).unbind()
    else:
        k, v = (collectives.gather(x, x.ndim - 2, axis) for x in (k, v))
    mine = axis.parts(axis.rank)
    n = q.shape[-2] // len(mine)
    outs = []
    for i, row in enumerate(mine):
        own = q.narrow(-2, i * n, n)
        mask = None if what.mask is None else _rows_of_mask(what.mask, row, n)
        seen = (row + 1) * n if what.causal else k.shape[-2]
        outs.append(
            kernels.attention(
                own, k.narrow(-2, 0, seen), v.narrow(-2, 0, seen), mask, what.causal, what.scale
            )
        )
    return torch.cat(outs, -2)


# --- Ulysses -------------------------------------------------------------------------------------


def _ulysses(q: Tensor, k: Tensor, v: Tensor, what: Attention, axis: Axis) -> Tensor:
    """Split heads instead of the sequence for the time of the attention itself."""
    heads = q.shape[-3]
    if k.shape[-3] % axis.degree:
        ratio = heads // k.shape[-3]
        k, v = k.repeat_interleave(ratio, -3), v.repeat_interleave(ratio, -3)
    q, k, v = (_Exchange.apply(x, axis, True) for x in (q, k, v))  # type: ignore[no-untyped-call]
    mask = what.mask
    if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1:
        own = heads // axis.degree
        mask = mask.narrow(-3, axis.rank * own, own)
    out = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        is_causal=what.causal,
        scale=what.scale,
        enable_gqa=k.shape[-3] != q.shape[-3],
    )
    result: Tensor = _Exchange.apply(out, axis, False)  # type: ignore[no-untyped-call]
    return result


class _Exchange(torch.autograd.Function):
    """All-to-all between heads split over the axis and the sequence split over it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, to_heads: bool) -> Tensor:
        ctx.axis, ctx.to_heads = axis, to_heads
        return _exchange(x, axis, to_heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grad, ctx.axis, not ctx.to_heads), None, None


def _exchange(x: Tensor, axis: Axis, to_heads: bool) -> Tensor:
    """Return (..., heads / n, s, d) of (..., heads, s / n, d), or back."""
    n = axis.degree
    if to_heads:
        sent = x.reshape(*x.shape[:-3], n, -1, *x.shape[-2:]).movedim(-4, 0).contiguous()
        got = _all_to_all(sent, axis)
        pieces = [p for part in got.unbind(0) for p in part.chunk(len(axis.parts(0)), -2)]
        return collectives.join(pieces, -2, axis)
    pieces = list(x.chunk(n * len(axis.parts(0)), -2))
    sent = torch.stack(
        [torch.cat([pieces[i] for i in axis.parts(rank)], -2) for rank in range(n)]
    ).contiguous()
    got = _all_to_all(sent, axis)
    return got.movedim(0, -4).flatten(-4, -3)


def _all_to_all(sent: Tensor, axis: Axis) -> Tensor:
    if tracing.current():
        return tracing.all_to_all(sent, axis.group, axis.degree)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=axis.group)
    return got

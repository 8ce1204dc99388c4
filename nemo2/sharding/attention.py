"""Attention over a sequence that is split over ``cp``: ring, all-gather and Ulysses.

Each rank holds its part of the queries, keys and values of the same sequence, in the order of
``Axis.parts`` (balanced: one part from the start, its mirror image from the end). All methods
compute exact attention; they differ in what travels. Masks are given for the whole sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import collectives, islands, kernels, tracing
from .collectives import Axis
from .prefixes import prefixes_backward, prefixes_forward
from .ring import Attention, ring_backward, ring_forward, rows_of_mask


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
    if is_causal and q.shape[-2] != k.shape[-2]:  # torch's mask then starts at the upper left
        sizes = (x.shape[-2] * axis.degree for x in (q, k))
        seen = torch.ones(*sizes, dtype=torch.bool, device=q.device).tril()
        is_causal, attn_mask = False, seen
    what = Attention(is_causal, attn_mask, scale)
    if method == "ulysses":
        return _ulysses(q, k, v, what, axis)
    if method == "all_gather":
        return _gathered(q, k, v, what, axis)
    out: Tensor = _Ring.apply(q, k, v, what, axis)  # type: ignore[no-untyped-call]
    return out


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


def _gathered(q: Tensor, k: Tensor, v: Tensor, what: Attention, axis: Axis) -> Tensor:
    """All keys and values on every rank, each part of the queries over those that it may see."""
    if k.shape == v.shape:
        k, v = collectives.gather(torch.stack([k, v]), k.ndim - 1, axis).unbind()
    else:
        k, v = (collectives.gather(x, x.ndim - 2, axis) for x in (k, v))
    mine = axis.parts(axis.rank)
    n = q.shape[-2] // len(mine)
    if what.mask is not None:  # torch has no efficient kernel for a mask and fewer heads
        k, v = kernels.as_many_heads(k, q), kernels.as_many_heads(v, q)
        masks = [rows_of_mask(what.mask, row, n) for row in mine]
        parts = zip(q.chunk(len(mine), -2), masks, strict=True)
        return torch.cat([_attention(own, k, v, mask, what) for own, mask in parts], -2)
    ends = [(row + 1) * n for row in mine] if what.causal else [k.shape[-2]]
    out: Tensor = _Prefixes.apply(q, k, v, ends, what)  # type: ignore[no-untyped-call]
    return out


class _Prefixes(torch.autograd.Function):
    """Parts of the queries, each over the keys up to its own end."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: list[int], what: Attention
    ) -> Tensor:
        run = islands.prefixes_forward if tracing.current() else prefixes_forward
        out, lse = run(q, k, v, ends, what.causal, what.scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.what = ends, what.causal, what.scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = islands.prefixes_backward if tracing.current() else prefixes_backward
        return (*run(grad, *ctx.saved_tensors, *ctx.what), None, None)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, what: Attention) -> Tensor:
    """Return attention of whole sequences, differentiable by torch."""
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        is_causal=what.causal,
        scale=what.scale,
        enable_gqa=k.shape[-3] != q.shape[-3],
    )


# --- Ulysses -------------------------------------------------------------------------------------


def _ulysses(q: Tensor, k: Tensor, v: Tensor, what: Attention, axis: Axis) -> Tensor:
    """Split heads instead of the sequence for the time of the attention itself."""
    heads = q.shape[-3]
    if k.shape[-3] % axis.degree:
        k, v = kernels.as_many_heads(k, q), kernels.as_many_heads(v, q)
    q, k, v = (_Exchange.apply(x, axis, True) for x in (q, k, v))  # type: ignore[no-untyped-call]
    mask = what.mask
    if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1:
        own = heads // axis.degree
        mask = mask.narrow(-3, axis.rank * own, own)
    out = _attention(q, k, v, mask, what)
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

"""The collectives that a plan may ask for, as autograd functions on local tensors.

Which of them runs where is decided in ``rules.py``; this file only executes.
A value is *replicated* (same value on all ranks of the axis, with the same and
complete gradient) or *split* along one dim. The four functions below are the only
ways from one to the other, and each states its communication in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames the function and deprecates the old name.
gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Axis:
    """One mesh axis as seen by this rank: its group, this rank's coordinate, its degree.

    ``varied`` remembers the last tensor that entered a region split over this axis.
    """

    name: str
    group: dist.ProcessGroup | None
    rank: int
    degree: int
    varied: list[Any] = field(default_factory=list, compare=False, repr=False)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of ``x`` over ``axis`` in a new tensor (no gradient)."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=axis.group)
    return out


def all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return the shards of all ranks of ``axis`` concatenated along ``dim`` (no gradient)."""
    x = x.movedim(dim, 0).contiguous()
    out = x.new_empty((x.shape[0] * axis.degree, *x.shape[1:]))
    gather_single(out, x, group=axis.group)
    return out.movedim(0, dim).contiguous()


def take(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return this rank's equal slice of ``x`` along ``dim``."""
    size = x.shape[dim] // axis.degree
    return x.narrow(dim, axis.rank * size, size)


class _Vary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        else:
            ctx.mark_dirty(x)
        dist.all_reduce(x, group=axis.group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return all_gather(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return take(grad, ctx.dim, ctx.axis).contiguous(), None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return take(x, dim, axis).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.dim, ctx.axis), None, None


def _apply(function: Any, *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out


def vary(x: Tensor, axis: Axis) -> Tensor:
    """Let a replicated tensor enter a computation that differs over ``axis``.

    Communication: forward none; backward one all-reduce of ``x``'s size over ``axis``.
    Source: Megatron-LM's ``f``, arXiv 1909.08053, section 3.
    """
    return _apply(_Vary, x, axis) if x.requires_grad else x


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum partial results over ``axis``; the result is replicated. May reuse ``x``'s memory.

    Communication: forward one all-reduce of ``x``'s size over ``axis``; backward none.
    Source: Megatron-LM's ``g``, arXiv 1909.08053, section 3.
    """
    return _apply(_Reduce, x, axis)


def gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Turn a tensor split along ``dim`` into a replicated one.

    Communication: forward one all-gather over ``axis``; backward none (a slice).
    """
    return _apply(_Gather, x, dim, axis)


def split(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Turn a replicated tensor into one split along ``dim``.

    Communication: forward none (a slice); backward one all-gather over ``axis``.
    """
    if not x.requires_grad:
        return take(x, dim, axis)
    return _apply(_Take, x, dim, axis)

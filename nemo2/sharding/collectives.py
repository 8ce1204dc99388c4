"""The collectives that a plan may ask for, as autograd functions on local tensors.

Which of them runs where is decided in ``rules.py``; this file only executes.
A value is *replicated* over an axis or *split* along one dim. The functions below are the only
ways from one to the other, and each states its communication in both directions.

What the gradient of a replicated value means differs by axis. Over ``tp`` it is complete and the
same on all ranks. Over ``cp`` (``Axis.summed``) each rank holds a part, and the parts sum up to it:
parameters are summed over ``cp`` with ``dp`` at the end of a step, so what enters a split region
there needs no collective in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import tracing
from .layout import Layout

if TYPE_CHECKING:
    from .kept import Kept

# torch 2.13 renames the functions and deprecates the old names.
gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Axis:
    """One mesh axis as seen by this rank: its group, this rank's coordinate, its degree.

    ``balanced``: each rank holds one part from the start and its mirror image from the end of a
    split dim, so that causal attention gives every rank the same work. ``summed``: see above.
    ``entered`` remembers the last tensor that entered a region split over this axis; ``kept``
    holds, while a block runs that is checkpointed selectively, the sums that it keeps.
    """

    name: str
    group: dist.ProcessGroup | None
    rank: int
    degree: int
    balanced: bool = False
    summed: bool = False
    entered: list[Any] = field(default_factory=list, compare=False, repr=False)
    kept: list[Kept] = field(default_factory=list, compare=False, repr=False)

    def parts(self, rank: int) -> tuple[int, ...]:
        """Return which of the equal parts of a split dim ``rank`` holds, in its order."""
        return (rank, 2 * self.degree - 1 - rank) if self.balanced else (rank,)

    @property
    def order(self) -> list[int]:
        """The parts that all ranks hold, one rank after the other."""
        return [part for rank in range(self.degree) for part in self.parts(rank)]


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of ``x`` over ``axis`` in a new tensor (no gradient)."""
    if tracing.current():
        return tracing.all_reduce(x, axis.group)
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=axis.group)
    return out


def all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return the parts of all ranks of ``axis`` joined along ``dim`` (no gradient)."""
    x = x.movedim(dim, 0).contiguous()
    if tracing.current():
        out = tracing.all_gather(x, axis.group, axis.degree)
    else:
        out = x.new_empty((x.shape[0] * axis.degree, *x.shape[1:]))
        gather_single(out, x, group=axis.group)
    if axis.balanced:
        out = join(out.chunk(2 * axis.degree), 0, axis)
    return out.movedim(0, dim).contiguous()


def join(pieces: Sequence[Tensor], dim: int, axis: Axis) -> Tensor:
    """Return the parts that the ranks hold, given one rank after the other, in their own order."""
    order = axis.order
    return torch.cat([pieces[order.index(i)] for i in range(len(order))], dim)


def reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return this rank's part along ``dim`` of the sum of ``x`` over ``axis`` (no gradient)."""
    x = x.movedim(dim, 0)
    if axis.balanced:
        pieces = x.chunk(2 * axis.degree)
        x = torch.cat([pieces[i] for i in axis.order])
    x = x.contiguous()
    if tracing.current():
        out = tracing.reduce_scatter(x, axis.group, axis.degree)
    else:
        out = x.new_empty((x.shape[0] // axis.degree, *x.shape[1:]))
        scatter_single(out, x, group=axis.group)
    return out.movedim(0, dim).contiguous()


def take(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return this rank's part of ``x`` along ``dim``; a view where it is one range."""
    parts = axis.parts(axis.rank)
    size = x.shape[dim] // (axis.degree * len(parts))
    pieces = [x.narrow(dim, i * size, size) for i in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _put(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return zeros of the whole size with ``x`` in this rank's part: the transpose of ``take``."""
    parts = axis.parts(axis.rank)
    size = x.shape[dim] // len(parts)
    shape = [s * axis.degree if d == dim else s for d, s in enumerate(x.shape)]
    out = x.new_zeros(shape)
    for n, i in enumerate(parts):
        out.narrow(dim, i * size, size).copy_(x.narrow(dim, n * size, size))
    return out


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
        ctx.axis = axis
        if tracing.current():
            return tracing.all_reduce(x, axis.group)
        if not x.is_contiguous():
            x = x.contiguous()
        else:
            ctx.mark_dirty(x)
        dist.all_reduce(x, group=axis.group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (all_reduce(grad, ctx.axis) if ctx.axis.summed else grad), None


class _Gather(torch.autograd.Function):
    """All-gather; ``varies`` when the ranks go on to do different work with the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis, varies: bool) -> Tensor:
        ctx.dim, ctx.axis, ctx.varies = dim, axis, varies
        return all_gather(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.varies:
            return reduce_scatter(grad, ctx.dim, ctx.axis), None, None, None
        return take(grad, ctx.dim, ctx.axis).contiguous(), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return reduce_scatter(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.dim, ctx.axis), None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return take(x, dim, axis).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.axis.summed:
            return _put(grad, ctx.dim, ctx.axis), None, None
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

    Communication: forward one all-reduce of ``x``'s size over ``axis``; backward none, or
    the same over an axis whose gradients are summed.
    Source: Megatron-LM's ``g``, arXiv 1909.08053, section 3.
    """
    return _apply(_Reduce, x, axis)


def scatter(x: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """Sum partial results over ``axis``; the result is split as ``layout``, which has no cut.

    Communication: forward one reduce-scatter of ``x``'s size over ``axis``; backward one
    all-gather.
    Source: arXiv 2205.05198, section 4.2.2.
    """
    assert layout.dim is not None
    if layout.plain:
        return _apply(_Scatter, x, layout.dim, axis)
    dim = layout.dim + 1
    return _apply(_Scatter, outer_apart(x, layout), dim, axis).flatten(dim - 1, dim)


def gather(x: Tensor, layout: Layout | int, axis: Axis, *, varies: bool = False) -> Tensor:
    """Turn a split tensor into a replicated one, which ``varies`` if each rank uses it otherwise.

    Communication: forward one all-gather over ``axis`` (one for each of unequal parts);
    backward none (a slice), or one reduce-scatter when it ``varies`` or over an axis whose
    gradients are summed.
    """
    layout = Layout(layout) if isinstance(layout, int) else layout
    assert layout.dim is not None
    varies = varies or axis.summed
    if layout.plain:
        return _apply(_Gather, x, layout.dim, axis, varies)
    if layout.parts:
        local = x.split_with_sizes([p // axis.degree for p in layout.parts], layout.dim)
        whole = [_apply(_Gather, p, layout.dim, axis, varies) for p in local]
        return torch.cat(whole, layout.dim)
    dim = layout.dim + 1
    x = _apply(_Gather, outer_apart(x, layout), dim, axis, varies)
    before, after = layout.cut
    return x.narrow(dim, before, x.shape[dim] - before - after).flatten(dim - 1, dim)


def split(x: Tensor, layout: Layout | int, axis: Axis) -> Tensor:
    """Turn a replicated tensor into one split as ``layout``.

    Communication: forward none (a slice); backward one all-gather over ``axis``, or none
    over an axis whose gradients are summed.
    """
    layout = Layout(layout) if isinstance(layout, int) else layout
    assert layout.dim is not None
    if layout.plain:
        return _split(x, layout.dim, axis)
    if layout.parts:
        whole = x.split_with_sizes(layout.parts, layout.dim)
        return torch.cat([_split(p, layout.dim, axis) for p in whole], layout.dim)
    dim = layout.dim + 1
    x = padded(outer_apart(x, layout), dim, layout.cut)
    return _split(x, dim, axis).flatten(dim - 1, dim)


def _split(x: Tensor, dim: int, axis: Axis) -> Tensor:
    return _apply(_Take, x, dim, axis) if x.requires_grad else take(x, dim, axis)


def outer_apart(x: Tensor, layout: Layout) -> Tensor:
    """Return ``x`` with the flattened dim of ``layout`` as two: the outer one and the split one."""
    assert layout.dim is not None
    return x.reshape(*x.shape[: layout.dim], layout.outer, -1, *x.shape[layout.dim + 1 :])


def padded(x: Tensor, dim: int, cut: tuple[int, int], value: float = 0.0) -> Tensor:
    """Return ``x`` with ``cut`` elements of ``value`` before and after it along ``dim``."""
    before, after = cut
    if not before and not after:
        return x

    def fill(n: int) -> Tensor:
        return x.new_full([n if d == dim else s for d, s in enumerate(x.shape)], value)

    return torch.cat([fill(before), x, fill(after)], dim)

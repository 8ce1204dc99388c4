"""``F.cross_entropy`` on logits whose classes are split over an axis, without gathering them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo2.errors import ShardingError

from .collectives import Axis, all_reduce, gather, outer_apart, padded, reduce, take
from .layout import Layout
from .modes import suspended


@dataclass(frozen=True)
class _Classes:
    """Which classes this rank holds along ``dim``, and how per-token values are summed."""

    group: dist.ProcessGroup | None
    rank: int
    degree: int
    total: int
    dim: int

    @property
    def start(self) -> int:
        return self.rank * (self.total // self.degree)

    @property
    def count(self) -> int:
        return self.total // self.degree

    def all_reduce(self, value: Tensor, op: Any) -> Tensor:
        if self.degree > 1:
            dist.all_reduce(value, op, group=self.group)
        return value


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None,
    rank: int,
    degree: int,
    vocab_size: int,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    tokens: Sequence[tuple[Axis, Layout]] = (),
    wide: bool = False,
    fused: bool = False,
) -> Tensor:
    """Return what ``F.cross_entropy`` returns on the gathered logits, the same on every rank.

    The gradient is that of this rank's classes. Computed in float32 (float64 for float64), in
    pieces; the logits as they are given, not probabilities or a wider copy, are kept for backward.

    Args:
        logits: local shape (C / degree), (N, C / degree) or (N, C / degree, d1, ...), any float
            dtype: classes [rank * C / degree, (rank + 1) * C / degree).
        target: global class indices, shape of the logits without the class dim, the same on all
            ranks of the group.
        group: ranks that hold the other classes; not used if ``degree`` is 1.
        rank: this rank's coordinate in the group.
        degree: number of ranks that share the classes.
        vocab_size: C, the global number of classes.
        weight: weight of each class, global shape (C), the same on all ranks.
        ignore_index: targets of this value count neither in the loss nor in the mean.
        reduction: "mean" (over weights of targets that count), "sum" or "none".
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        tokens: axes over which the tokens are split, with the target's layout; then the logits
            are those of this rank's tokens, and the target is that of all tokens.
        wide: the loss is that of ``logits.float()``: float32, whatever the logits are.
        fused: compile what runs over all logits, which it then reads twice and writes once (their
            gradient). Not done with label smoothing.

    Returns:
        a replicated loss: zero-dimensional, or of the target's shape for "none".

    Communication: forward two all-reduces, of 1 and of 2 (3 with smoothing) floats per token,
    if classes are split; for each axis of ``tokens`` one of a scalar (two for "mean", one
    all-gather of the losses for "none"). Backward: see ``collectives.reduce``.
    Raises: ShardingError for probabilities as target, or shapes that do not fit together.
    """
    classes = _Classes(group, rank, degree, vocab_size, dim=1 if logits.dim() > 1 else 0)
    if not target.is_floating_point():
        target = target.long()  # in uint8 no class is equal to an index of -100, but one seems so
    for axis, layout in tokens:
        target = take_targets(target, layout, axis, ignore_index)
    _check(logits, target, classes, weight)
    _check_options(reduction, label_smoothing)
    valid = target != ignore_index
    inside = (target >= 0) & (target < vocab_size)
    torch._assert_async(  # a plain assert would wait for the GPU
        (inside | ~valid).all(),
        f"cross_entropy: a target is neither in [0, {vocab_size}) nor ignore_index={ignore_index}",
    )
    safe = torch.where(valid, target, 0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    counted = valid.to(dtype) if weight is None else weight.to(dtype)[safe] * valid
    losses: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        logits, safe, valid, counted, weight, label_smoothing, classes, fused
    )
    if reduction == "none":
        for axis, layout in reversed(tokens):
            losses = gather(losses, layout, axis)
    else:
        losses, count = losses.sum(), counted.sum()
        for axis, _ in tokens:
            losses = reduce(losses, axis)
            count = all_reduce(count, axis) if reduction == "mean" else count
        losses = losses / count if reduction == "mean" else losses
    autocast = torch.is_autocast_enabled(logits.device.type)  # there F.cross_entropy is float32
    return losses if autocast or wide else losses.to(logits.dtype)


def take_targets(target: Tensor, layout: Layout, axis: Axis, ignored: int) -> Tensor:
    """Return the targets of this rank's tokens; those that were cut off do not count."""
    assert layout.dim is not None
    dim = layout.dim + 1
    whole = padded(outer_apart(target, layout), dim, layout.cut, ignored)
    return take(whole, dim, axis).flatten(dim - 1, dim)


class _Loss(torch.autograd.Function):
    """The loss of each token: its weighted negative log-likelihood, mixed with the smooth part.

    With probabilities p, class weights w, smoothing e and C classes, a token of class y has

        loss = (1 - e) w_y (-log p_y) + (e / C) sum_c w_c (-log p_c)
        d loss / d z_c = scale p_c - (1 - e) w_y [c = y] - (e / C) w_c
        scale = (1 - e) w_y + (e / C) sum_c w_c
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        valid: Tensor,
        counted: Tensor,
        weight: Tensor | None,
        smoothing: float,
        classes: _Classes,
        fused: bool,
    ) -> Tensor:
        dim = classes.dim
        smooth = _smooth_weight(weight, smoothing, classes, counted.unsqueeze(dim))
        ctx.fused = fused and smooth is None
        if ctx.fused:
            top, sums = _fused_sums(logits.detach(), target, classes)
        else:
            top, sums = _sums(logits.detach(), target, classes, smooth, counted.dtype)
        classes.all_reduce(sums, dist.ReduceOp.SUM)
        log_sum = sums[-1].log()
        loss = (1 - smoothing) * counted * (log_sum - sums[0]).squeeze(dim)
        if smooth is not None:
            loss += (smooth[1] * log_sum - sums[1]).squeeze(dim)
        ctx.save_for_backward(logits, top, log_sum, target, valid, counted, weight)
        ctx.smoothing, ctx.classes = smoothing, classes
        return torch.where(valid, loss, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, top, log_sum, target, valid, counted, weight = ctx.saved_tensors
        smoothing, classes = ctx.smoothing, ctx.classes
        if torch.is_grad_enabled():  # create_graph=True
            with suspended():
                again = _again(logits, target, valid, counted.dtype, weight, smoothing, classes)
                return *torch.autograd.grad(again, logits, grad, create_graph=True), *[None] * 7
        dim = classes.dim
        grad = torch.where(valid, grad, 0).unsqueeze(dim)  # also where a mean over nothing is nan
        hit = (1 - smoothing) * counted.unsqueeze(dim) * grad
        if ctx.fused:
            index, mine = _local(target, classes)
            grads = _compiled(_gradient)(logits.detach(), top, log_sum, hit, index, mine, dim)
            return grads, *[None] * 7
        smooth = _smooth_weight(weight, smoothing, classes, top)
        grads = torch.empty_like(logits)
        for rows in _pieces(logits):
            index, mine = _local(target[rows], classes)
            out = logits[rows].to(counted.dtype, copy=True)
            out.sub_(top[rows]).sub_(log_sum[rows]).exp_()
            if smooth is None:
                out.mul_(hit[rows])
            else:
                out.mul_(hit[rows] + smooth[1] * grad[rows]).sub_(smooth[0] * grad[rows])
            out.scatter_add_(dim, index, torch.where(mine, -hit[rows], 0))
            grads[rows] = out
        return grads, *[None] * 7


def _again(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    dtype: torch.dtype,
    weight: Tensor | None,
    smoothing: float,
    classes: _Classes,
) -> Tensor:
    """Return the loss of each token by torch's own operations, which can be differentiated twice.

    Raises: ShardingError where classes are split.
    """
    if classes.degree > 1:
        raise ShardingError(
            f"second derivatives of cross_entropy on logits split over {classes.degree} ranks are"
            " not built\n  options: leave out create_graph=True | tp=1"
        )
    return F.cross_entropy(
        logits.to(dtype),
        torch.where(valid, target, -100),
        None if weight is None else weight.to(dtype),
        reduction="none",
        label_smoothing=smoothing,
    )


def _sums(
    logits: Tensor,
    target: Tensor,
    classes: _Classes,
    smooth: tuple[Tensor | float, Tensor | float] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return each token's largest logit, and, less that, sums over this rank's classes.

    They are stacked: the own class's logit, the smooth part if asked for, the exponentials.
    """
    dim = classes.dim
    top = logits.amax(dim, keepdim=True).to(dtype)
    classes.all_reduce(top, dist.ReduceOp.MAX)
    sums = top.new_empty((2 if smooth is None else 3, *top.shape))
    for rows in _pieces(logits):
        shifted = logits[rows].to(dtype, copy=True).sub_(top[rows])
        index, mine = _local(target[rows], classes)
        sums[0][rows] = torch.where(mine, shifted.gather(dim, index), 0)
        if smooth is not None:
            sums[1][rows] = (shifted * smooth[0]).sum(dim, keepdim=True)
        sums[-1][rows] = shifted.exp_().sum(dim, keepdim=True)
    return top, sums


def _fused_sums(logits: Tensor, target: Tensor, classes: _Classes) -> tuple[Tensor, Tensor]:
    """Return what ``_sums`` does without smoothing, by compiled kernels."""
    index, mine = _local(target, classes)
    own, local, total = _compiled(_totals)(logits, index, classes.dim)
    top = classes.all_reduce(local.clone(), dist.ReduceOp.MAX)
    own = torch.where(mine, own - top, 0)
    total = torch.where(local == -torch.inf, 0 * top, total * (local - top).exp())
    return top, torch.stack([own, total])


def _totals(logits: Tensor, index: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logit at ``index``, the largest, and the exponentials' sum less that."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.amax(dim, keepdim=True)
    return wide.gather(dim, index), top, (wide - top).exp().sum(dim, keepdim=True)


def _gradient(
    logits: Tensor,
    top: Tensor,
    log_sum: Tensor,
    hit: Tensor,
    index: Tensor,
    mine: Tensor,
    dim: int,
) -> Tensor:
    """Return the gradient of the logits; ``hit`` is that of each token's own class."""
    shape = [1] * logits.dim()
    shape[dim] = logits.shape[dim]
    classes = torch.arange(logits.shape[dim], device=logits.device).view(shape)
    grads = (logits.to(top.dtype) - top - log_sum).exp() * hit
    return torch.where((classes == index) & mine, grads - hit, grads).to(logits.dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function)

    def run(*args: Any) -> Any:
        with suspended():
            return compiled(*args)

    return run


PIECE = 1 << 26  # logits that are widened at once


def _pieces(logits: Tensor) -> list[Any]:
    """Return indices of parts of the first dim, so that no wide copy of all logits is made."""
    if logits.dim() < 2 or logits.numel() <= PIECE:
        return [...]
    step = max(PIECE * logits.shape[0] // logits.numel(), 1)
    return [slice(i, i + step) for i in range(0, logits.shape[0], step)]


def _local(target: Tensor, classes: _Classes) -> tuple[Tensor, Tensor]:
    """Return (index into the local classes, whether the class is one of them), class dim kept."""
    index = target.unsqueeze(classes.dim) - classes.start
    mine = (index >= 0) & (index < classes.count)
    return torch.where(mine, index, 0), mine


def _smooth_weight(
    weight: Tensor | None, smoothing: float, classes: _Classes, like: Tensor
) -> tuple[Tensor | float, Tensor | float] | None:
    """Return (e / C) w of the local classes, shaped to broadcast, and its sum over all classes."""
    if smoothing == 0.0:
        return None
    share = smoothing / classes.total
    if weight is None:
        return share, smoothing
    scaled = weight.to(like.dtype) * share
    shape = [1] * like.dim()
    shape[classes.dim] = classes.count
    return scaled.narrow(0, classes.start, classes.count).reshape(shape), scaled.sum()


def _check_options(reduction: str, label_smoothing: float) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ShardingError(f"reduction={reduction!r}; use 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ShardingError(f"label_smoothing={label_smoothing} is not between 0 and 1")


def _check(logits: Tensor, target: Tensor, classes: _Classes, weight: Tensor | None) -> None:
    if target.is_floating_point():
        raise ShardingError(
            f"cross_entropy with probabilities as target (dtype {target.dtype}) on logits split "
            f"over {classes.degree} ranks is not built\n"
            "  pass class indices (an integer tensor), with label_smoothing= for soft targets,\n"
            "  or keep the logits whole: do not shard the weight that makes them"
        )
    problems = []
    local = logits.shape[classes.dim] if logits.dim() else 0
    if local * classes.degree != classes.total:
        problems.append(
            f"dim {classes.dim} of the logits has {local} classes on this rank, "
            f"{local} * {classes.degree} ranks is not {classes.total}"
        )
    expected = [size for dim, size in enumerate(logits.shape) if dim != classes.dim]
    if list(target.shape) != expected:
        problems.append(f"the target has shape {tuple(target.shape)}, needs {tuple(expected)}")
    if weight is not None and tuple(weight.shape) != (classes.total,):
        problems.append(f"weight has shape {tuple(weight.shape)}, needs ({classes.total},)")
    if problems:
        raise ShardingError(
            f"cross_entropy of logits with local shape {tuple(logits.shape)}:\n  "
            + "\n  ".join(problems)
        )

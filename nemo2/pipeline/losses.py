"""The losses of a step: what a loss function may return, and the global loss made of it.

Of several stages only the last one sees losses. What the others must know, whether they are means
or pairs, they learn in the first step of a kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import PipelineError
from ..mesh.groups import MeshGroups
from ..plan import Plan, StepPlan
from ..pytree import tree_map
from .absent import is_absent, to_meta

if TYPE_CHECKING:
    from .runner import Step


@dataclass(frozen=True)
class LossKind:
    """What a step returns: the loss's dtype, and whether it is a pair ``(sum, count)``."""

    dtype: torch.dtype
    pair: bool


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = tuple(LossKind(dtype, pair) for dtype in _DTYPES for pair in (False, True))


class Losses:
    """Wraps the user's loss function: the scalar to differentiate; keeps sums and counts.

    Args:
        copies: ranks that hold the same loss and whose gradients are summed (``cp``).
        divisor: of means before their backward: their number in the global batch, or 1 where
            gradients are divided later.
    """

    def __init__(self, loss_fn: Step, has_aux: bool, copies: int = 1, divisor: int = 1) -> None:
        self.loss_fn, self.has_aux, self.copies, self.divisor = loss_fn, has_aux, copies, divisor
        self.pairs: list[tuple[Tensor, Any]] = []
        self.aux: list[Any] = []
        self.kind = KINDS[0]

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        return self.loss_fn(module, batch)

    def check(self, planned: Any) -> None:
        """Refuse, on all ranks alike, what the planned step returned and ``take`` will not."""
        if self.has_aux and isinstance(planned, tuple) and len(planned) == 2:
            planned = planned[0]
        checked_loss(to_meta(planned))
        loss = planned[0] if isinstance(planned, tuple) else planned
        if not (loss.needs_grad if is_absent(loss) else loss.requires_grad):
            raise PipelineError(
                "loss_fn returned a loss without a gradient: it depends on no trainable parameter,"
                " or was detached\n"
                "  options: leave out .detach() and torch.no_grad() | model(...) for a forward"
            )

    def take(self, result: Any) -> Tensor:
        if self.has_aux:
            result, aux = result
            self.aux.append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, aux))
        loss, count = checked_loss(result)
        if is_absent(loss):
            raise PipelineError(
                "the loss needs a parameter or value of an earlier stage, and did not when the step"
                " was planned\n"
                "  options: use it from the first step on (times 0 where it does not count yet)"
            )
        kind = LossKind(loss.dtype, isinstance(result, tuple))
        if self.pairs and kind.pair != self.kind.pair:
            raise PipelineError(
                "loss_fn returned a mean for one microbatch and (sum, count) for another\n"
                "  options: (sum, count) for all | a mean for all"
            )
        self.kind = kind
        count = count.detach() if isinstance(count, Tensor) else count
        self.pairs.append((loss.detach().double().reshape(()), count))
        if not kind.pair and self.divisor > 1:  # at least in float32
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32)) / self.divisor
        return loss.reshape(()) / self.copies

    def totals(self, device: torch.device) -> Tensor:
        """Return five numbers, float64.

        The sum of losses, that of counts, which of ``KINDS``, 1 if they are pairs, and 1.
        """
        counts = [c for _, c in self.pairs if isinstance(c, Tensor)]
        known = sum(c for _, c in self.pairs if not isinstance(c, Tensor))
        out = torch.zeros(5, dtype=torch.float64, device=device)
        for i, values in enumerate(([loss for loss, _ in self.pairs], counts)):
            if values:
                out[i] = torch.stack([x.to(out).reshape(()) for x in values]).sum()
        kind = KINDS.index(self.kind)
        for i, number in ((1, known), (2, kind), (3, self.kind.pair), (4, 1)):
            out[i] += number  # filled on the device: a copy from the host would wait for it
        return out


def checked_loss(result: Any) -> tuple[Tensor, Any]:
    """Return (loss, count) of what a loss function returned; the count of a mean is 1.

    Raises: PipelineError when it is neither a scalar nor ``(sum, count)``.
    """
    pair = isinstance(result, tuple) and len(result) == 2
    loss, count = result if pair else (result, 1.0)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise PipelineError(
            f"loss_fn must return a scalar mean, or (sum, count); it returned {got}\n"
            "  options: loss.mean() | (losses.sum(), losses.numel())"
        )
    number = isinstance(count, (int, float)) or (isinstance(count, Tensor) and count.numel() == 1)
    if not number:
        raise PipelineError(
            "loss_fn must return a scalar mean, or (sum, count); its count is a"
            f" {type(count).__name__}\n"
            "  options: (losses.sum(), losses.numel()) | has_aux=True of value_and_grad for what"
            " is returned beside the loss"
        )
    return loss, count


class GlobalLosses:
    """Makes the loss of the global batch from those of this rank's microbatches."""

    def __init__(self, plan: Plan, groups: MeshGroups) -> None:
        self.plan, self.groups = plan, groups
        self._kinds: Any = WeakIdKeyDictionary()  # StepPlan -> LossKind, where there are stages

    @property
    def number(self) -> int:
        """Losses in the global batch."""
        return self.plan.options.pipeline.microbatches * self.groups.sizes.dp

    def begin(self, loss_fn: Step, *, has_aux: bool) -> Losses:
        """Return what the microbatches of one step give their losses to."""
        divisor = self.number if self._divides_means else 1
        return Losses(loss_fn, has_aux, self.groups.sizes.cp, divisor)

    @cached_property
    def _divides_means(self) -> bool:
        """Whether each mean is divided by the number of losses before its backward.

        That spares a pass over the gradients. In 16 bits the number is rounded, so gradients in 16
        bits are divided themselves.
        """
        return not any(p.dtype in (torch.bfloat16, torch.float16) for p in self.plan.params)

    def end(
        self, losses: Losses, step_plan: StepPlan | None, *, last: bool
    ) -> tuple[Tensor, Tensor | float | None]:
        """Return the global mean loss, and what gradients are to be multiplied by, if anything.

        Values stay on the device: that they are not read lets the host run ahead. The loss is NaN
        if some dp ranks returned means and others pairs.

        Args:
            last: whether this rank has the last stage.

        Communication: one all-reduce of five numbers over the world.
        """
        device = self.groups.device
        if last and self.groups.tp_rank == 0 and self.groups.cp_rank == 0:
            totals = losses.totals(device)
        else:
            totals = torch.zeros(5, dtype=torch.float64, device=device)
        if self.groups.sizes.world > 1:
            dist.all_reduce(totals, group=self.groups.world)
        total, count, kinds, pairs, ranks = totals.unbind()
        kind = losses.kind
        if len(self.plan.stages) > 1:
            kind = self._known(step_plan, kinds / ranks)
            if last:
                _check_same(kind, losses.kind)
        dtype = kind.dtype
        if self.plan.options.precision is not None:  # a mean over much more than one value
            dtype = torch.promote_types(dtype, torch.float32)
        wrong = (count == 0) | ((pairs != 0) & (pairs != ranks))
        loss = torch.where(wrong, torch.nan, total / count).to(dtype)
        if kind.pair:
            return loss, torch.where(count == 0, 0.0, 1 / count)
        return loss, None if self._divides_means else 1 / self.number

    def _known(self, step_plan: StepPlan | None, kinds: Tensor) -> LossKind:
        """Return the kind of a step's losses, which is read from the device once."""
        assert step_plan is not None
        if step_plan not in self._kinds:
            self._kinds[step_plan] = KINDS[round(float(kinds))]
        known: LossKind = self._kinds[step_plan]
        return known


def _check_same(known: LossKind, now: LossKind) -> None:
    """Raise PipelineError, on the last stage, when losses are not of the kind that they were."""
    if now.pair != known.pair:
        says = ("a mean", "(sum, count)")
        raise PipelineError(
            f"loss_fn returned {says[now.pair]}, and {says[known.pair]} in an earlier step like"
            " this one, by which the other stages go\n"
            "  options: (sum, count) in all steps | a mean in all steps"
        )

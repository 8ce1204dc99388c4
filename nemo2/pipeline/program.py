"""What Megatron's schedule runs on one stage: a step over microbatches, and its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import PipelineError
from ..pytree import tree_map
from ..sharding.dropout import Forward
from .absent import is_absent, to_meta
from .stages import StagePlan

if TYPE_CHECKING:
    from .runner import StageRunner, Step


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


class Program:
    """A stage of this rank as Megatron's schedule sees it.

    ``begin(stage, microbatch)`` starts the random numbers of each forward. Forward only, the
    schedule may ask for more microbatches than there are ``parts``: those compute nothing.
    """

    def __init__(
        self,
        runner: StageRunner,
        stage: StagePlan,
        step: Step,
        parts: list[Any],
        forward_only: bool,
        begin: Callable[[int, int], Forward | None],
    ) -> None:
        self.runner, self.stage, self.step, self.parts = runner, stage, step, parts
        self.forward_only, self.begin = forward_only, begin

    def forward(self, microbatch: int, received: tuple[Tensor, ...]) -> Any:
        if microbatch >= len(self.parts):
            return self.runner.blank(self.stage)
        draws = self.begin(self.stage.index, microbatch)
        output = self.runner.run(self.stage, self.step, self.parts[microbatch], received, draws)
        if not self.runner.at_end or self.forward_only:
            return output
        assert isinstance(self.step, Losses)
        return self.step.take(output)

"""What Megatron's schedule runs on one stage: a step over microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..sharding.dropout import Forward
from .losses import Losses
from .stages import StagePlan

if TYPE_CHECKING:
    from .runner import StageRunner, Step


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

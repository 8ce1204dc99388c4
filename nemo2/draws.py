"""The random numbers of a run: which seed each forward draws from, on which stages alike.

``randomness.py`` says of a plan which calls draw; ``sharding/dropout.py`` draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from .errors import PipelineError
from .host_random import host_state, set_host_state
from .mesh.groups import MeshGroups
from .pipeline.microbatch import plan_batch
from .pipeline.runner import StageRunner
from .pipeline.stages import block_of
from .plan import Plan, StepPlan
from .sharding.dropout import Forward, begin, drawing, seed_of


class Draws:
    """Starts the random numbers of each forward, of one stage and microbatch.

    Attributes:
        seed: of the first rank of the mesh; ``steps``: runs so far. Checkpoints keep both.
        dealt: whether the samples of the global batch are dealt out to dp coordinates one by one
            (as samplers do), instead of in parts; only dropout asks for their numbers.
    """

    def __init__(self, plan: Plan, groups: MeshGroups, runner: StageRunner, seed: int) -> None:
        self.plan, self.groups, self.runner = plan, groups, runner
        self.seed, self.steps, self.dealt = seed, 0, False

    @contextmanager
    def run(self, parts: Sequence[Any]) -> Iterator[Callable[[int, int], Forward | None]]:
        """Keep the user's generators as they are, and yield what begins a forward.

        Args:
            parts: the microbatches of this rank.
        """
        plan = self.runner.step_plan
        alike = plan is not None and self._alike(plan)
        devices = [self.groups.device] if self.groups.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), drawing():
            yield partial(self._begin, _size_of(parts[0]), len(parts), {}, alike)

    def seed_for(self, stage: int, microbatch: int) -> int:
        """Return the seed of torch's generators, for what is not keyed dropout."""
        return seed_of(self.seed, self.steps, (self.groups.dp_rank, stage, microbatch))

    def _begin(
        self,
        size: int,
        count: int,
        begun: dict[int, Any],
        alike: bool,
        stage: int,
        microbatch: int,
    ) -> Forward | None:
        """Start the random numbers of one forward.

        Args:
            begun: microbatch -> the states of Python's and NumPy's generators when this rank began
                it: its other stages draw the same.
            alike: whether all stages draw the same numbers.
        """
        if len(self.runner.stages) > 1:
            if microbatch in begun:
                set_host_state(begun[microbatch])
            else:
                begun[microbatch] = host_state()
        plan = self.runner.step_plan
        if not self.runner.module.training and (plan is None or not plan.randomness.keyed):
            return None
        dp_rank, dp = self.groups.dp_rank, self.groups.sizes.dp
        first, stride = (dp_rank * count + microbatch) * size, 1
        if self.dealt:
            first, stride = microbatch * size * dp + dp_rank, dp
        coordinates = (dp_rank, 0 if alike else stage, microbatch)
        return begin(self.seed, self.steps, coordinates, first, stride)

    def _alike(self, plan: StepPlan) -> bool:
        """Say whether all stages draw the same numbers, as code outside of blocks needs them.

        A step's noise goes into the model on the first stage and into the loss on the last. Not
        where blocks draw as well, which would draw the same on all stages; nor where a rank must
        tell the forwards of its stages apart by their seeds, to run parts of them again.
        """
        if len(self.plan.stages) == 1 or not plan.randomness.own:
            return False
        outside = self._outside(plan)
        again = len(self.runner.stages) > 1 and self.plan.options.remat is not None
        return len(outside) == len(plan.randomness.own) and not again

    def _outside(self, plan: StepPlan) -> list[str]:
        """Return the calls outside of blocks that draw numbers without positions."""
        blocks, own = self.plan.blocks, plan.randomness.own
        return [call for module, call, _ in own if block_of(module, blocks) is None]

    def warn(self, plan: StepPlan) -> None:
        """Tell of draws outside of blocks that differ from stage to stage."""
        outside = self._outside(plan)
        if len(self.plan.stages) > 1 and outside and not self._alike(plan):
            warnings.warn(
                f"the step draws random numbers outside of blocks ({outside[0]}), and stages draw"
                " different ones, as blocks draw some of their own or run again: right for what"
                " one stage alone uses\n"
                "  options: draw them where the batch is made | in a block",
                stacklevel=2,
            )


def _size_of(batch: Any) -> int:
    """Return the number of samples; 0 for a batch that names none, where nothing asks for it."""
    try:
        return plan_batch(batch, 1).size
    except PipelineError:
        return 0

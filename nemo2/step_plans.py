"""The plans of the steps that a model has run: one for each step, shapes and switches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .host_random import host_state_kept
from .mesh.groups import MeshGroups
from .pipeline.absent import NeedsValueError
from .pipeline.identity import flags
from .pipeline.runner import StageRunner, Step
from .places import Place
from .plan import Plan, StepPlan, plan_step
from .pytree import tree_flatten
from .sharding.storage import refuse_uses_outside
from .skipping import SkipWatch

_KEPT = 64


class StepPlans:
    """Finds the plan of a step, or makes it.

    Attributes:
        known_flags: of the module, while they stay the same; else they are read each time.
        made: called with each new plan.
        found: (step, shapes, switches) -> its plan, if one is needed, and whether blocks may skip.
    """

    def __init__(
        self,
        runner: StageRunner,
        groups: MeshGroups,
        managed: list[nn.Module],
        places: Sequence[Place],
        made: Callable[[StepPlan], None],
    ) -> None:
        self.runner, self.groups, self.managed, self.places = runner, groups, managed, places
        self.made = made
        self.known_flags: tuple[bool, ...] | None = None
        self.found: OrderedDict[Any, tuple[StepPlan | None, bool]] = OrderedDict()

    def find(
        self,
        step: Step,
        batch: Any,
        key: Any,
        plan: Plan,
        check: Callable[[Any], None] | None = None,
    ) -> tuple[StepPlan | None, bool]:
        """Return the step's plan, made at the first call for these shapes, or None if not needed.

        And whether dp ranks may skip blocks.

        Args:
            batch: a microbatch.
            key: what makes two calls the same step.
            plan: of the model, with or without its sequences split.
            check: called with what a newly planned step returns.
        """
        alone, module = plan.alone, self.runner.module
        switches = flags(module) if self.known_flags is None else self.known_flags
        still: Any = None
        if alone and not self.managed:
            still = (key, switches, torch.is_grad_enabled())
            trains = any(m.training for m in module.modules())
            if not trains or still in self.found:  # it draws nothing
                return None, False
        leaves, spec = tree_flatten(batch)
        shapes = tuple(
            (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else _hashable(x) for x in leaves
        )
        full = (key, spec, shapes, switches, torch.is_grad_enabled())
        if full not in self.found:
            made, may_skip = self._plan(step, batch, plan)
            if check is not None and made is not None and made.trace.complete:
                check(made.trace.output)
            if still and made is not None and not made.randomness.keyed:
                full = still
            if alone and made is not None and not made.randomness.keyed:
                made = None
            self.found[full] = made, may_skip
            while len(self.found) > _KEPT:
                self.found.popitem(last=False)
        return self.found[full]

    def _plan(self, step: Step, batch: Any, plan: Plan) -> tuple[StepPlan | None, bool]:
        """Plan a step; only one that is alone on its mesh may read values before its end."""
        module = self.runner.module
        blocks = [module.get_submodule(name) for name in plan.blocks]
        with self.runner.as_written(self.managed), host_state_kept():
            watch = SkipWatch(blocks)

            def watched(module: nn.Module, given: Any) -> Any:
                with watch:
                    return step(module, given)

            try:
                made = plan_step(plan, module, watched, batch, self.places, self.groups.device)
            except NeedsValueError:
                if not plan.alone:
                    raise
                return None, watch.may_skip
            except Exception:  # if it is the user's, the run itself raises it
                if not plan.alone or self.managed:
                    raise
                return None, False
        if self.managed:
            refuse_uses_outside(made.trace, self.runner.plan)
        self.made(made)
        return made, watch.may_skip


def _hashable(x: Any) -> Any:
    try:
        hash(x)
    except TypeError:
        return repr(x)
    return x

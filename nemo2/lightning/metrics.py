"""torchmetrics inside a scheduled step: not part of the plan, the same on every stage."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from ..model import ParallelModel
from ..pytree import tree_map
from ..sharding.annotate import constrain
from ..sharding.modes import suspended

_CALLS = ("forward", "update", "compute")


@dataclass(frozen=True)
class MetricName:
    """Stands for a metric of the module where log calls travel between ranks."""

    name: str


class Metrics:
    """All metrics of a module, for the time of one step."""

    def __init__(self, module: LightningModule) -> None:
        self.by_name = {n: m for n, m in module.named_modules() if isinstance(m, Metric)}
        self._before = {n: _lists(m) for n, m in self.by_name.items()}

    def name_of(self, metric: Metric) -> MetricName | None:
        return next((MetricName(n) for n, m in self.by_name.items() if m is metric), None)

    @contextmanager
    def quiet(self, skip: bool) -> Iterator[None]:
        """Keep what metrics compute out of the step's plan, or skip it.

        It is skipped when a step is planned, and on stages that the last one's state replaces.
        """
        saved = {n: _wrap(m, skip) for n, m in self.by_name.items()}
        try:
            yield
        finally:
            for name, own in saved.items():
                _unwrap(self.by_name[name], own)

    def share(self, parallel: ParallelModel) -> None:
        """Give every stage the state that the step left on the last one.

        Communication: that of ``from_last_stage``, if there are metrics and stages.
        """
        if not self.by_name or len(parallel.plan.stages) == 1:
            return
        last = parallel.runner.last
        own = {n: _state(m, self._before[n]) for n, m in self.by_name.items()} if last else None
        for name, state in parallel.from_last_stage(own).items():
            if not last:
                _take(self.by_name[name], state, parallel.groups.device)


def _lists(metric: Metric) -> dict[str, list[Any]]:
    """Return what the states that are lists hold."""
    states = {n: getattr(metric, n) for n in metric._defaults}
    return {n: list(x) for n, x in states.items() if isinstance(x, list)}


def _state(metric: Metric, before: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return the metric's state; of lists how much of them is as it was, and what comes then."""
    states: dict[str, Any] = {}
    for name in metric._defaults:
        x = getattr(metric, name)
        if isinstance(x, list):
            was = before.get(name, [])
            kept = len(was) if all(map(operator.is_, was, x)) and len(was) <= len(x) else 0
            x = _Grown(kept, x[kept:])
        states[name] = x
    state = {"states": states, "count": metric._update_count, "value": metric._forward_cache}
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, state)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Grown:
    """A list, but for the first items, which are as they were."""

    kept: int
    items: list[Any]


def _take(metric: Metric, state: Mapping[str, Any], device: torch.device) -> None:
    state = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, state)
    for name, value in state["states"].items():
        if isinstance(value, _Grown):
            setattr(metric, name, getattr(metric, name)[: value.kept] + value.items)
        else:
            setattr(metric, name, value)
    metric._update_count, metric._forward_cache = state["count"], state["value"]
    metric._computed = None


def _wrap(metric: Metric, skip: bool) -> dict[str, Any]:
    own = {name: metric.__dict__.get(name) for name in _CALLS}
    for name in _CALLS:
        original = getattr(metric, name)

        def call(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            args, kwargs = tree_map(
                lambda x: constrain(x, None) if isinstance(x, Tensor) else x, (args, kwargs)
            )
            with suspended():
                return torch.zeros(()) if skip else _original(*args, **kwargs)

        metric.__dict__[name] = call
    return own


def _unwrap(metric: Metric, own: Mapping[str, Any]) -> None:
    for name, value in own.items():
        if value is None:
            metric.__dict__.pop(name, None)
        else:
            metric.__dict__[name] = value

"""``self.log`` inside a scheduled step: captured on the last stage, replayed on every rank.

A step runs once for each microbatch, reaches its logging code on the last stage only, and runs
once more on shapes when it is planned. So the calls are kept while the schedule runs, combined
over microbatches and ``dp``, sent to all stages, and only then made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torchmetrics import Metric

from ..errors import Nemo2Error
from ..model import ParallelModel
from ..sharding.modes import suspended
from .attributes import Left, Undo, apply
from .metrics import MetricName, Metrics

EQUAL = "the same on every rank"
"""Passed as ``sync_dist_group``: ``MegatronStrategy.reduce`` returns such a value as it is."""

_SIGNATURE = inspect.signature(LightningModule.log)
_COMBINE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "min": torch.min,
    "max": torch.max,
}


@dataclass(frozen=True)
class Call:
    """One call of ``self.log`` (or, with ``name=None``, of ``self.print``)."""

    name: str | None
    value: Any
    dtype: torch.dtype | None
    options: dict[str, Any]


class LogCapture:
    """The log calls of one step; use one for each step."""

    def __init__(self, module: LightningModule, parallel: ParallelModel) -> None:
        self.module, self.parallel = module, parallel
        self.microbatches: list[list[Call]] = []
        self.metrics = Metrics(module)
        self._planning = False
        self._left: Left | None = None

    # --- while the schedule runs

    @contextmanager
    def microbatch(self) -> Iterator[None]:
        """Run the user's step once; when it is only planned, nothing that it changes stays."""
        runner = self.parallel.runner
        self._planning = runner.passage is None
        unseen = self._planning or not runner.at_end  # an earlier stage reaches only a part of it
        self.microbatches.append([])
        attributes = self.module.__dict__
        attributes.update(log=self._log, print=self._print)
        trainer = self.module.trainer
        undo: Undo | Left | None = None
        if self._planning:
            undo = Undo(self.module, trainer.callbacks)  # type: ignore[attr-defined]
        elif runner.last and self.parallel.groups.sizes.pp > 1:
            if self._left is None:
                self._left = Left(self.module)
            if unseen:  # of several chunks the last one's counts
                undo = Left(self.module)
        heard = _unheard(trainer) if self._planning else nullcontext()
        trainer.strategy.planning = self._planning  # type: ignore[attr-defined]
        try:
            with self.metrics.quiet(skip=unseen), heard:
                yield
        except Exception:
            if isinstance(undo, Undo):
                undo.complete = False
            raise
        finally:
            trainer.strategy.planning = False  # type: ignore[attr-defined]
            if unseen:
                self.microbatches.pop()
            if undo is not None:
                undo.put_back()
            for name in ("log", "print"):
                attributes.pop(name, None)

    def _log(self, *args: Any, **kwargs: Any) -> None:
        bound = _SIGNATURE.bind(self.module, *args, **kwargs)
        options = dict(bound.arguments)
        options.pop("self")
        name, value = options.pop("name"), options.pop("value")
        with suspended():
            if isinstance(value, Metric):
                value = self._named(name, value)
            elif not isinstance(value, (Tensor, int, float)) or (
                isinstance(value, Tensor) and value.numel() != 1
            ):
                raise Nemo2Error(
                    f"self.log('{name}', ...) in a step takes a number or a tensor with one "
                    f"element, got {type(value).__name__}"
                )
            if self._planning:
                return
            dtype = value.dtype if isinstance(value, Tensor) else None
            if isinstance(value, Tensor):
                value = value.detach().clone()
            self.microbatches[-1].append(Call(name, value, dtype, options))

    def _named(self, name: str, metric: Metric) -> MetricName:
        found = self.metrics.name_of(metric)
        if found is None:
            raise Nemo2Error(
                f"self.log('{name}', <metric>): the metric is no attribute of the module\n"
                "  options: self.metric = ... in __init__ | log its value"
            )
        return found

    def _print(self, *args: Any, **kwargs: Any) -> None:
        if not self._planning:
            text = kwargs.get("sep", " ").join(str(x) for x in args)
            self.microbatches[-1].append(Call(None, text, None, {}))

    # --- after it

    def replay(self) -> None:
        """Make each call once on every rank, with the same value; bring attributes to all stages.

        The value is combined over the microbatches and ``dp`` as ``reduce_fx`` says: "mean"
        (weighted by ``batch_size`` where that is given), "sum", "min" or "max".

        Communication: one all-gather of the calls over ``dp`` on the last stage, one
        broadcast over ``pp``.
        """
        runs = [_numbers(calls) for calls in self.microbatches]
        groups = self.parallel.groups
        if self.parallel.runner.last and groups.dp.size() > 1:
            gathered: list[Any] = [None] * groups.dp.size()
            dist.all_gather_object(gathered, runs, group=groups.dp)
            runs = [run for part in gathered for run in part]
        self.metrics.share(self.parallel)
        left = self._left.changes() if self._left is not None else {}
        calls, left = self.parallel.from_last_stage((_combine(runs), left))
        if not self.parallel.runner.last:
            apply(self.module, left, groups.device)
        for call in calls:
            if call.name is None:
                self.module.print(call.value)
                continue
            value = call.value
            if isinstance(value, MetricName):
                value = self.metrics.by_name[value.name]
            else:
                value = torch.tensor(value, dtype=call.dtype, device=groups.device)
            options = call.options | {"sync_dist": True, "sync_dist_group": EQUAL}
            self.module.log(call.name, value, **options)


def _numbers(calls: list[Call]) -> list[Call]:
    """Replace tensors by numbers, with one transfer from the device."""
    tensors = [c.value.double().reshape(()) for c in calls if isinstance(c.value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])
    return [replace(c, value=next(numbers)) if isinstance(c.value, Tensor) else c for c in calls]


def _combine(runs: list[list[Call]]) -> list[Call]:
    """Return one call for each (name, how often it was called before), in the order met."""
    together: dict[tuple[str | None, int], list[Call]] = {}
    for calls in runs:
        seen: dict[str | None, int] = {}
        for call in calls:
            number = seen[call.name] = seen.get(call.name, -1) + 1
            together.setdefault((call.name, number), []).append(call)
    combined: list[Call] = []
    for (name, _), same in together.items():
        if name is None:
            combined += same
        else:
            combined.append(_combine_same(same))
    return combined


def _combine_same(calls: list[Call]) -> Call:
    first = calls[0]
    options = dict(first.options)
    sizes = [c.options.get("batch_size") for c in calls]
    weights = [float(s) if s else 1.0 for s in sizes]
    if all(sizes):
        options["batch_size"] = round(sum(weights))
    if isinstance(first.value, MetricName):
        return replace(first, options=options)
    values = torch.tensor([c.value for c in calls], dtype=torch.float64)
    how = options.get("reduce_fx", "mean")
    if isinstance(how, str) and how in _COMBINE:
        value = _COMBINE[how](values)
    else:
        share = torch.tensor(weights, dtype=torch.float64)
        value = (values * share).sum() / share.sum()
    dtype = first.dtype if first.dtype is not None and first.dtype.is_floating_point else None
    return replace(first, value=float(value), dtype=dtype, options=options)


# --- what planning must not change


@contextmanager
def _unheard(trainer: Trainer) -> Iterator[None]:
    """Let the loggers log nothing; all else that they say of themselves they still say."""
    kinds = [type(logger) for logger in trainer.loggers]
    try:
        for logger, kind in zip(trainer.loggers, kinds, strict=True):
            logs = [name for name in dir(kind) if name.startswith("log_")]
            quiet: dict[str, Any] = {n: _nothing for n in logs if callable(getattr(kind, n))}
            quiet["experiment"] = property(lambda _: DummyLogger().experiment)
            logger.__class__ = type(kind.__name__, (kind,), quiet)
        yield
    finally:
        for logger, kind in zip(trainer.loggers, kinds, strict=True):
            logger.__class__ = kind


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None

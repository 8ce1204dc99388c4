"""``self.log`` inside a scheduled step: captured on the last stage, replayed on every rank.

A step runs once for each microbatch, reaches its logging code on the last stage only, and runs
once more on shapes when it is planned. So the calls are kept while the schedule runs, combined
over microbatches and ``dp``, sent to all stages, and only then made.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from numbers import Number
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torchmetrics import Metric

from ..errors import Nemo2Error
from ..model import ParallelModel
from ..pipeline.absent import is_absent
from ..sharding.modes import suspended
from .attributes import Left, Undo, apply
from .combine import Call, combine, gather_calls
from .metrics import MetricName, Metrics
from .settings import Settings

EQUAL = "the same on every rank"
"""Passed as ``sync_dist_group``: ``MegatronStrategy.reduce`` returns such a value as it is."""

_SIGNATURE = inspect.signature(LightningModule.log)


class LogCapture:
    """The log calls of one step; use one for each step."""

    def __init__(self, module: LightningModule, parallel: ParallelModel) -> None:
        self.module, self.parallel = module, parallel
        self.microbatches: list[list[Call]] = []
        self.metrics = Metrics(module)
        self._planning = False
        self._left: Left | None = None
        self._settings: Settings | None = None

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
        settings, stages = Settings(trainer), self.parallel.groups.sizes.pp
        if self._settings is None and not self._planning and stages > 1:
            self._settings = settings
        if self._planning:
            undo = Undo(self.module, trainer.callbacks)  # type: ignore[attr-defined]
        elif runner.last and stages > 1:
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
                settings.put_back()
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
            elif not isinstance(value, (Tensor, Number)) or (
                isinstance(value, Tensor) and value.numel() != 1
            ):
                raise Nemo2Error(
                    f"self.log('{name}', ...) in a step takes a number or a tensor with one "
                    f"element, got {type(value).__name__}"
                )
            if self._planning:
                return
            if isinstance(value, Tensor) and is_absent(value) and self.parallel.runner.at_end:
                raise Nemo2Error(
                    f"self.log('{name}', ...): an earlier stage has computed the value, and the"
                    " last one, which logs, does not have it\n"
                    "  options: let the model return it beside its output, and log it in the step"
                )
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
        (weighted by ``batch_size`` where that is given), "sum", "min" or "max". It stays on the
        device, so that the host does not wait for the step to be done.

        Communication: on the last stage, over ``dp``, one all-gather of the calls and one of their
        values; then that of ``from_last_stage``.
        """
        groups, last = self.parallel.groups, self.parallel.runner.last
        own: tuple[Any, ...] = ()
        if last:
            made = combine(*gather_calls(self.microbatches, groups))
            left = self._left.changes() if self._left is not None else {}
            own = made, left, self._settings.changes() if self._settings is not None else None
        self.metrics.share(self.parallel)
        made, left, set_ = self.parallel.from_last_stage(own)
        if not last:
            apply(self.module, left, groups.device)
            if set_ is not None and self._settings is not None:
                self._settings.apply(set_)
        for call in made:
            if call.name is None:
                self.module.print(call.value)
                continue
            value = call.value
            if isinstance(value, MetricName):
                value = self.metrics.by_name[value.name]
            elif not isinstance(value, Tensor):  # filled there: a copy would wait for the device
                value = torch.full((), value, dtype=call.dtype, device=groups.device)
            options = call.options | {"sync_dist": True, "sync_dist_group": EQUAL}
            self.module.log(call.name, value, **options)


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

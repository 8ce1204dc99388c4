"""What a step may set outside of its module: whether to stop, and the optimizers' options.

Like attributes, they are as they were after a step was planned, and after it has run they are the
last stage's on all stages.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


class Settings:
    """The Trainer's ``should_stop`` and the options of optimizers' groups, at one moment."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._before = self._now()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for o in self.trainer.optimizers for group in o.param_groups]

    def _now(self) -> tuple[bool, list[dict[str, Any]]]:
        options = [{k: v for k, v in g.items() if k != "params"} for g in self._groups]
        return self.trainer.should_stop, options

    def changes(self) -> tuple[bool | None, list[dict[str, Any]]]:
        """Return what is different now: whether to stop, and the changed options of each group."""
        (stop, groups), (was, before) = self._now(), self._before
        changed = [
            {k: v for k, v in options.items() if k not in old or old[k] is not v}
            for options, old in zip(groups, before, strict=True)
        ]
        return (stop if stop != was else None), changed if any(changed) else []

    def apply(self, changes: tuple[bool | None, list[dict[str, Any]]]) -> None:
        """Make the changes of another stage."""
        stop, changed = changes
        if stop is not None:
            self.trainer.should_stop = stop
        for group, options in zip(self._groups, changed, strict=False):
            group.update(options)

    def put_back(self) -> None:
        """Undo what was set since."""
        stop, before = self._before
        self.trainer.should_stop = stop
        for group, options in zip(self._groups, before, strict=True):
            for key in [k for k in group if k != "params" and k not in options]:
                del group[key]
            group.update(options)

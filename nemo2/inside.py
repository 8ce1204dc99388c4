"""Which ``ParallelModel`` a module is a part of: users hold modules of their own in it."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from .model import ParallelModel

# Module -> the model that it is in; beside the modules, which are copied and pickled by others.
_models: MutableMapping[nn.Module, weakref.ref[ParallelModel]] = WeakIdKeyDictionary()


def note_parts(model: ParallelModel) -> None:
    """Remember that the modules of ``model.module``, itself too, are in ``model``."""
    for part in model.module.modules():
        _models[part] = weakref.ref(model)


def model_around(module: nn.Module) -> tuple[ParallelModel, str] | None:
    """Return the ``ParallelModel`` that ``module`` is in, and its name there; None for no part.

    The name is "" for the whole: the ``ParallelModel``'s ``module``.
    """
    ref = _models.get(module)
    model = ref() if ref is not None else None
    if model is None:
        return None
    name = next((n for n, part in model.module.named_modules() if part is module), None)
    return None if name is None else (model, name)


def is_first_stage(model: nn.Module) -> bool:
    """Say whether this rank runs the first pipeline stage: True for a model on one device.

    Args:
        model: a ``ParallelModel``, or a module inside of one.

    >>> is_first_stage(nn.Linear(2, 2)), is_last_stage(nn.Linear(2, 2))
    (True, True)
    """
    parallel = _around(model)
    return parallel is None or parallel.runner.stages[0].index == 0


def is_last_stage(model: nn.Module) -> bool:
    """Say whether this rank runs the last pipeline stage, where the model's output is.

    Args:
        model: a ``ParallelModel``, or a module inside of one.
    """
    parallel = _around(model)
    return parallel is None or parallel.runner.last


def _around(model: nn.Module) -> ParallelModel | None:
    """Return ``model`` itself if it is parallel, else the parallel model that it is in, or None."""
    from .model import ParallelModel

    if isinstance(model, ParallelModel):
        return model
    around = model_around(model)
    return around[0] if around is not None else None

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

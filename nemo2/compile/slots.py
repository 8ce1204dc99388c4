"""The tensors that a block's code reads from its modules: inputs of its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..pipeline.absent import is_absent


class Slots:
    """Where the modules of a block hold tensors; what one object fills is one input.

    Attributes:
        places: for each input the (attributes, key) pairs that hold it.
        names: the same by names, to be compared.
    """

    places: tuple[tuple[tuple[MutableMapping[str, Any], str], ...], ...]
    names: tuple[tuple[tuple[int, int, str], ...], ...]

    def __init__(self, block: nn.Module) -> None:
        found: dict[int, list[tuple[MutableMapping[str, Any], int, int, str]]] = {}
        for i, module in enumerate(block.modules()):
            for j, attributes in enumerate((module.__dict__, module._parameters, module._buffers)):
                for key, value in attributes.items():
                    if isinstance(value, Tensor) and not is_absent(value):
                        found.setdefault(id(value), []).append((attributes, i, j, key))
        self.places = tuple(tuple((x[0], x[3]) for x in same) for same in found.values())
        self.names = tuple(tuple(x[1:] for x in same) for same in found.values())
        self._first = tuple(same[0] for same in self.places)

    def read(self) -> list[Tensor]:
        """Return what is there now."""
        return [attributes[key] for attributes, key in self._first]

    def hold(self, values: Sequence[Tensor]) -> bool:
        """Say whether all of ``values`` are there."""
        return all(
            attributes.get(key) is value
            for same, value in zip(self.places, values, strict=True)
            for attributes, key in same
        )

    @contextmanager
    def holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Put ``values`` there for a time."""
        before = [[attributes[key] for attributes, key in same] for same in self.places]
        for same, value in zip(self.places, values, strict=True):
            for attributes, key in same:
                attributes[key] = value
        try:
            yield
        finally:
            for same, old in zip(self.places, before, strict=True):
                for (attributes, key), value in zip(same, old, strict=True):
                    attributes[key] = value


def facts(block: nn.Module) -> tuple[Any, ...]:
    """Return what the modules of a block hold beside tensors and modules, to be compared.

    Numbers, strings, None and dtypes; also in lists, dicts and sets, and in objects that hold
    nothing else, such as a model's configuration.
    """
    known: dict[int, Any] = {}  # modules share a configuration
    found = []
    for i, module in enumerate(block.modules()):
        for name, value in module.__dict__.items():
            if name in _OWN:
                continue
            if id(value) not in known:
                known[id(value)] = _fact(value, 3)
            if (fact := known[id(value)]) is not _ODD:
                found.append((i, name, fact))
    return tuple(found)


class Contents:
    """What the modules of a block hold now, so that it can be put back.

    Attributes, and lists, dicts and sets among them, also in objects that hold nothing else.
    """

    def __init__(self, block: nn.Module) -> None:
        self._before: list[tuple[Any, Any]] = []
        for module in block.modules():
            self._before.append((module.__dict__, dict(module.__dict__)))
            for name, value in module.__dict__.items():
                if name not in _OWN:
                    self._remember(value, 3)

    def _remember(self, value: Any, depth: int) -> None:
        if isinstance(value, _UNSEEN) or not depth:
            return
        if hasattr(value, "__dict__") and _fact(value, depth) is not _ODD:
            value = value.__dict__
        if isinstance(value, (list, dict, set)):
            self._before.append((value, copy(value)))
        elif not isinstance(value, tuple):
            return
        for x in value.values() if isinstance(value, dict) else value:
            self._remember(x, depth - 1)

    def put_back(self) -> None:
        for container, before in self._before:
            if isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)


def _fact(value: Any, depth: int) -> Any:
    """Return ``value`` as something to compare, or ``_ODD``."""
    kind = type(value)
    if kind in _ATOMS or isinstance(value, Enum):
        return kind, value  # 1, 1.0 and True are equal
    if isinstance(value, _UNSEEN) or not depth:
        return _ODD
    if kind in (list, tuple, set, frozenset, dict):
        if len(value) > _LARGE:
            return _ODD
        parts = value.items() if kind is dict else value
        inner = (_fact(x, depth - (kind is not tuple)) for x in parts)
        return kind, frozenset(inner) if kind in (set, frozenset) else tuple(inner)
    held = getattr(value, "__dict__", None)
    if not isinstance(held, dict) or len(held) > _LARGE:
        return _ODD
    inside = tuple((name, _fact(x, depth - 1)) for name, x in held.items())
    return _ODD if any(fact is _ODD for _, fact in inside) else (kind, inside)


_ODD = object()  # neither a number nor made of numbers
_LARGE = 1000  # a list or dict that is longer is no setting
_ATOMS = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_UNSEEN: Any = (Tensor, nn.Module, type, Callable, ModuleType)
_OWN = frozenset(nn.Module().__dict__) - {"training"}  # dicts of parameters, hooks, modules

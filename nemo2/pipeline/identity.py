"""When two steps are the same step, so that one plan serves both.

A step's plan holds for one path through the user's code. What may choose another path is
part of the key: the function with what it closes over and the globals that it names, and the
flags (booleans) of all modules. Objects are compared by identity and kept alive by the key.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_SMALL = range(
    -8, 9
)  # a dim or a count chooses a path; an index that grows with the steps does not


class _Same:
    """Equal only to itself, and keeps it alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def identity(step: Any) -> Hashable:
    """Return a key that is equal for functions that take the same path on the same batch.

    A lambda written anew in each turn of a loop gets the same key each time; one whose
    closure holds another switch does not. Numbers count by being zero or not, small integers
    by value; tensors by shape.
    """
    if isinstance(step, functools.partial):
        return ("partial", identity(step.func), _value(step.args), _value(step.keywords))
    if isinstance(step, MethodType):
        return ("method", identity(step.__func__), _Same(step.__self__))
    if isinstance(step, FunctionType):
        cells = tuple(_cell(c) for c in step.__closure__ or ())
        named = tuple(
            (n, _value(step.__globals__[n])) for n in _names(step.__code__) if n in step.__globals__
        )
        return (step.__code__, cells, _value(step.__defaults__), _value(step.__kwdefaults__), named)
    return _Same(step)


def flags(module: nn.Module) -> tuple[bool, ...]:
    """Return every boolean attribute of every module, ``training`` among them."""
    return tuple(
        v for m in module.modules() for v in m.__dict__.values() if v is True or v is False
    )


def _names(code: CodeType) -> tuple[str, ...]:
    inner = [n for c in code.co_consts if isinstance(c, CodeType) for n in _names(c)]
    return (*code.co_names, *inner)


def _cell(cell: Any) -> Hashable:
    try:
        return _value(cell.cell_contents)
    except ValueError:  # not filled yet
        return "empty"


def _value(value: Any) -> Hashable:
    if isinstance(value, (bool, str, bytes)) or value is None:
        return value
    if isinstance(value, (int, float)):
        exact = isinstance(value, int) and value in _SMALL
        return (type(value).__name__, value if exact else value and "some")
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype))
    if isinstance(value, (tuple, list)):
        return tuple(_value(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _value(v)) for k, v in value.items() if isinstance(k, str))
    if isinstance(value, (functools.partial, MethodType)):
        return identity(value)
    return _Same(value)

"""What a planning run saw: calls in the modules that made them, values, and their uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .pipeline.absent import Absent
from .sharding.actions import Action
from .sharding.layout import Layout, Sharding


@dataclass
class Event:
    """One torch call: its running number, name, decision and (local) result shapes."""

    number: int
    name: str
    action: Action | None
    literals: tuple[Any, ...]
    operands: tuple[tuple[Any, tuple[int, ...]], ...]
    results: tuple[tuple[int, ...], ...]
    layouts: tuple[Sharding, ...]
    output_shapes: tuple[tuple[int, ...], ...] = ()
    global_shapes: tuple[tuple[int, ...], ...] = ()
    operand_leaves: tuple[tuple[int, ...], ...] = ()
    operand_layouts: tuple[Sharding, ...] = ()
    wants_grad: tuple[bool, ...] = ()
    dtype: torch.dtype | None = None
    output: Any = None
    again: bool = False  # a checkpoint inside the module's forward runs it again in backward
    draws: str = ""  # what it does with random numbers: "dropout", or how it draws its own

    def local_of_cp(self, index: int, cp: int) -> tuple[int, ...]:
        """Return the shape of an operand that is whole over ``tp`` but split over ``cp``."""
        layout = self.operand_layouts[index][0]
        return layout.local_shape(self.global_shapes[index], cp)


def saved_hooks() -> Any:
    """Return what identifies the innermost non-reentrant checkpoint that is running."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks and hooks[0]


@dataclass(frozen=True)
class Input:
    """One tensor leaf of a module's arguments: which value it is, and its global shape."""

    leaf: int
    key: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    absent: bool

    @property
    def floating(self) -> bool:
        return self.dtype.is_floating_point


@dataclass(frozen=True)
class Entry:
    """A change of layout at a module's edge: steps (name, axis, layout) on one leaf.

    ``shape`` (global), ``dtype`` and ``wants_grad`` are those of the value.
    """

    leaf: int
    steps: tuple[tuple[str, str, Layout], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    wants_grad: bool


@dataclass
class Activation:
    """One call of one module's forward, with the calls that it made, in order.

    Attributes:
        inputs, outputs: the tensors given and (by key) returned.
        entries, exits: what nemo2 does to some of them on the way in and out.
        depth: how many custom autograd functions were running.
        first: number of the first torch call in it.
        closed: shape and dtype of what it is assumed to return, where its code reads values and
            is not planned.
    """

    module: str
    ordinal: int
    leaf: bool
    block: int | None
    hooks: Any = field(default_factory=saved_hooks)
    items: list[Event | Activation] = field(default_factory=list)
    inputs: tuple[Input, ...] = ()
    outputs: tuple[Any, ...] = ()
    entries: tuple[Entry, ...] = ()
    exits: tuple[Entry, ...] = ()
    depth: int = 0
    first: int = 0
    closed: tuple[tuple[int, ...], torch.dtype] | None = None

    def events(self) -> Iterator[Event]:
        return (x for x in self.items if isinstance(x, Event))

    def children(self) -> Iterator[Activation]:
        return (x for x in self.items if isinstance(x, Activation))

    def walk(self) -> Iterator[Activation]:
        yield self
        for child in self.children():
            yield from child.walk()


@dataclass(frozen=True)
class BlockOutput:
    """What a block returns.

    Per leaf ``("absent", shape, dtype)``, ``("arg", i)`` or ``("const", x)``.
    """

    spec: Any
    leaves: tuple[tuple[Any, ...], ...]


def identity(x: Tensor) -> Any:
    """Name what an absent tensor stands for; None for a real one."""
    return (x.key or x.param) if isinstance(x, Absent) else None


@dataclass
class Value:
    """A value that depends on parameters: where it was made and where it was used."""

    key: tuple[Any, ...]
    absent: Absent
    born: int
    number: int
    uses: set[int] = field(default_factory=set)
    block: int | None = None  # in which it was made, unless that returns it


@dataclass
class Notes:
    """What a run did that some meshes do not allow.

    Attributes:
        escaped: values that left a block without being returned: block, where it was used, line.
        reentrant: blocks called in a reentrant activation checkpoint.
        router_logits: whether a mixture of experts was asked for what its auxiliary loss needs.
        closed: modules whose code reads values and is not planned.
        draws: what those draw at random: module, call, why it is not keyed.
    """

    escaped: set[tuple[int, int, str]] = field(default_factory=set)
    reentrant: set[int] = field(default_factory=set)
    router_logits: bool = False
    closed: list[str] = field(default_factory=list)
    draws: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class Trace:
    """Everything one planning run saw. Positions count blocks; -1 is before the first."""

    root: Activation
    param_uses: dict[str, set[int]]
    param_scopes: dict[str, set[tuple[str, ...]]]
    partial_uses: dict[str, list[tuple[int, int]]]
    full_uses: set[str]
    values: list[Value]
    blocks: dict[int, BlockOutput]
    output: Any
    output_shapes: tuple[tuple[int, ...], ...]
    output_layouts: tuple[Sharding, ...]
    degrees: tuple[int, int]
    complete: bool
    notes: Notes
    repeated: Mapping[str, str] = field(default_factory=dict)  # see repeats.py

    def blocks_called(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return which of the blocks ``names`` were called, in order."""
        index = {name: i for i, name in enumerate(names)}
        return tuple(index[a.module] for a in self.root.walk() if a.module in index)


def paired(one: Trace, two: Trace) -> list[tuple[Event, Event]] | None:
    """Return the calls of two runs side by side, or None when they made different ones."""
    a, b = ([e for activation in t.root.walk() for e in activation.events()] for t in (one, two))
    same = [(e.number, e.name) for e in a] == [(e.number, e.name) for e in b]
    return list(zip(a, b, strict=True)) if same else None

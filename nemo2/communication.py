"""The collectives of a step, counted from the plan: what runs where, and how many bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from .sharding.actions import Action
from .trace import Activation, Event, Trace

if TYPE_CHECKING:
    from .plan import Plan


@dataclass(frozen=True)
class Collective:
    """One collective of one microbatch, on one rank.

    Attributes:
        module: whose forward asks for it (``""`` is the step itself); ``call``: the torch call.
        direction: ``"forward"`` or ``"backward"``; ``kind``: all-reduce, all-gather.
        shape: of the tensor that is reduced, or gathered; ``nbytes`` of it.
        small: of the size of a token count rather than of an activation.
    """

    module: str
    call: str
    direction: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    small: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def collectives(trace: Trace, degree: int) -> tuple[Collective, ...]:
    """Return the tensor-parallel collectives of one microbatch's forward and backward."""
    if degree == 1:
        return ()
    varied: list[object] = [None]
    found: list[Collective] = []
    for activation, event in _events(trace.root):
        if event.action is not None:
            found += _of_event(activation, event, event.action, varied, degree)
    return tuple(found)


def _events(activation: Activation) -> Iterator[tuple[Activation, Event]]:
    for item in activation.items:
        if isinstance(item, Event):
            yield activation, item
        else:
            yield from _events(item)


def _of_event(
    activation: Activation, event: Event, action: Action, varied: list[object], degree: int
) -> Iterator[Collective]:
    """Yield the collectives of one call; inputs that several calls share vary once."""

    def one(direction: str, kind: str, shape: tuple[int, ...], small: bool = False) -> Collective:
        dtype = event.dtype or torch.float32
        return Collective(activation.module, event.name, direction, kind, shape, dtype, small)

    for fix in action.fixes:
        index = event.operand_leaves.index(fix.leaves)
        shape, key = event.global_shapes[index], event.operands[index][0]
        grad = event.wants_grad[index]
        for step, _ in fix.steps:
            if step == "gather":
                yield one("forward", "all-gather", shape)
            elif step == "split" and grad:
                yield one("backward", "all-gather", shape)
            elif step in ("vary", "select") and grad:
                if key is None or varied[0] != key or len(fix.steps) > 1:
                    yield one("backward", "all-reduce", shape)
                varied[0] = key
    if action.kind in ("rowwise", "embedding", "partial"):
        yield one("forward", "all-reduce", event.results[0])
    elif action.kind == "cross_entropy":
        tokens = (prod(event.global_shapes[1]),)
        yield one("forward", "all-reduce", tokens, small=True)
        yield one("forward", "all-reduce", tokens, small=True)


def boundary_bytes(plan: Plan) -> list[int]:
    """Return the bytes that cross each boundary for one microbatch, on one rank."""
    if plan.step is None:
        return []
    return [sum(prod(c.local_shape) * c.dtype.itemsize for c in b) for b in plan.step.boundaries]

"""The collectives of a step, counted from the plan: what runs where, and how many bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from .sharding.actions import Action
from .sharding.buckets import pack
from .trace import Activation, Event, Trace

if TYPE_CHECKING:
    from .plan import ParamPlan, Plan


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


@dataclass(frozen=True)
class StepCollective:
    """One data-parallel collective of a step, on one rank of a stage.

    Attributes:
        unit: the block whose parameters it is for, ``""`` for those outside of blocks, or
            ``"bucket 0"``.
        kind: all-gather, reduce-scatter, all-reduce; ``count``: how often in a step.
        elements: of the tensor that is gathered or reduced, padding included.
    """

    unit: str
    kind: str
    count: int
    elements: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


def data_parallel(plan: Plan, stage: int) -> tuple[StepCollective, ...]:
    """Return the collectives over ``dp`` of large tensors in one step of ``stage``.

    Exact for a model whose trainable parameters are all used, and that gradients reach: what is
    frozen is not reduced, and a block before the first trainable parameter not gathered for
    the backward. Buckets are counted in the order of registration, that of the first step.
    """
    if plan.sizes.dp * plan.sizes.cp == 1:
        return ()
    shards = plan.options.data_parallel.shards(plan.sizes)
    here = [p for p in plan.params if stage in p.stages]
    found: list[StepCollective] = []
    if shards > 1:
        for unit, params in _units(plan, stage, [p for p in here if p.shape]).items():
            found += _of_unit(plan, unit, params, shards)
    whole = [p for p in reversed(here) if p.trainable and (shards == 1 or not p.shape)]
    sizes = [(p.dtype, prod(p.local_shape) * p.dtype.itemsize) for p in whole]
    for index, bucket in enumerate(pack(sizes)):
        elements = sum(prod(whole[i].local_shape) for i in bucket)
        dtype = whole[bucket[0]].dtype
        found.append(StepCollective(f"bucket {index}", "all-reduce", 1, elements, dtype))
    return tuple(found)


def _units(plan: Plan, stage: int, params: list[ParamPlan]) -> dict[str, list[ParamPlan]]:
    """Return the parameters that FSDP gathers together, by block; the rest is ``""``."""
    units: dict[str, list[ParamPlan]] = {}
    for p in params:
        names = (p.name, *p.aliases)
        inside = [b for b in plan.blocks if any(n.startswith(f"{b}.") for n in names)]
        units.setdefault(inside[0] if inside else "", []).append(p)
    return units


def _of_unit(
    plan: Plan, unit: str, params: list[ParamPlan], shards: int
) -> Iterator[StepCollective]:
    """Yield the gathers of a unit's parameters and the reductions of their gradients."""
    microbatches = plan.options.pipeline.microbatches
    keeps = plan.options.data_parallel.keeps(plan.sizes, plan.options.pipeline)
    again = 1 if not unit and plan.sizes.pp == 1 else 2  # see shard_over_dp
    elements = sum(_padded(p, shards) for p in params)
    dtype = params[0].dtype
    yield StepCollective(unit, "all-gather", 1 if keeps else again * microbatches, elements, dtype)
    elements = sum(_padded(p, shards) for p in params if p.trainable)
    if elements:
        times = 1 if keeps else microbatches
        yield StepCollective(unit, "reduce-scatter", times, elements, dtype)
        if plan.options.data_parallel.replicate > 1:
            yield StepCollective(unit, "all-reduce", times, elements // shards, dtype)


def _padded(param: ParamPlan, shards: int) -> int:
    """Return the number of elements of a parameter padded to equal shards."""
    size = param.local_shape[param.dp_dim or 0]
    return prod(param.local_shape) // size * -(-size // shards) * shards if size else 0


def boundary_bytes(plan: Plan) -> list[int]:
    """Return the bytes that cross each boundary for one microbatch, on one rank."""
    if plan.step is None:
        return []
    return [sum(prod(c.local_shape) * c.dtype.itemsize for c in b) for b in plan.step.boundaries]

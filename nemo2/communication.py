"""The collectives of a step, counted from the plan: what runs where, and how many bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from .sharding.actions import Action
from .sharding.layout import AXES, Layout
from .sharding.rules import is_query
from .trace import Activation, Entry, Event, Trace

if TYPE_CHECKING:
    from .plan import ParamPlan, Plan


@dataclass(frozen=True)
class Collective:
    """One collective of one microbatch, on one rank.

    Attributes:
        axis: ``"tp"`` or ``"cp"``.
        module: whose forward asks for it (``""`` is the step itself); ``call``: the torch call.
        direction: ``"forward"``, ``"backward"``, or ``"recomputation"``, which is in the
            backward; ``kind``: all-reduce, all-gather,
            reduce-scatter, all-to-all or exchange (with neighbours).
        shape: of the whole that is reduced, gathered or exchanged; ``nbytes`` of it.
        small: of the size of a token count rather than of an activation.
    """

    axis: str
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


@dataclass
class _Reader:
    """Reads the collectives of one microbatch off a trace, in the order of the forward."""

    degrees: tuple[int, int]
    blocks: Collection[str] = ()
    remat: str | None = None
    entered: object = None

    def read(self, activation: Activation) -> Iterator[Collective]:
        if self.remat is None or activation.module not in self.blocks:
            yield from (c for c, _ in self._read(activation))
            return
        self.entered = None  # a block that is recomputed begins and ends with nothing entered
        saving = (e.number for a in activation.walk() for e in a.events() if _saves(e))
        last = max(saving, default=-1)
        for c, number in list(self._read(activation)):
            yield c
            if c.direction == "forward" and number <= last:
                yield replace(c, direction="recomputation")
        self.entered = None

    def _read(self, activation: Activation) -> Iterator[tuple[Collective, float]]:
        """Yield each collective with how far a recomputation must come to repeat it.

        That is the number of a torch call that saves something for backward; infinite where a
        recomputation never repeats it.
        """
        number: float = self._first(activation)
        for entry in activation.entries:
            yield from ((c, number) for c in self._edge(activation, entry))
        for item in activation.items:
            if isinstance(item, Activation):
                if self.remat is None or item.module not in self.blocks:
                    yield from self._read(item)
                else:
                    yield from ((c, math.inf) for c in self.read(item))
                continue
            if item.action is None:
                continue
            yield from ((c, item.number) for c in self._fixes(activation.module, item, item.action))
            number = item.number + 1
            if item.action.kind in ("attention", "cross_entropy"):
                number = item.number
            elif item.action.kind == "rowwise" and self.remat == "selective":
                number = math.inf  # its sum is kept
            yield from ((c, number) for c in self._event(activation.module, item, item.action))
        for entry in activation.exits:
            yield from ((c, math.inf) for c in self._edge(activation, entry))

    @staticmethod
    def _first(activation: Activation) -> float:
        numbers = (e.number for a in activation.walk() for e in a.events())
        return next(numbers, math.inf)

    def _edge(self, activation: Activation, entry: Entry) -> Iterator[Collective]:
        for step, axis, layout in entry.steps:
            shape = self._shape(entry.shape, axis, layout)
            for direction, kind in _STEPS[axis][step]:
                if direction == "forward" or entry.wants_grad:
                    yield Collective(
                        axis, activation.module, "(edge)", direction, kind, shape, entry.dtype
                    )

    def _shape(self, shape: tuple[int, ...], axis: str, layout: Any) -> tuple[int, ...]:
        """Return what one collective over ``axis`` moves: over tp, one part of cp."""
        cp = self.degrees[0]
        same = axis == "tp" and isinstance(layout, Layout) and layout.dim is not None and cp > 1
        return tuple(s // cp if same and d == layout.dim else s for d, s in enumerate(shape))

    def _fixes(self, module: str, event: Event, action: Action) -> Iterator[Collective]:
        """Yield what brings the operands of a call to their layouts."""
        dtype = event.dtype or torch.float32
        for fix in action.fixes:
            index = event.operand_leaves.index(fix.leaves)
            shape, key = event.local_of_cp(index, self.degrees[0]), event.operands[index][0]
            grad = event.wants_grad[index]
            for step, axis, layout in fix.steps:
                if step in ("vary", "gather_vary"):
                    again = key is not None and self.entered == (key, layout)
                    self.entered = (key, layout) if len(fix.steps) == 1 else None
                    if again:
                        continue
                whole = event.global_shapes[index] if axis == "cp" else shape
                for direction, kind in _STEPS[axis].get(step, ()):
                    if direction == "forward" or grad:
                        yield Collective(axis, module, event.name, direction, kind, whole, dtype)

    def _event(self, module: str, event: Event, action: Action) -> Iterator[Collective]:
        """Yield what the call itself communicates."""
        dtype = event.dtype or torch.float32

        def one(
            axis: str, direction: str, kind: str, shape: tuple[int, ...], small: bool = False
        ) -> Collective:
            return Collective(axis, module, event.name, direction, kind, shape, dtype, small)

        grads = any(event.wants_grad)
        if action.kind in ("rowwise", "embedding", "partial"):
            over = ("tp",) if action.kind == "embedding" else action.value[1]
            for axis in over:
                whole = event.results[0]
                if action.scatter is not None and axis == "tp":
                    tp = self.degrees[1]
                    dim = action.scatter.dim
                    whole = tuple(s * tp if d == dim else s for d, s in enumerate(whole))
                    yield one(axis, "forward", "reduce-scatter", whole)
                    if grads:
                        yield one(axis, "backward", "all-gather", whole)
                else:
                    yield one(axis, "forward", "all-reduce", whole)
                    if axis == "cp" and grads:
                        yield one(axis, "backward", "all-reduce", whole)
        elif action.kind == "cross_entropy":
            yield from self._loss(event, action, one)
        elif action.kind == "attention":
            yield from self._attention(event, action, one)

    def _loss(self, event: Event, action: Action, one: Any) -> Iterator[Collective]:
        classes, tokens = action.value
        if classes is not None:
            count = (prod(event.operands[1][1]) // prod(self._splits(tokens)),)
            yield one("tp", "forward", "all-reduce", count, small=True)
            yield one("tp", "forward", "all-reduce", count, small=True)
        mean = not {"sum", "none"} & {x for x in event.literals if isinstance(x, str)}
        for axis, _ in tokens:
            if "none" in event.literals:
                yield one(axis, "forward", "all-gather", event.global_shapes[1], small=True)
                continue
            yield one(axis, "forward", "all-reduce", (), small=True)
            if axis == "cp":
                yield one(axis, "backward", "all-reduce", (), small=True)
            if mean:
                yield one(axis, "forward", "all-reduce", (), small=True)

    def _splits(self, tokens: Any) -> list[int]:
        return [self.degrees[AXES.index(axis)] for axis, _ in tokens]

    def _attention(self, event: Event, action: Action, one: Any) -> Iterator[Collective]:
        cp, whole = self.degrees[0], {}
        for name, (_, local) in zip("qkv", event.operands, strict=False):
            whole[name] = (*local[:-2], local[-2] * cp, local[-1])
        both = (prod(whole.get("k", whole["q"])) + prod(whole.get("v", whole["q"])),)
        if action.value == "all_gather":
            yield one("cp", "forward", "all-gather", both)
            yield one("cp", "backward", "reduce-scatter", both)
        elif action.value == "ulysses":
            for shape in (*whole.values(), whole["q"]):
                yield one("cp", "forward", "all-to-all", shape)
                yield one("cp", "backward", "all-to-all", shape)
        else:
            part = (both[0] // cp,)
            for _ in range(cp - 1):
                yield one("cp", "forward", "exchange", part)
                yield one("cp", "backward", "exchange", part)
            for _ in range(cp):
                yield one("cp", "backward", "exchange", part)


_STEPS: Mapping[str, Mapping[str, tuple[tuple[str, str], ...]]] = {
    "tp": {
        "gather": (("forward", "all-gather"),),
        "gather_vary": (("forward", "all-gather"), ("backward", "reduce-scatter")),
        "split": (("backward", "all-gather"),),
        "vary": (("backward", "all-reduce"),),
        "select": (("backward", "all-reduce"),),
    },
    "cp": {"gather": (("forward", "all-gather"), ("backward", "reduce-scatter")), "split": ()},
}
"""What each step of a fix communicates; see ``sharding/collectives.py``."""


_LINEAR = {"add", "sub", "neg", "sum", "mean", "cat", "stack", "to", "float", "type_as"}
_LINEAR |= {f"__{sign}{name}__" for name in ("add", "sub") for sign in ("", "r", "i")}
_LINEAR |= {"contiguous", "clone", "expand", "repeat", "squeeze", "unsqueeze", "permute", "T", "mT"}
_LINEAR |= {"view", "reshape", "flatten", "unflatten", "transpose", "movedim", "chunk", "split"}
_LINEAR |= {"__getitem__", "narrow", "unbind", "view_as", "__neg__", "add_", "sub_", "swapaxes"}
_SCALED = {"mul", "__mul__", "__rmul__", "div", "__truediv__"}


def _saves(event: Event) -> bool:
    """Say whether a torch call saves something for its backward."""
    if not any(event.wants_grad) or is_query(event.name) or event.name in _LINEAR:
        return False
    if event.name == "dropout":
        return not any(x == 0 for x in event.literals if isinstance(x, (bool, float)))
    return event.name not in _SCALED or len(event.operands) > 1


def collectives(
    trace: Trace, blocks: Collection[str] = (), remat: str | None = None
) -> tuple[Collective, ...]:
    """Return the collectives over ``tp`` and ``cp`` of one microbatch's forward and backward.

    Args:
        blocks: names of the blocks that are recomputed in the way of ``remat``. A recomputation
            stops when it comes to its last call that saves something for backward, so that what
            the forward communicates after that is not repeated.
    """
    if trace.degrees == (1, 1):
        return ()
    return tuple(_Reader(trace.degrees, blocks, remat).read(trace.root))


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
    from .sharding.buckets import pack  # needs DTensor, which takes half a second to import

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
    dtype = plan.options.compute_dtype(params[0].dtype)
    yield StepCollective(unit, "all-gather", 1 if keeps else again * microbatches, elements, dtype)
    dtype = params[0].dtype if plan.options.precision is None else torch.float32
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

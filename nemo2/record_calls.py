"""The torch calls of a planning run: the layout of each result, and the action it needs.

Every call is recorded in the module whose forward made it, with when each parameter and each value
was used, counted in blocks. Nothing is computed and no parameter memory is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from .pipeline.absent import (
    REAL_CONSTRUCTORS,
    Absent,
    absent_call,
    is_absent,
    is_inplace,
    name_of,
    to_meta,
    user_line,
)
from .pipeline.shapes import memory
from .pytree import tree_flatten, tree_leaves
from .randomness import draws
from .sharding.calls import Call, Decision, Scene, differentiable, refuse
from .sharding.decide import decide
from .sharding.dropout import is_dropout
from .sharding.functions import check_function
from .sharding.layout import AXES, WHOLE, Layout, Sharding, local_shape, sharding
from .sharding.modes import COMPOSITE, Watcher, is_uncounted
from .sharding.rules import is_query
from .trace import (
    Activation,
    BlockOutput,
    Entry,
    Event,
    Notes,
    Value,
    identity,
    saved_hooks,
)

_SCALAR_READS = {"item": 1.0, "__float__": 1.0, "tolist": 1.0}


@dataclass(frozen=True)
class Setting:
    """What a planning run takes as given.

    Attributes:
        degrees: sizes of the axes ``(cp, tp)``.
        scatter: whether sums over ``tp`` leave activations split along the sequence.
        attention: the method of attention over ``cp``.
        sequence: number of a torch call -> where the sequence is in its first result.
        entries: (module, n-th call) -> what happens to its arguments on the way in.
        exits: (module, n-th call) -> axes over which what it returns is gathered.
        by_module: what code is taken as a whole when it reads values: the module that does, or
            the block that it is in.
    """

    degrees: tuple[int, int] = (1, 1)
    scatter: bool = False
    attention: str = "ring"
    sequence: Mapping[int, tuple[Layout, ...]] = field(default_factory=dict)
    entries: Mapping[tuple[str, int], tuple[Entry, ...]] = field(default_factory=dict)
    exits: Mapping[tuple[str, int], tuple[str, ...]] = field(default_factory=dict)
    by_module: bool = False


class CallRecorder(Watcher):
    """Watch all torch calls of one planning run."""

    def __init__(self, setting: Setting, blocks: Mapping[str, int]) -> None:
        super().__init__()
        self.setting, self.block_index = setting, blocks
        self.degrees = setting.degrees
        self.axes = tuple(a for a, n in zip(AXES, self.degrees, strict=True) if n > 1)
        self.stack = [Activation("", 0, False, None)]
        self.root = self.stack[0]
        self.numbers = 0
        self.position = -1
        self.param_uses: dict[str, set[int]] = {}
        self.param_scopes: dict[str, set[tuple[str, ...]]] = {}
        self.partial_uses: dict[str, list[tuple[int, int]]] = {}
        self.full_uses: set[str] = set()
        self.values: dict[int, Value] = {}
        self.block_outputs: dict[int, BlockOutput] = {}
        self.ordinals: dict[str, int] = {}
        self.functions: list[type] = []  # custom autograd functions that are running
        self.copied: set[int] = set()  # memory of which some views were gathered
        self.notes = Notes()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITE:
            return self.opened(func, args, kwargs)
        if is_uncounted(func):
            return func(*args, **kwargs)
        name = name_of(func)
        number = self.numbers
        self.numbers += 1
        leaves = tree_leaves((args, kwargs))
        absents = [x for x in leaves if is_absent(x)]
        if not absents:
            out = func(*args, **kwargs)
            literals = tuple(x for x in leaves if not isinstance(x, Tensor))
            event = Event(number, name, None, literals, (), (), ())
            if is_dropout(name):
                event.output_shapes = tuple(tuple(x.shape) for x in tree_leaves(out))
            self._note_draws(event, args, kwargs)
            self.stack[-1].items.append(event)
            return out
        if name in _SCALAR_READS and absents[0].meta.numel() == 1 and self.after_blocks():
            self.stack[-1].items.append(Event(number, name, None, (), (), (), ()))
            return _SCALAR_READS[name]
        if not is_query(name):
            self._note_uses(absents)
        return self._absent(number, name, func, args, kwargs)

    def _absent(
        self, number: int, name: str, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        scene = Scene(
            self.degrees,
            self.setting.sequence.get(number, ()),
            self.setting.scatter and not (self.before_blocks() and self.degrees[0] > 1),
            any(a.block is not None for a in self.stack),
            self.setting.attention,
        )
        calls = [Call(name, func, args, kwargs, scene, axis) for axis in self.axes or AXES[1:]]
        call = calls[-1]
        out = self._made(name, func, args, kwargs)
        decision = self._decide(number, calls, out)
        outs = [x for x in tree_leaves(out) if is_absent(x)]
        grad = (
            name not in ("detach", "data", *REAL_CONSTRUCTORS)
            and (torch.is_grad_enabled() or bool(self.functions))
            and any(op.needs_grad for op in call.operands)
        )
        layouts = decision.layouts if outs else ()  # a constructor gives real tensors
        for leaf, (x, own) in enumerate(zip(outs, layouts or (WHOLE,) * len(outs), strict=True)):
            if x.key is None and x.param is None:
                self._born(x, ("call", number, leaf), own)
                x.needs_grad = grad and differentiable(x.meta)
                x.unusable = decision.unusable
        if grad and is_inplace(name):
            self._spread_gradient(call.operands[0].meta)
        event = self._event(number, calls, decision, out, outs)
        self._note_draws(event, args, kwargs)
        self.stack[-1].items.append(event)
        return out

    def _made(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the result of a call; in a block also what a constructor makes is absent.

        Blocks may write absent values into it; and no other stage recomputes what is in them.
        """
        out = absent_call(func, args, kwargs)
        if name in REAL_CONSTRUCTORS and self._in_block():
            home = next(x.home for x in tree_leaves((args, kwargs)) if is_absent(x))
            return Absent(to_meta(out), home)
        return out

    def _in_block(self) -> bool:
        return not self.block_index or self._block() is not None

    def _block(self) -> int | None:
        return next((a.block for a in reversed(self.stack) if a.block is not None), None)

    def _note_draws(self, event: Event, args: Any, kwargs: Any) -> None:
        """Say whether a checkpoint runs the call again, and how it draws random numbers."""
        activation = self.stack[-1]
        event.again = (
            saved_hooks() is not activation.hooks
            or CheckpointFunction in self.functions[activation.depth :]
        )
        event.draws = draws(event.name, args, kwargs)

    def _spread_gradient(self, written: Tensor) -> None:
        """After a write in place a gradient flows through all that shares the memory."""
        changed = memory(written)
        for value in self.values.values():
            if memory(value.absent.meta) == changed and differentiable(value.absent.meta):
                value.absent.needs_grad = True

    def _check_memory(self, call: Call, out: Any) -> None:
        """Refuse a write in place into a tensor whose view is a copy, and so would not see it."""
        if is_inplace(call.name) and memory(call.operands[0].meta) in self.copied:
            raise refuse(call, "writes in place into memory shared with")
        results = {memory(x) for x in tree_leaves(out) if isinstance(x, Tensor)}
        for op in call.operands:
            if any(step != "vary" for step, _ in op.steps) and memory(op.meta) in results:
                self.copied.add(memory(op.meta))

    def _decide(self, number: int, calls: Sequence[Call], out: Any) -> Decision:
        out, call = to_meta(out), calls[-1]
        decision = decide(calls, out)
        for own in calls:
            self._check_memory(own, out)
        check_function(call, decision, self.functions)
        partial = {param for param, _ in decision.partial_params}
        for param, leaf in decision.partial_params:
            self.partial_uses.setdefault(param, []).append((number, leaf))
        if not is_query(call.name):
            whole = {op.param for op in call.operands if op.param and op.entry.replicated}
            self.full_uses |= whole - partial
        return decision

    def _event(
        self,
        number: int,
        calls: Sequence[Call],
        decision: Decision,
        out: Any,
        outs: Sequence[Absent],
    ) -> Event:
        call = calls[-1]
        shapes = tuple(self._local(x) for x in outs)
        layouts = tuple(
            sharding(**{c.axis: c.operands[i].entry for c in calls})
            for i in range(len(call.operands))
        )
        operands = tuple(
            (
                identity(call.leaves[op.leaves[0]]),
                local_shape(tuple(op.meta.shape), own, self.degrees),
            )
            for op, own in zip(call.operands, layouts, strict=True)
        )
        literals = tuple(x for x in call.leaves if not isinstance(x, Tensor))
        event = Event(
            number,
            call.name,
            decision.action,
            literals,
            operands,
            shapes,
            tuple(x.layouts for x in outs),
            tuple(tuple(x.meta.shape) for x in outs),
        )
        event.output = self._shape_of_output(out)
        event.wants_grad = tuple(op.needs_grad for op in call.operands)
        event.operand_leaves = tuple(op.leaves for op in call.operands)
        event.operand_layouts = layouts
        event.global_shapes = tuple(tuple(op.meta.shape) for op in call.operands)
        event.dtype = next(
            (op.meta.dtype for op in call.operands if op.meta.is_floating_point()), None
        )
        return event

    def _shape_of_output(self, out: Any) -> Any:
        leaves, spec = tree_flatten(out)
        local = [
            ("tensor", self._local(x), x.meta.dtype) if is_absent(x) else ("const", x)
            for x in leaves
        ]
        return spec, local

    def _local(self, x: Absent) -> tuple[int, ...]:
        return local_shape(tuple(x.meta.shape), x.layouts, self.degrees)

    def _born(self, x: Absent, key: tuple[Any, ...], layouts: Sharding) -> None:
        x.key, x.layouts = key, layouts
        value = self.values[id(x)] = Value(key, x, self.position, len(self.values))
        value.block = self._block()

    def _note_uses(self, absents: Sequence[Absent]) -> None:
        for x in absents:
            if x.unusable is not None:
                raise x.unusable
            if x.param is not None:
                self.param_uses.setdefault(x.param, set()).add(self.position)
                scope = tuple(a.module for a in self.stack)
                self.param_scopes.setdefault(x.param, set()).add(scope)
            elif id(x) in self.values:
                value = self.values[id(x)]
                value.uses.add(self.position)
                if value.block is not None and value.block != self._block():
                    self.notes.escaped.add((value.block, self.position, user_line()))

    def before_blocks(self) -> bool:
        """Say whether no block has been called: there the sequence is not split over ``cp``."""
        return bool(self.block_index) and self.position == -1

    def after_blocks(self) -> bool:
        """Say whether every block has been called and none is running."""
        inside = any(a.block is not None for a in self.stack)
        return not inside and self.position == len(self.block_index) - 1

"""Which modules may run their own code on local tensors with no help: shown by a second run.

The first run of the plan saw global sizes. Here the step runs again on *local* shapes, with
the planned collectives at the edges, and every call is compared with what was planned: the
same operations in the same order on the same values, the same non-tensor arguments, and
results of the planned local shapes. A module that differs anywhere (a size computed from a
local shape, a head count that is global) is emulated: it sees global sizes and each call is
translated. So nothing depends on shapes alone: ``(x @ a) * (x @ a).shape[-1] ** -0.5`` has
the right shapes, but a different argument, and is found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..pipeline.absent import Absent, NeedsValueError, is_absent, name_of, to_meta
from ..places import within
from ..planning import run_step
from ..pytree import tree_leaves, tree_unflatten
from ..record import Recorder, is_leaf
from ..record_calls import Setting
from ..trace import Activation, Event, Trace, identity
from .actions import Action, Fix
from .layout import Sharding, local_shape
from .modes import COMPOSITE, is_uncounted
from .scripts import Programs, installable, needing, programs

EVERYTHING = "*"  # what to blame when each run takes another path
_SIZES_REPLACED = ("constant", "reshape", "expand")  # kinds whose own arguments are not used


class _DiffersError(Exception):
    """The local run left the planned path."""


def prove(
    trace: Trace,
    setting: Setting,
    blocks: Mapping[str, int],
    captured: set[tuple[Any, ...]],
    attempt: Callable[[Prover], str | None],
) -> Programs:
    """Return the programs of the step, emulating only modules whose own code is not enough.

    Args:
        attempt: runs the step on local shapes under a prover; returns the module to emulate,
            or None when the run was the planned one.
    """
    if setting.degrees == (1, 1):
        return programs(trace, needing(trace, soft=False, kind="dropout"), captured)
    emulated = needing(trace, soft=False)
    undecided = needing(trace, soft=True) - emulated
    for _ in range(len(undecided) + 1):
        blame = attempt(Prover(setting, blocks, trace, emulated))
        if blame == EVERYTHING:
            break
        if blame is None:
            proved = tuple(sorted(undecided - emulated))
            return replace(programs(trace, emulated, captured), proved=proved)
        emulated |= _alike(trace, blame)
    return programs(trace, emulated | undecided, captured)


def _alike(trace: Trace, module: str) -> set[str]:
    """Return ``module`` and all modules whose forward made the same calls."""

    def signature(activation: Activation) -> tuple[Any, ...]:
        return tuple((e.name, e.results, e.action is None) for e in activation.events())

    wanted = {signature(a) for a in trace.root.walk() if a.module == module}
    return {module} | {
        a.module for a in trace.root.walk() if a.module and not a.leaf and signature(a) in wanted
    }


class Prover(Recorder):
    """Run the step on local shapes and compare each call with the trace."""

    def __init__(
        self, setting: Setting, blocks: Mapping[str, int], trace: Trace, emulated: set[str]
    ) -> None:
        super().__init__(setting, blocks)
        self.emulated = emulated
        self.expected: dict[int, tuple[Activation, Event]] = {}
        for activation in trace.root.walk():
            for event in activation.events():
                self.expected[event.number] = (activation, event)
        self.closed = {
            (a.module, a.ordinal): a.closed[0] for a in trace.root.walk() if a.closed is not None
        }
        self.culprit: list[Activation] = []
        self.repeated = trace.repeated

    def _run(
        self, activation: Activation, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if (activation.module, activation.ordinal) in self.closed:
            raise NeedsValueError("known from the first run")
        return super()._run(activation, forward, args, kwargs)

    def _whole_shape(self, activation: Activation, like: Absent) -> tuple[int, ...]:
        return self.closed[activation.module, activation.ordinal]

    def apart(self, block: str) -> Any:
        """Return what tells a block from others here: its record, and what of it is emulated."""
        inside = {n for n in self.emulated if within(n, block)}
        return self.repeated.get(block, block), frozenset(n[len(block) :] for n in inside)

    def attempt(self, step: Callable[[], Any]) -> str | None:
        """Return None when the local run is the planned one, else the module to emulate.

        EVERYTHING stands for all modules: no single one is to blame.
        """
        try:
            run_step(step, self)
            if self.numbers == len(self.expected):
                return None
            self.culprit = [self.root]
        except Exception as error:  # an error of user code on local sizes: it needs global ones
            if self._blame() is None and not isinstance(error, _DiffersError):
                raise
        return self._blame() or EVERYTHING

    def _blame(self) -> str | None:
        for activation in reversed(self.culprit):
            if not activation.leaf and activation.module not in self.emulated:
                return activation.module
        return None

    def call_module(
        self, name: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        depth = len(self.culprit)
        try:
            return super().call_module(name, module, forward, args, kwargs)
        except BaseException:
            if len(self.culprit) == depth:
                self.culprit = self.culprit or [
                    *self.stack,
                    Activation(name, 0, is_leaf(module), None),
                ]
            raise

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in COMPOSITE:
            return self.opened(func, args, kwargs or {})
        if is_uncounted(func):
            return func(*args, **(kwargs or {}))
        activation, event = self.expected.get(self.numbers, (None, None))
        if activation is None or event is None or event.name != name_of(func):
            raise self._differs()
        if activation.module != self.stack[-1].module:
            raise self._differs()
        action = event.action
        if action is None or action.kind not in _SIZES_REPLACED:
            found = [x for x in tree_leaves((args, kwargs or {})) if not isinstance(x, Tensor)]
            if not _same(found, event.literals):
                raise self._differs()
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except BaseException:
            self.culprit = self.culprit or list(self.stack)
            raise

    def _differs(self) -> _DiffersError:
        self.culprit = self.culprit or list(self.stack)
        return _DiffersError()

    def _translated(self, activation: Activation) -> bool:
        """Say whether this call runs under ``Emulate`` or an installed forward."""
        return activation.module in self.emulated or installable(activation) is not None

    def _absent(
        self, number: int, name: str, func: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        activation, event = self.expected[number]
        action = event.action
        if not self._same_operands(event, tree_leaves((args, kwargs))):
            raise self._differs()
        if action is not None and self._translated(activation):
            return self._planned(event, action, (args, kwargs))
        if action is not None and not action.soft:
            raise self._differs()
        out = self._made(name, func, args, kwargs)
        outs = [x for x in tree_leaves(out) if is_absent(x)]
        if tuple(tuple(x.meta.shape) for x in outs) != event.results:
            raise self._differs()
        self._name(number, outs, event)
        return out

    def _stand_in(
        self, shape: tuple[int, ...], dtype: torch.dtype, layouts: Sharding, home: torch.device
    ) -> Absent:
        return Absent.like(local_shape(shape, layouts, self.degrees), dtype, home)

    def _same_operands(self, event: Event, leaves: Sequence[Any]) -> bool:
        tensors = {id(x): x for x in leaves if isinstance(x, Tensor)}
        found = tuple((identity(x), tuple(to_meta(x).shape)) for x in tensors.values())
        return found == event.operands

    def _planned(self, event: Event, action: Action, given: Any) -> Any:
        if action.kind == "constant":
            return action.value
        spec, leaves = event.output
        device = next(x.home for x in tree_leaves(given) if is_absent(x))
        made = [Absent.like(x[1], x[2], device) if x[0] == "tensor" else x[1] for x in leaves]
        self._name(event.number, [x for x in made if is_absent(x)], event)
        return tree_unflatten(spec, made)

    def _name(self, number: int, outs: Sequence[Absent], event: Event) -> None:
        for leaf, (x, layout) in enumerate(zip(outs, event.layouts, strict=True)):
            if x.key is None and x.param is None:
                self._born(x, ("call", number, leaf), layout)


def _same(found: Sequence[Any], planned: Sequence[Any]) -> bool:
    """Compare arguments that are not tensors; objects without an equality of their own by type."""
    if len(found) != len(planned):
        return False
    for a, b in zip(found, planned, strict=True):
        plain = type(b) is type(a) and _without_equality(type(a))
        if not (a is b or plain or _equal(a, b)):
            return False
    return True


def _without_equality(kind: Any) -> bool:
    return kind.__eq__ is object.__eq__


def _equal(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b or a != a)
    except ValueError:  # an array: its elements are compared
        return repr(a.shape) == repr(b.shape) and bool((a == b).all())


def vary_mixed(trace: Trace, params: Sequence[str]) -> None:
    """Let parameters used both inside and outside split regions enter those regions explicitly.

    Elsewhere the sum of their gradient over ``tp`` waits for the end of the step; here the
    two kinds of use would be summed alike.
    """
    events = {e.number: e for a in trace.root.walk() for e in a.events()}
    for param in params:
        for number, leaf in trace.partial_uses[param]:
            event = events[number]
            leaves = next(own for own in event.operand_leaves if leaf in own)
            fix = Fix(leaves, (("vary", "tp", None),))
            old = event.action or Action(event.name)
            event.action = replace(old, fixes=(*old.fixes, fix), soft=False)

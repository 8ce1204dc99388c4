"""Blocks that are alike are planned once: what one did is what the next would do.

The first of them runs as any code does. A later one of the same structure, called with arguments of
the same layouts, shapes and dtypes, gets a copy of the record under its own names and numbers, and
its code does not run. Whatever could make its code do something else makes it run: other
attributes, hooks, random numbers, objects that it could change, an attribute that is written. A
number that alone differs (``layer_idx``) is allowed for as long as nobody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .pipeline.absent import Absent, is_absent, to_meta
from .pipeline.shapes import memory
from .places import within
from .pytree import tree_flatten, tree_leaves, tree_unflatten
from .sharding.annotate import OWN_ATTRIBUTES
from .trace import Activation, BlockOutput, Event, Value, identity, saved_hooks

if TYPE_CHECKING:
    from .record import Recorder

_T = TypeVar("_T")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_SMALL = 1 << 16  # bytes of a buffer whose values are compared
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
)
# What the rest of a module's print tells better, and annotations, of which layouts tell.
_INNER = frozenset({"_parameters", "_buffers", "_modules", "training", "forward", *OWN_ATTRIBUTES})


class _UnlikeError(Exception):
    """A block does, or might do, something else than the one before."""


class Numbers:
    """Attributes of some classes that differ from block to block, and how often they were read.

    Attributes:
        names: of each class.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self.touched = 0
        found: dict[tuple[str, type, str], set[int]] = {}
        by_name = dict(model.named_modules())
        for name in blocks:
            for inner, sub in by_name[name].named_modules() if name in by_name else ():
                for key, value in vars(sub).items():
                    if type(value) is int and not any(key in vars(c) for c in type(sub).__mro__):
                        found.setdefault((inner, type(sub), key), set()).add(value)
        self.names: dict[type, set[str]] = {}
        for (_, kind, key), values in found.items():
            if len(values) > 1:
                self.names.setdefault(kind, set()).add(key)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count the uses of these attributes."""
        with ExitStack() as undo:
            for kind, names in self.names.items():
                for name in names:
                    setattr(kind, name, _Counted(self, name))
                    undo.callback(delattr, kind, name)
            yield


class _Counted:
    """A property that counts, of a number that its object holds."""

    def __init__(self, numbers: Numbers, name: str) -> None:
        self.numbers, self.name = numbers, name

    def __get__(self, owner: Any, kind: type) -> Any:
        self.numbers.touched += 1
        if owner is None or self.name not in vars(owner):
            raise AttributeError(self.name)
        return vars(owner)[self.name]

    def __set__(self, owner: Any, value: Any) -> None:
        self.numbers.touched += 1
        vars(owner)[self.name] = value

    def __delete__(self, owner: Any) -> None:
        self.numbers.touched += 1
        del vars(owner)[self.name]


@dataclass
class _Known:
    """What a block did, and what it was given and gave.

    Attributes:
        numbers: how many torch calls it made.
        given, gave: leaves of its arguments and of its result.
        counts: how often each inner module was called.
        scopes, partial, full: how it used its parameters.
        output: what it returns, where blocks may be absent.
    """

    name: str
    activation: Activation
    numbers: int
    given: list[Any]
    gave: list[Any]
    spec: Any
    counts: dict[str, int]
    scopes: dict[str, frozenset[tuple[str, ...]]]
    partial: dict[str, list[tuple[int, int]]]
    full: list[str]
    output: BlockOutput | None


class Repeats:
    """The blocks of one planning run that may be copied from others.

    Attributes:
        repeated: block -> the one whose record it got.
        apart: of a block, what else tells it from others in this run.
    """

    def __init__(
        self,
        blocks: Sequence[str],
        numbers: Numbers,
        apart: Callable[[str], Any] = lambda name: None,
    ) -> None:
        self.blocks, self.numbers, self.apart = frozenset(blocks), numbers, apart
        self.known: dict[Any, _Known] = {}
        self.repeated: dict[str, str] = {}

    def call(
        self, recorder: Recorder, name: str, module: nn.Module, args: Any, kwargs: Any
    ) -> _Call | None:
        """Return the call of a block, or None if it must run and is not kept."""
        if name not in self.blocks or recorder.functions or saved_hooks() is not None:
            return None
        names = [f"{name}.{inner}" if inner else name for inner, _ in module.named_modules()]
        params = [f"{name}.{leaf}" for leaf, _ in module.named_parameters()]
        if recorder.ordinals.keys() & names or recorder.param_uses.keys() & params:
            return None
        try:
            return _Call(self, recorder, name, module, (args, kwargs), names, params)
        except _UnlikeError:
            return None

    def state(self, recorder: Recorder) -> tuple[Any, ...]:
        """Return what a block that can be copied leaves as it is."""
        notes = recorder.notes
        kept = (len(notes.escaped), len(notes.reentrant), len(notes.closed), len(notes.draws))
        return (*kept, notes.router_logits, self.numbers.touched)

    def describe(self, block: str, module: nn.Module) -> Any:
        """Return what tells how a block works: equal ones do the same with the same arguments.

        Raises: _UnlikeError for what might do something else each time.
        """
        found = []
        for inner, sub in module.named_modules():
            name = f"{block}.{inner}" if inner else block
            own = vars(sub)
            watches, forward = getattr(own.get("forward"), "nemo2_watches", (None, None))
            if watches != name or any(own.get(h) for h in _HOOKS):
                raise _UnlikeError
            skipped = self.numbers.names.get(type(sub), ())
            facts = [
                (key, _token(value))
                for key, value in own.items()
                if key not in _INNER and key not in skipped and key not in _HOOKS
            ]
            params = [(k, _parameter(x, f"{name}.{k}")) for k, x in sub._parameters.items()]
            buffers = [(k, _values(x)) for k, x in sub._buffers.items()]
            modules = [(k, None if x is None else type(x)) for k, x in sub._modules.items()]
            held = map(tuple, (facts, params, buffers, modules))
            found.append((inner, type(sub), id(forward), sub.training, *held))
        return tuple(found)


class _Call:
    """A call of a block: what tells it from others, and the recorder as it was before it.

    Raises: _UnlikeError if it has something about it that nothing else can be alike to.
    """

    def __init__(
        self,
        repeats: Repeats,
        recorder: Recorder,
        name: str,
        module: nn.Module,
        given: Any,
        names: list[str],
        params: list[str],
    ) -> None:
        self.repeats, self.recorder, self.name, self.module = repeats, recorder, name, module
        self.given, self.names, self.params = given, names, params
        self.facts = self._facts()
        place = tuple(a.module for a in recorder.stack)
        self.key = (self.facts, place, torch.is_grad_enabled(), _autocast(), repeats.apart(name))
        self.state, self.copied = repeats.state(recorder), frozenset(recorder.copied)

    def _facts(self) -> Any:
        return self.repeats.describe(self.name, self.module), _arguments(self.given)

    def again(self) -> _Again | None:
        """Return what an earlier block did, as this one would do it; None if it has to run."""
        known = self.repeats.known.get(self.key)
        if known is None:
            return None
        try:
            return _Again(self.repeats, self.recorder, known, self.name, tree_leaves(self.given))
        except _UnlikeError:
            return None

    def keep(self, activation: Activation, gave: Any) -> None:
        """Keep what the block has done, if another one may do the same."""
        recorder = self.recorder
        events = [e for a in activation.walk() for e in a.events()]
        leaves, spec = tree_flatten(gave)
        inputs = tree_leaves(self.given)
        shown = [x for x in (*inputs, *leaves) if isinstance(x, Tensor)]
        held = {memory(x.meta if is_absent(x) else x) for x in shown}
        try:
            same = self._facts() == self.facts
        except _UnlikeError:
            return
        if (
            not same
            or self.repeats.state(recorder) != self.state
            or any(e.draws and not e.operands for e in events)
            or any(a.closed is not None for a in activation.walk())
            or held & (recorder.copied - self.copied)
            or not all(is_absent(x) or _at(x, inputs) is not None or _plain(x) for x in leaves)
        ):
            return
        used = [n for n in self.params if n in recorder.param_uses]
        self.repeats.known[self.key] = _Known(
            self.name,
            activation,
            recorder.numbers - activation.first,
            inputs,
            leaves,
            spec,
            {n: recorder.ordinals[n] for n in self.names if n in recorder.ordinals},
            {n: frozenset(recorder.param_scopes[n]) for n in used},
            {n: list(recorder.partial_uses[n]) for n in used if n in recorder.partial_uses},
            [n for n in used if n in recorder.full_uses],
            recorder.block_outputs.get(activation.block) if activation.block is not None else None,
        )


class _Again:
    """A copy of what a block did, under the names and numbers of another one.

    Raises: _UnlikeError if the setting says of both something else, or a value is not found again.
    """

    def __init__(
        self,
        repeats: Repeats,
        recorder: Recorder,
        known: _Known,
        name: str,
        inputs: Sequence[Any],
    ) -> None:
        self.repeats, self.recorder, self.known, self.name = repeats, recorder, known, name
        self.inputs = inputs
        self.shift = recorder.numbers - known.activation.first
        self.keys = {
            identity(old): identity(new)
            for old, new in zip(known.given, inputs, strict=True)
            if isinstance(old, Tensor) and identity(old) is not None
        }
        self._check()
        self.activation = self._activation(known.activation)

    def record(self) -> Any:
        """Put it into the record, and return what the block returns."""
        self._count()
        self.repeats.repeated[self.name] = self.known.name
        self.recorder.stack[-1].items.append(self.activation)
        return tree_unflatten(self.known.spec, self._results())

    def _check(self) -> None:
        """See that the setting says of both the same."""
        setting = self.recorder.setting
        for a in self.known.activation.walk():
            one, other = (a.module, a.ordinal), (self._named(a.module), a.ordinal)
            for which in (setting.entries, setting.exits):
                if which.get(one) != which.get(other):
                    raise _UnlikeError
            for e in a.events():
                sequence = setting.sequence
                if sequence.get(e.number) != sequence.get(e.number + self.shift):
                    raise _UnlikeError

    def _named(self, name: str) -> str:
        old = self.known.name
        return self.name + name[len(old) :] if within(name, old) else name

    def _key(self, key: Any) -> Any:
        """Return the name of a value of this block, by that in the other."""
        if key is None:
            return None
        if key in self.keys:
            return self.keys[key]
        if isinstance(key, str):
            if within(key, self.known.name):
                return self._named(key)
        elif key[0] == "call" and key[1] >= self.known.activation.first:
            return ("call", key[1] + self.shift, key[2])
        elif key[0] in ("out", "edge") and within(key[1], self.known.name):
            return (key[0], self._named(key[1]), *key[2:])
        raise _UnlikeError  # it came neither from the arguments nor from the block

    def _activation(self, old: Activation) -> Activation:
        return _with(
            old,
            module=self._named(old.module),
            block=None if old.block is None else self.recorder.block_index[self.name],
            items=[
                self._activation(x) if isinstance(x, Activation) else self._event(x)
                for x in old.items
            ],
            inputs=tuple(_with(x, key=self._key(x.key)) for x in old.inputs),
            outputs=tuple(self._key(x) for x in old.outputs),
            first=old.first + self.shift,
        )

    def _event(self, old: Event) -> Event:
        operands = tuple((self._key(k), shape) for k, shape in old.operands)
        return _with(old, number=old.number + self.shift, operands=operands)

    def _count(self) -> None:
        """Count the uses that the block makes of parameters."""
        recorder, known = self.recorder, self.known
        recorder.numbers += known.numbers
        recorder._note_uses([x for x in self.inputs if is_absent(x)])
        recorder.ordinals.update({self._named(n): k for n, k in known.counts.items()})
        for name, scopes in known.scopes.items():
            recorder.param_uses[self._named(name)] = {recorder.position}
            recorder.param_scopes[self._named(name)] = {tuple(map(self._named, s)) for s in scopes}
        for name, uses in known.partial.items():
            recorder.partial_uses[self._named(name)] = [(n + self.shift, leaf) for n, leaf in uses]
        recorder.full_uses |= set(map(self._named, known.full))
        if known.output is not None:
            assert self.activation.block is not None
            recorder.block_outputs[self.activation.block] = known.output

    def _results(self) -> list[Any]:
        """Return the leaves of the result, with new stand-ins where the block makes them."""
        recorder, made = self.recorder, dict[int, Any]()
        for old in self.known.gave:
            place = _at(old, self.known.given)
            if place is not None:
                made[id(old)] = self.inputs[place]
            elif is_absent(old) and id(old) not in made:
                new = made[id(old)] = Absent(to_meta(old.meta), old.home)
                new.layouts, new.needs_grad = old.layouts, old.needs_grad
                new.entered, new.unusable = old.entered, old.unusable
                new.key = self._key(old.key)
                value = Value(new.key, new, recorder.position, len(recorder.values))
                recorder.values[id(new)] = value
        return [made.get(id(x), x) for x in self.known.gave]


def _with(old: _T, **changed: Any) -> _T:
    """Return a copy of a record; ``dataclasses.replace`` takes ten times as long."""
    new = object.__new__(type(old))
    vars(new).update(vars(old), **changed)
    return new


def _at(x: Any, leaves: Sequence[Any]) -> int | None:
    """Return which of the leaves a tensor is."""
    if not isinstance(x, Tensor):
        return None
    return next((i for i, y in enumerate(leaves) if y is x), None)


def _plain(x: Any) -> bool:
    return isinstance(x, _PLAIN)


def _arguments(given: Any) -> Any:
    """Return what a block can know of its arguments.

    Raises: _UnlikeError for an object that it might change.
    """
    leaves, spec = tree_flatten(given)
    seen: dict[int, int] = {}
    facts: list[Any] = []
    for x in leaves:
        if not isinstance(x, Tensor):
            if not (_plain(x) or isinstance(x, type)):
                raise _UnlikeError
            facts.append((type(x), x))
            continue
        first = seen.setdefault(id(x), len(seen))
        if not is_absent(x):
            facts.append((first, "real", id(x), x._version))
            continue
        if x.param is not None or x.unusable is not None or x.bound is not None:
            raise _UnlikeError
        meta = x.meta
        shares = seen.setdefault(-memory(meta), len(seen))
        flags = x.home, x.layouts, x.needs_grad, x.entered
        facts.append((first, shares, meta.shape, meta.stride(), meta.dtype, *flags))
    return spec, tuple(facts)


def _autocast() -> tuple[Any, ...]:
    return tuple(
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    )


def _token(value: Any) -> Any:
    """Return something hashable that differs where values might be of different effect."""
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_token, value))
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(_token, value))
    if isinstance(value, dict):
        return type(value), tuple((_token(k), _token(v)) for k, v in value.items())
    if _plain(value):
        return type(value), value
    return id(value)


def _parameter(x: Any, name: str) -> Any:
    if x is None:
        return None
    if not is_absent(x) or x.param != name:
        raise _UnlikeError  # it is shared with other places
    return tuple(x.meta.shape), x.meta.dtype, x.layouts, x.needs_grad, x.home


def _values(x: Tensor | None) -> Any:
    if x is None:
        return None
    facts = (tuple(x.shape), x.dtype, is_absent(x))
    if is_absent(x) or x.is_meta:
        return facts
    if x.numel() * x.element_size() > _SMALL:
        return (*facts, id(x))
    with torch._C.DisableTorchFunction():
        return (*facts, bytes(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()))

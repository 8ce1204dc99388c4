"""From one planning run to what is installed: forwards of plain modules, scripts of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ShardingError
from ..trace import Activation, Entry, Trace
from .actions import Action, Script


@dataclass(frozen=True)
class Programs:
    """What runs instead of, or around, the forward of each module that needs it.

    Attributes:
        installed: plain ``nn.Linear`` and ``nn.Embedding`` modules with their action.
        scripts: modules that run under ``Emulate``; ``""`` is the step itself.
        quiet: modules called from an emulated one that run outside of its script.
        proved: modules whose own code was shown to compute the right local sizes.
        entries, exits: modules with the changes of layout of what they get and return.
        closed: modules whose code is not planned: shape and dtype of what they are to return.
    """

    installed: Mapping[str, Action]
    scripts: Mapping[str, Script]
    quiet: frozenset[str] = frozenset()
    proved: tuple[str, ...] = ()
    entries: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    exits: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    closed: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)


def installable(activation: Activation) -> Action | None:
    """Return the one action of a plain module's call, or None when there is none."""
    if not activation.leaf:
        return None
    return next(
        (e.action for e in activation.events() if e.action is not None and not e.action.soft), None
    )


def needing(trace: Trace, *, soft: bool, kind: str | None = None) -> set[str]:
    """Return the modules that need emulation; ``soft``: also those that only need other sizes.

    ``kind``: those with an action of this kind only.
    """
    return {
        activation.module
        for activation in trace.root.walk()
        if not activation.leaf
        for event in activation.events()
        if event.action is not None
        and (soft or not event.action.soft)
        and kind in (None, event.action.kind)
    }


def programs(trace: Trace, emulated: set[str], captured: set[tuple[object, ...]]) -> Programs:
    """Assemble the programs of one step for the modules in ``emulated``."""
    uses: dict[str, set[Action | None]] = {}
    scripts: dict[str, Script] = {}
    quiet: set[str] = set()
    calls = {key[1] for key in captured if key[0] == "call"}
    for activation in trace.root.walk():
        if activation.leaf:
            uses.setdefault(activation.module, set()).add(installable(activation))
        if activation.module in emulated or any(e.number in calls for e in activation.events()):
            script = _script(activation, captured)
            if any(e.again and e.action is not None for e in activation.events()):
                raise _recomputed(activation.module)
            if scripts.setdefault(activation.module, script) != script:
                raise _conflict(activation.module)
            quiet |= {child.module for child in activation.children()}
    merged = {module: _merge(module, actions) for module, actions in uses.items()}
    installed = {module: action for module, action in merged.items() if action is not None}
    quiet -= scripts.keys() | installed.keys()
    activations = list(trace.root.walk())
    entries = {a.module: a.entries for a in activations if a.entries}
    exits = {a.module: a.exits for a in activations if a.exits}
    closed = {a.module: a.closed for a in activations if a.closed is not None}
    for a in activations:
        if a.module in closed and (a.closed, a.entries) != (
            closed[a.module],
            entries.get(a.module, ()),
        ):
            raise _conflict(a.module)
    return Programs(installed, scripts, frozenset(quiet), (), entries, exits, closed)


def _merge(module: str, actions: set[Action | None]) -> Action | None:
    """Return the one action for all calls of a plain module.

    Beside calls that need nothing a ``vary`` may stand: their input carries no gradient.
    """
    some = [action for action in actions if action is not None]
    if not some:
        return None
    steps = {step[0] for action in some for fix in action.fixes for step in fix.steps}
    harmless = some[0].kind == "call" and steps == {"vary"}
    if len(some) > 1 or (None in actions and not harmless):
        raise _conflict(module)
    return some[0]


def _script(activation: Activation, captured: set[tuple[object, ...]]) -> Script:
    actions: dict[int, Action] = {}
    captures: dict[int, tuple[Any, ...]] = {}
    events = list(activation.events())
    for count, event in enumerate(events):
        if event.action is not None:
            actions[count] = event.action
        keys = tuple((key[2], key) for key in captured if key[:2] == ("call", event.number))
        if keys:
            captures[count] = keys
    return Script(activation.module, tuple(e.name for e in events), actions, captures)


def _recomputed(module: str) -> ShardingError:
    return ShardingError(
        f"'{module or 'the step'}' checkpoints a part of its own forward that tensor parallelism"
        " changes: its second run, in backward, would not be changed\n"
        "  options: checkpoint whole submodules | put that part into a module of its own"
    )


def _conflict(module: str) -> ShardingError:
    return ShardingError(
        f"'{module}' is called twice in one step with inputs of different layouts over \"tp\"\n"
        "  (with sequence parallelism also by lengths that tp divides, and does not)\n"
        "  options: sequence_parallel=False | give each use a module of its own"
        " | leave its parameters replicated"
    )

"""From one planning run to what is installed: forwards of plain modules, and scripts of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import ShardingError
from ..trace import Activation, Event, Trace
from .actions import Action, Script


@dataclass(frozen=True)
class Programs:
    """What runs instead of, or around, the forward of each module that needs it.

    Attributes:
        installed: plain ``nn.Linear`` and ``nn.Embedding`` modules with their action.
        scripts: modules that run under ``Emulate``; ``""`` is the step itself.
        proved: modules whose own code was shown to compute the right local sizes.
    """

    installed: Mapping[str, Action]
    scripts: Mapping[str, Script]
    proved: tuple[str, ...] = ()


def installable(activation: Activation) -> Action | None:
    """Return the one action of a plain module's call, or None when there is none."""
    if not activation.leaf:
        return None
    return next((e.action for e in activation.events() if e.action is not None and not e.action.soft), None)


def needing(trace: Trace, *, soft: bool) -> set[str]:
    """Return the modules that need emulation; ``soft``: also those that only need other sizes."""
    return {
        activation.module
        for activation in trace.root.walk()
        if not activation.leaf
        for event in activation.events()
        if event.action is not None and (soft or not event.action.soft)
    }


def counted(activation: Activation, emulated: set[str]) -> Iterator[Event]:
    """Yield the events that ``Emulate`` counts while it runs ``activation``, in order."""
    for item in activation.items:
        if isinstance(item, Event):
            yield item
        elif item.block is None and item.module not in emulated and installable(item) is None:
            yield from counted(item, emulated)


def programs(trace: Trace, emulated: set[str], captured: set[tuple[object, ...]]) -> Programs:
    """Assemble the programs of one step for the modules in ``emulated``."""
    captured_calls = {key[1] for key in captured if key[0] == "call"}
    if captured_calls:
        emulated = emulated | {""}
    installed: dict[str, Action] = {}
    scripts: dict[str, Script] = {}
    for activation in trace.root.walk():
        action = installable(activation)
        if action is not None and installed.setdefault(activation.module, action) != action:
            raise _conflict(activation.module)
        if activation.module in emulated:
            script = _script(activation, emulated, captured)
            if scripts.setdefault(activation.module, script) != script:
                raise _conflict(activation.module)
    return Programs(installed, scripts)


def _script(activation: Activation, emulated: set[str], captured: set[tuple[object, ...]]) -> Script:
    actions: dict[int, Action] = {}
    captures: dict[int, tuple[tuple[int, tuple[object, ...]], ...]] = {}
    count = 0
    for count, event in enumerate(counted(activation, emulated), start=1):
        if event.action is not None:
            actions[count - 1] = event.action
        keys = tuple((key[2], key) for key in captured if key[:2] == ("call", event.number))
        if keys:
            captures[count - 1] = keys  # type: ignore[assignment]
    return Script(activation.module, actions, captures, count)  # type: ignore[arg-type]


def _conflict(module: str) -> ShardingError:
    return ShardingError(
        f"'{module}' is called twice in one step with inputs of different layouts over \"tp\"\n"
        "  options: give each use a module of its own | leave its parameters replicated"
    )

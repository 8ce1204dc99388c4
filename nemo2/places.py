"""Where a module holds its parameters, and what dotted names say of places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Place:
    """One attribute of one module that holds a parameter.

    Attributes:
        param: the parameter's first name; ``names``: those of this place, several when the
            module is shared.
    """

    param: str
    names: tuple[str, ...]
    module: nn.Module
    leaf: str


def places(model: nn.Module) -> tuple[Place, ...]:
    """Return every place of ``model`` that holds a parameter, ties included."""
    first: dict[int, str] = {}
    names: dict[tuple[nn.Module, str], list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, param in module._parameters.items():
            if param is not None:
                name = f"{prefix}.{leaf}" if prefix else leaf
                first.setdefault(id(param), name)
                names.setdefault((module, leaf), []).append(name)
    return tuple(
        Place(first[id(module._parameters[leaf])], tuple(own), module, leaf)
        for (module, leaf), own in names.items()
    )


def in_order(modules: Iterable[nn.Module], where: Sequence[Place]) -> None:
    """List the parameters of ``modules`` in the order of ``where``, which is the user's.

    What is put into a module's places for a while stands last, and a loop over
    ``module.parameters()`` would meet it on one stage earlier than on another.
    """
    leaves: dict[nn.Module, list[str]] = {module: [] for module in modules}
    for place in where:
        if place.module in leaves:
            leaves[place.module].append(place.leaf)
    for module, own in leaves.items():
        held = module._parameters
        for leaf in own:
            if leaf in held:
                held[leaf] = held.pop(leaf)


def within(name: str, module: str) -> bool:
    """Say whether a dotted name is that of a module or of something inside of it."""
    return name == module or name.startswith(f"{module}.")

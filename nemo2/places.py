"""Where a module holds its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Place:
    """One attribute of one module that holds a parameter, under the parameter's first name."""

    param: str
    name: str
    module: nn.Module
    leaf: str


def places(model: nn.Module) -> tuple[Place, ...]:
    """Return every place of ``model`` that holds a parameter, ties included."""
    first: dict[int, str] = {}
    found = []
    for prefix, module in model.named_modules():
        for leaf, param in module._parameters.items():
            if param is not None:
                name = f"{prefix}.{leaf}" if prefix else leaf
                found.append(Place(first.setdefault(id(param), name), name, module, leaf))
    return tuple(found)

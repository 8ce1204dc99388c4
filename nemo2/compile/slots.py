"""The tensors that a block's code reads from its modules: inputs of its graph."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..pipeline.absent import is_absent


class Slots:
    """Where the modules of a block hold tensors; what one object fills is one input.

    Attributes:
        places: for each input the (attributes, key) pairs that hold it.
    """

    places: tuple[tuple[tuple[MutableMapping[str, Any], str], ...], ...]

    def __init__(self, block: nn.Module) -> None:
        found: dict[int, list[tuple[MutableMapping[str, Any], str]]] = {}
        for module in block.modules():
            for attributes in (module.__dict__, module._parameters, module._buffers):
                for key, value in attributes.items():
                    if isinstance(value, Tensor) and not is_absent(value):
                        found.setdefault(id(value), []).append((attributes, key))
        self.places = tuple(tuple(same) for same in found.values())
        self._first = tuple(same[0] for same in self.places)

    def read(self) -> list[Tensor]:
        """Return what is there now."""
        return [attributes[key] for attributes, key in self._first]

    def hold(self, values: Sequence[Tensor]) -> bool:
        """Say whether all of ``values`` are there."""
        return all(
            attributes.get(key) is value
            for same, value in zip(self.places, values, strict=True)
            for attributes, key in same
        )

    @contextmanager
    def holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Put ``values`` there for a time."""
        before = [[attributes[key] for attributes, key in same] for same in self.places]
        for same, value in zip(self.places, values, strict=True):
            for attributes, key in same:
                attributes[key] = value
        try:
            yield
        finally:
            for same, old in zip(self.places, before, strict=True):
                for (attributes, key), value in zip(same, old, strict=True):
                    attributes[key] = value


def scalars(block: nn.Module) -> list[dict[str, Any]]:
    """Return the numbers, strings and switches that the modules of a block hold."""
    return [
        {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, str))}
        for module in block.modules()
    ]

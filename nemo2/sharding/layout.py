"""How one value is laid out over the ``tp`` axis: replicated, or split along one dim."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Layout of a tensor over the tensor-parallel axis.

    ``dim`` is the (non-negative) dim that is split into equal contiguous parts, or
    ``None`` when every rank holds the whole value.
    """

    dim: int | None = None

    @property
    def replicated(self) -> bool:
        return self.dim is None

    def local_shape(self, shape: tuple[int, ...], degree: int) -> tuple[int, ...]:
        """Return the shape held by one rank of a tensor of global ``shape``."""
        if self.dim is None:
            return tuple(shape)
        return tuple(s // degree if d == self.dim else s for d, s in enumerate(shape))

    def __str__(self) -> str:
        return "R" if self.dim is None else f"S({self.dim})"


REPLICATED = Layout()

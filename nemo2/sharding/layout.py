"""How one value is laid out over the axes that split activations: ``cp`` and ``tp``.

Over each axis a value is replicated or split along one dim. When both split the same dim
(sequence parallelism inside context parallelism), ``cp`` cuts first and ``tp`` cuts what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

AXES = ("cp", "tp")  # outermost first


@dataclass(frozen=True)
class Layout:
    """Layout of a tensor over one axis.

    Attributes:
        dim: the (non-negative) dim that is split into equal parts; ``None`` when every rank
            holds the whole value.
        outer: the dim is a flatten of ``(outer, n)``, of which the inner part is split.
        cut: how many elements at the start and at the end of the (inner) dim user code has cut
            off. They stay in memory, so that all ranks hold equal parts, and mean nothing.
        parts: global sizes of unequal parts of the dim, each of which is split alone (a fused
            projection); equal parts are ``outer``.
    """

    dim: int | None = None
    outer: int = 1
    cut: tuple[int, int] = (0, 0)
    parts: tuple[int, ...] = ()

    @staticmethod
    def fused(dim: int, parts: Sequence[int] | None) -> Layout:
        """Return the layout of a dim whose parts are split one by one."""
        if not parts or len(parts) == 1:
            return Layout(dim)
        equal = len(set(parts)) == 1
        return Layout(dim, outer=len(parts)) if equal else Layout(dim, parts=tuple(parts))

    def pieces(self, size: int) -> tuple[int, ...]:
        """Return the sizes of the parts of a dim of global ``size``, each split alone."""
        return self.parts or (size // self.outer,) * self.outer

    @property
    def replicated(self) -> bool:
        return self.dim is None

    @property
    def plain(self) -> bool:
        """Whether each rank holds one range of the dim, and all of it counts."""
        return self.outer == 1 and self.cut == (0, 0) and not self.parts

    def at(self, dim: int | None) -> Layout:
        """Return the same layout of another dim."""
        return REPLICATED if dim is None else replace(self, dim=dim)

    def stored(self, size: int) -> int:
        """Return how many elements of a (flattened) dim of global ``size`` are in memory."""
        return size + self.outer * sum(self.cut)

    def local_shape(self, shape: Sequence[int], degree: int) -> tuple[int, ...]:
        """Return the shape held by one rank of a tensor of global ``shape``."""
        return tuple(self.stored(s) // degree if d == self.dim else s for d, s in enumerate(shape))

    def __str__(self) -> str:
        if self.dim is None:
            return "R"
        cut = f" cut {self.cut[0]}:{self.cut[1]}" if any(self.cut) else ""
        parts = f" of parts {self.parts}" if self.parts else ""
        parts = f" of {self.outer} parts" if self.outer > 1 else parts
        return f"S({self.dim}{parts}{cut})"


REPLICATED = Layout()
Sharding = tuple[Layout, Layout]  # over cp and tp
WHOLE: Sharding = (REPLICATED, REPLICATED)


def sharding(*, cp: Layout = REPLICATED, tp: Layout = REPLICATED) -> Sharding:
    return cp, tp


def local_shape(
    shape: Sequence[int], layouts: Sequence[Layout], degrees: Sequence[int]
) -> tuple[int, ...]:
    """Return the shape that one rank holds of a tensor of global ``shape``."""
    local = list(shape)
    seen: set[int] = set()
    for layout, degree in zip(layouts, degrees, strict=True):
        if layout.dim is not None:
            if layout.dim not in seen:
                local[layout.dim] = layout.stored(local[layout.dim])
            seen.add(layout.dim)
            local[layout.dim] //= degree
    return tuple(local)

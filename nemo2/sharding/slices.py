"""Which boxes of a parameter of the unsplit model lie in one rank's memory, and where.

Tensor parallelism takes a rank's slice of a dim (of a fused one, of each part), and FSDP a chunk of
what is left. Both are index arithmetic: nothing is read, gathered or communicated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..plan import ParamPlan


@dataclass(frozen=True)
class Box:
    """Consecutive indices in each dim of a tensor."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))

    def seen_from(self, origin: Sequence[int]) -> Box:
        """Return the same box in the indices of a tensor whose first element is at ``origin``."""
        start = tuple(a - b for a, b in zip(self.start, origin, strict=True))
        return Box(start, self.shape)

    def without(self, dim: int | None) -> Box:
        """Return the box without one of its dims."""
        kept = [d for d in range(len(self.shape)) if d != dim]
        return Box(tuple(self.start[d] for d in kept), tuple(self.shape[d] for d in kept))


def common(a: Box, b: Box) -> Box:
    """Return what two boxes of a tensor share; of ``numel`` 0 when that is nothing.

    >>> common(Box((0, 2), (4, 4)), Box((3, 0), (4, 4)))
    Box(start=(3, 2), shape=(1, 2))
    """
    start = tuple(map(max, a.start, b.start))
    ends = [
        min(i + m, j + n) for i, m, j, n in zip(a.start, a.shape, b.start, b.shape, strict=True)
    ]
    return Box(start, tuple(max(0, end - i) for end, i in zip(ends, start, strict=True)))


@dataclass(frozen=True)
class Part:
    """A box of a parameter that lies in a rank's memory from the index ``at`` on."""

    box: Box
    at: tuple[int, ...]


@dataclass(frozen=True)
class _Run:
    """Consecutive indices of one dim, and where the first of them is in the rank's memory."""

    start: int
    size: int
    at: int


def held_parts(
    param: ParamPlan, tp: tuple[int, int], dp: tuple[int, int], dp_dim: int | None
) -> tuple[Part, ...]:
    """Return the boxes of a parameter that a rank holds; none where FSDP leaves it nothing.

    Args:
        tp: degree and rank of tensor parallelism; ``dp``: of FSDP.
        dp_dim: the dim that FSDP splits on this mesh, or None.
    """
    runs = [[_Run(0, size, 0)] for size in param.shape]
    if param.tp_dim is not None:
        runs[param.tp_dim] = _slices(param.parts or (param.shape[param.tp_dim],), *tp)
    if dp_dim is not None:
        runs[dp_dim] = _chunk(runs[dp_dim], *dp)
    return tuple(
        Part(Box(tuple(r.start for r in own), tuple(r.size for r in own)), tuple(r.at for r in own))
        for own in itertools.product(*runs)
    )


def _slices(parts: Sequence[int], degree: int, rank: int) -> list[_Run]:
    """Return a rank's slice of each part of a dim."""
    runs, start, at = [], 0, 0
    for size in parts:
        own = size // degree
        runs.append(_Run(start + rank * own, own, at))
        start, at = start + size, at + own
    return runs


def _chunk(runs: Sequence[_Run], degree: int, rank: int) -> list[_Run]:
    """Return a rank's chunk of a dim as ``torch.chunk`` cuts it: the last ones short or empty."""
    size = -(-sum(r.size for r in runs) // degree)
    first, end = rank * size, (rank + 1) * size
    chunk = []
    for r in runs:
        a, b = max(r.at, first), min(r.at + r.size, end)
        if a < b:
            chunk.append(_Run(r.start + a - r.at, b - a, a - first))
    return chunk

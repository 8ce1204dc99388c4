"""Axis sizes: names, parsing, and the arithmetic of which sizes fit a world. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh

from nemo2.errors import MeshError

AXES = ("pp", "dp", "cp", "tp")
"""Mesh axes, outermost to innermost."""

# Among meshes equally near: change dp, which leaves the model as it is, before pp, and so on.
CHANGE_FIRST = ("dp", "pp", "tp", "cp")


@dataclass(frozen=True)
class MeshSizes:
    """The degree of each mesh axis; an axis of size 1 is the identity.

    >>> str(MeshSizes.of("tp=2,dp=4"))
    'pp=1 dp=4 cp=1 tp=2'
    >>> MeshSizes.of({"pp": 2}).world
    2
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"{axis}={size!r} is not a positive integer"
            for axis, size in self.items()
            if not _is_int(size) or size < 1
        ]
        if problems:
            raise MeshError("mesh sizes must be positive integers\n  " + "\n  ".join(problems))

    @classmethod
    def of(cls, mesh: DeviceMesh | Mapping[str, int] | str | MeshSizes) -> MeshSizes:
        """Return the sizes of a mesh whose axes are some of pp, dp, cp, tp.

        Args:
            mesh: a ``DeviceMesh``, a mapping ``{"tp": 2}``, or text ``"dp=2,pp=2"``.

        Raises: MeshError for axes of other names, or sizes that are not positive integers.
        """
        if isinstance(mesh, MeshSizes):
            return mesh
        if isinstance(mesh, DeviceMesh):
            return cls(**_known(_sizes_of_device_mesh(mesh)))
        return cls(**_known(parse_sizes(mesh) if isinstance(mesh, str) else mesh))

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.pp * self.dp * self.cp * self.tp

    def items(self) -> Iterator[tuple[str, int]]:
        """Yield (axis, size), outermost axis first."""
        return ((axis, getattr(self, axis)) for axis in AXES)

    def __str__(self) -> str:
        return " ".join(f"{axis}={size}" for axis, size in self.items())


def parse_sizes(text: str) -> dict[str, int]:
    """Return ``{"dp": 2, "pp": 2}`` for ``"dp=2,pp=2"``; -1 is kept for ``fit_sizes``.

    >>> parse_sizes("dp=-1, tp=2")
    {'dp': -1, 'tp': 2}
    """
    sizes: dict[str, int] = {}
    problems = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis in sizes:
            problems.append(f"'{axis}' is given twice")
        try:
            sizes[axis] = int(size)
        except ValueError:
            problems.append(f"'{part}' is not <axis>=<integer>")
    if problems:
        raise MeshError(
            f"cannot read the mesh '{text}': {'; '.join(problems)}\n"
            f"  write for example 'dp=2,tp=2', with axes from {', '.join(AXES)}"
        )
    return sizes


def fit_sizes(asked: Mapping[str, int], world_size: int) -> MeshSizes:
    """Return the sizes whose product is the world size, with the one -1 filled in.

    Args:
        asked: size by axis; axes left out are 1, one may be -1 (what is left of the world).
        world_size: number of ranks.

    Raises: MeshError that lists sizes near those asked for whose product is the world size.
    """
    full = dict.fromkeys(AXES, 1) | _known(asked)
    wrong = [f"{a}={s!r}" for a, s in full.items() if not _is_int(s) or (s < 1 and s != -1)]
    if wrong:
        raise MeshError(
            f"mesh sizes must be positive integers, or -1 for one of them: {', '.join(wrong)}"
        )
    free = [axis for axis, size in full.items() if size == -1]
    if len(free) > 1:
        raise MeshError(
            f"only one mesh size may be -1, got {' and '.join(f'{axis}=-1' for axis in free)}"
        )
    fixed = math.prod(size for size in full.values() if size != -1)
    if free and world_size % fixed == 0:
        full[free[0]] = world_size // fixed
    if math.prod(full.values()) != world_size:
        raise MeshError(_misfit(full, fixed, world_size))
    return MeshSizes(**full)


def _misfit(asked: Mapping[str, int], fixed: int, world_size: int) -> str:
    shown = " ".join(f"{axis}={asked[axis]}" for axis in AXES)
    needs = f"a multiple of {fixed}" if -1 in asked.values() else f"exactly {fixed}"
    lines = [
        f"mesh {shown} does not fit world size {world_size}",
        f"  these sizes need {needs} ranks, there are {world_size}",
        "  sizes that fit: " + " | ".join(str(sizes) for sizes in _nearest(asked, world_size)),
    ]
    if world_size == 1:
        lines.append(
            f"  or start {fixed} processes: torchrun --nproc-per-node {fixed} <your script>"
        )
    return "\n".join(lines)


def _nearest(asked: Mapping[str, int], world_size: int, count: int = 3) -> list[MeshSizes]:
    """Return the meshes of this world that keep as much as possible of what was asked."""

    def distance(sizes: MeshSizes) -> tuple[int, float, tuple[int, ...]]:
        changed = [a for a, size in sizes.items() if asked[a] not in (-1, size)]
        ratio = sum(abs(math.log(getattr(sizes, a) / asked[a])) for a in changed)
        return len(changed), ratio, tuple(CHANGE_FIRST.index(a) for a in changed)

    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    meshes = [
        MeshSizes(pp=pp, dp=dp, cp=cp, tp=world_size // (pp * dp * cp))
        for pp in divisors
        for dp in divisors
        if world_size % (pp * dp) == 0
        for cp in divisors
        if world_size % (pp * dp * cp) == 0
    ]
    return sorted(meshes, key=distance)[:count]


def _is_int(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool)


def _known(sizes: Mapping[str, int]) -> dict[str, int]:
    unknown = [repr(axis) for axis in sizes if axis not in AXES]
    if unknown:
        raise MeshError(
            f"unknown mesh {'axes' if len(unknown) > 1 else 'axis'} {', '.join(unknown)}; "
            f"the axes are {', '.join(AXES)}"
        )
    return dict(sizes)


def _sizes_of_device_mesh(mesh: DeviceMesh) -> dict[str, int]:
    names = mesh.mesh_dim_names
    if names is None:
        raise MeshError(
            f"a DeviceMesh of shape {tuple(mesh.shape)} without axis names; name them:\n"
            '  init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))\n'
            "  or make_mesh(dp=2, tp=2)"
        )
    return dict(zip(names, mesh.shape, strict=True))

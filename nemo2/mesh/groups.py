"""Process groups and coordinates of this rank: the only place where groups are made."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from nemo2.errors import MeshError
from nemo2.mesh.processes import settle
from nemo2.mesh.sizes import AXES, MeshSizes

ProcessGroup = dist.ProcessGroup

atexit.register(settle)  # at import: what is registered later, and may communicate, runs before


@dataclass(frozen=True)
class MeshGroups:
    """What a rank knows of its mesh: sizes, its coordinates, one process group per axis.

    ``mesh`` always has the four axes pp, dp, cp, tp in this order, and ``data_mesh`` is its 1-D
    flattening of dp and cp (what FSDP shards over), of which ``dp_cp`` is the group.
    """

    mesh: DeviceMesh
    data_mesh: DeviceMesh
    sizes: MeshSizes
    device: torch.device
    rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    tp_rank: int
    pp: ProcessGroup
    dp: ProcessGroup
    cp: ProcessGroup
    tp: ProcessGroup
    dp_cp: ProcessGroup
    world: ProcessGroup

    @classmethod
    def of(cls, mesh: DeviceMesh) -> MeshGroups:
        """Build the groups of a mesh whose axes are some of pp, dp, cp, tp.

        An axis that the mesh lacks has size 1, and a group of this rank alone.

        Communication: making groups; collective, all ranks of the mesh must call it.
        Raises: MeshError for unknown axes, or if this rank is not part of the mesh.
        """
        sizes = MeshSizes.of(mesh)
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise MeshError(f"rank {dist.get_rank()} is not part of the mesh {mesh}")
        full = _with_all_axes(mesh, sizes)
        data = full["dp"] if sizes.cp == 1 else full["dp", "cp"]._flatten("dp_cp")
        position = dict.fromkeys(AXES, 0)
        position |= dict(zip(mesh.mesh_dim_names or (), coordinate, strict=True))
        return cls(
            mesh=full,
            data_mesh=data,
            sizes=sizes,
            device=_device(mesh.device_type),
            rank=dist.get_rank(),
            pp_rank=position["pp"],
            dp_rank=position["dp"],
            cp_rank=position["cp"],
            tp_rank=position["tp"],
            pp=full.get_group("pp"),
            dp=full.get_group("dp"),
            cp=full.get_group("cp"),
            tp=full.get_group("tp"),
            dp_cp=data.get_group(),
            world=_world_group(full),
        )

    def ranks_of(self, **coordinates: int) -> list[int]:
        """Return the global ranks with these coordinates, in mesh order.

        >>> # groups.ranks_of(pp=0, tp=1): the ranks of the first stage with tp coordinate 1
        """
        unknown = [axis for axis in coordinates if axis not in AXES]
        if unknown:
            raise MeshError(f"unknown mesh axes {unknown}; the axes are {', '.join(AXES)}")
        index = tuple(coordinates.get(axis, slice(None)) for axis in AXES)
        return [int(rank) for rank in self.mesh.mesh[index].reshape(-1).tolist()]


def new_group(ranks: Sequence[int]) -> ProcessGroup | None:
    """Return a group of these ranks, on its members; None elsewhere.

    Only the members need to call it. A rank that is in several new groups must make them in the
    same order as the other members do: making one waits for its members.

    Communication: a barrier of the members through the store.
    """
    if dist.get_rank() not in ranks:
        return None
    group = dist.new_group(sorted(ranks), use_local_synchronization=True)
    return cast("ProcessGroup", group)


def stage_group(groups: MeshGroups, ranks: Sequence[int]) -> ProcessGroup | None:
    """Return the group of this rank's counterparts on pipeline ``ranks``; None on other ranks.

    All ranks of the mesh call it, with the same ``ranks``.

    Communication: making a group, unless it is that of the whole pipeline.
    """
    if len(ranks) == groups.sizes.pp:
        return groups.pp
    # torch names a group by its ranks and the number of groups that a rank is in. So that members
    # agree on the name of this one and of later ones, the others make a group of themselves.
    inside = groups.pp_rank in ranks
    members = [r for r in range(groups.sizes.pp) if (r in ranks) == inside]
    group = new_group([dist.get_global_rank(groups.pp, r) for r in members])
    return group if inside else None


def replica_mesh(groups: MeshGroups, replicate: int) -> DeviceMesh:
    """Return the mesh that FSDP uses for ``replicate`` replicas of the shards of dp and cp.

    Returns:
        ``groups.data_mesh`` for one replica; else a mesh ``(replicate, dp)``, in which the
        ranks of a replica are neighbours.

    Communication: making groups, unless there is one replica.
    """
    if replicate == 1:
        return groups.data_mesh
    ranks = torch.tensor(dist.get_process_group_ranks(groups.dp_cp)).view(replicate, -1)
    row, column = (ranks == groups.rank).nonzero()[0].tolist()
    shards, replicas = new_group(ranks[row].tolist()), new_group(ranks[:, column].tolist())
    assert shards is not None
    assert replicas is not None
    return DeviceMesh.from_group(
        [replicas, shards], groups.device.type, mesh=ranks, mesh_dim_names=("replicate", "dp")
    )


def _with_all_axes(mesh: DeviceMesh, sizes: MeshSizes) -> DeviceMesh:
    """Return the mesh itself if it has the four axes in order, else one made of its groups."""
    names = mesh.mesh_dim_names or ()
    if names == AXES:
        return mesh
    alone = new_group([dist.get_rank()])
    assert alone is not None
    groups = [mesh.get_group(axis) if axis in names else alone for axis in AXES]
    order = [names.index(axis) for axis in AXES if axis in names]
    ranks = mesh.mesh.permute(order).reshape([size for _, size in sizes.items()])
    return DeviceMesh.from_group(groups, mesh.device_type, mesh=ranks, mesh_dim_names=AXES)


def _world_group(mesh: DeviceMesh) -> ProcessGroup:
    if mesh.size() == dist.get_world_size():
        return cast("ProcessGroup", dist.group.WORLD)
    group = new_group([int(rank) for rank in mesh.mesh.reshape(-1).tolist()])
    assert group is not None
    return group


def _device(kind: str) -> torch.device:
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

"""Whether the GPUs of a group can read each other's memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..errors import Nemo2Error
from .groups import MeshGroups
from .processes import host_name


def check_peer_memory(groups: MeshGroups) -> None:
    """Raise on all ranks alike unless the GPUs of each tp group can read each other's memory.

    Communication: an all-gather of a name over tp, a rendezvous of torch's symmetric memory, an
    all-gather of what failed over the world.
    Raises: Nemo2Error that names ranks and why.
    """
    if groups.sizes.tp == 1:
        return
    everyone: list[Any] = [None] * groups.sizes.world
    dist.all_gather_object(everyone, (groups.rank, _why_not(groups)), group=groups.world)
    failed = [(rank, why) for rank, why in everyone if why]
    if failed:
        ranks, why = [rank for rank, _ in failed], failed[0][1]
        raise Nemo2Error(
            "Compile(async_tp=True) needs GPUs of tp that read each other's memory;"
            f" ranks {ranks} do not: {why}\n"
            "  options: compile=True | a mesh whose tp stays inside of one host with NVLink"
        )


def _why_not(groups: MeshGroups) -> str:
    """Return why this rank cannot reach those of its tp group, or ""."""
    if groups.device.type != "cuda":
        return f"the mesh is on {groups.device.type}"
    hosts: list[Any] = [None] * groups.sizes.tp
    dist.all_gather_object(hosts, host_name(), group=groups.tp)
    if len(set(hosts)) > 1:
        return f"tp={groups.sizes.tp} spans {len(set(hosts))} hosts"
    from torch.distributed import _symmetric_memory as symmetric

    try:
        with torch.cuda.device(groups.device):
            symmetric.get_symm_mem_workspace(groups.tp.group_name, 1)
    except Exception as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return ""

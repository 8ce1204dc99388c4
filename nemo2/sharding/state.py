"""Whole tensors from the parts that ranks hold, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from ..mesh.groups import MeshGroups
from ..pipeline.stages import expected_stages, module_order
from ..plan import Plan
from .fused import in_original_order, is_fused
from .storage import Entry, Storage


def whole_if_fused(entry: Entry, storage: Storage, groups: MeshGroups) -> Tensor:
    """Return the parameter's DTensor; of a fused one a whole copy in its original order.

    Communication: gathers a fused parameter over tp and dp.
    """
    if not is_fused(entry.plan):
        return entry.view.detach()
    held = _gathered(entry.wrap(entry.local, storage.mesh))
    whole = in_original_order(held, entry.plan, groups.sizes.tp)
    everywhere = [Replicate()] * storage.mesh.ndim
    return DTensor.from_local(whole, storage.mesh, everywhere, run_check=False)


def _gathered(x: DTensor) -> Tensor:
    """Return the whole tensor, gathered over one axis after the other, the innermost first.

    That is what ``full_tensor`` does, with a warning that it does (torch 2.11 to 2.13).
    """
    for axis in reversed(range(x.device_mesh.ndim)):
        x = x.redistribute(
            placements=[*x.placements[:axis], Replicate(), *x.placements[axis + 1 :]]
        )
    return x.to_local()


def gather_params(storage: Storage, plan: Plan, groups: MeshGroups) -> dict[str, Tensor]:
    """Return every parameter of the unsplit model, under all of its names, on every rank.

    Communication: gathers each parameter over tp and dp, then shares them over stages.
    """
    own: dict[str, Tensor] = {}
    for entry in storage:
        if groups.pp_rank == entry.plan.ranks[0]:
            held = _gathered(entry.wrap(entry.local, storage.mesh))
            own[entry.name] = in_original_order(held, entry.plan, groups.sizes.tp)
    everything = _share(own, groups.pp, groups.device) if len(plan.stages) > 1 else own
    for param in plan.params:
        for alias in param.aliases:
            everything[alias] = everything[param.name]
    return everything


def _share(
    own: dict[str, Tensor], group: dist.ProcessGroup, device: torch.device
) -> dict[str, Tensor]:
    """Give the tensors of each rank of a group to all of them, those of the first rank first."""
    ranks = dist.get_process_group_ranks(group)
    facts = [(n, tuple(t.shape), t.dtype) for n, t in own.items()]
    everyone: list[Any] = [None] * len(ranks)
    dist.all_gather_object(everyone, facts, group=group)
    everything: dict[str, Tensor] = {}
    for source, theirs in zip(ranks, everyone, strict=True):
        here = source == dist.get_rank()
        for name, shape, dtype in theirs:
            value = (
                own[name].to(device).contiguous()
                if here
                else torch.empty(shape, dtype=dtype, device=device)
            )
            if value.numel():
                dist.broadcast(value, src=source, group=group)
            everything[name] = value
    return everything


def gather_buffers(module: nn.Module, plan: Plan, groups: MeshGroups) -> dict[str, Tensor]:
    """Return every buffer that state dicts have, the same on every rank.

    Buffers that forwards write (running statistics) may differ from rank to rank: those of the
    first rank of the stage that they belong to count, as in checkpoints.

    Communication: on more than one rank, an all-gather of objects over the world, and a broadcast
        of each buffer.
    """
    held = {n: b.detach() for n, b in persistent_buffers(module, aliases=True).items()}
    if groups.sizes.world == 1:
        return held
    first = groups.dp_rank == groups.cp_rank == groups.tp_rank == 0
    owners = buffer_owners(plan, module)
    own = {n: b for n, b in held.items() if first and owners[n] == groups.pp_rank}
    shared = _share(own, groups.world, groups.device)
    return {n: shared[n] for n in held if n in shared}


def copy_into(view: Tensor, full: Tensor) -> None:
    """Copy this rank's part of the whole tensor ``full``, in rank order, into ``view``'s memory.

    Communication: none.
    """
    assert isinstance(view, DTensor)
    part = distribute_tensor(
        full.to(view.device), view.device_mesh, view.placements, src_data_rank=None
    )
    with torch.no_grad():
        view._local_tensor.copy_(part._local_tensor)


def persistent_buffers(module: nn.Module, *, aliases: bool = False) -> dict[str, Tensor]:
    """Return the buffers that state dicts have, by name; ``aliases``: under all of their names."""
    found = {}
    for prefix, owner in module.named_modules(remove_duplicate=not aliases):
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                found[f"{prefix}.{leaf}" if prefix else leaf] = buffer
    return found


def buffer_owners(plan: Plan, module: nn.Module) -> dict[str, int]:
    """Return name -> the pipeline rank whose copy of a buffer counts, under all of its names.

    A buffer goes with its module, as parameters do: with its block, or before or after the blocks.
    """
    names, order = tuple(persistent_buffers(module, aliases=True)), module_order(module)
    homes = expected_stages(order, names, plan.blocks, plan.stages)
    return {n: plan.stages[home].rank for n, home in zip(names, homes, strict=True)}

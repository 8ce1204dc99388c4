"""Whole tensors from the parts that ranks hold, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from ..mesh.groups import MeshGroups
from ..pipeline.stages import stage_of
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
    everything = _share(own, groups) if len(plan.stages) > 1 else own
    for param in plan.params:
        for alias in param.aliases:
            everything[alias] = everything[param.name]
    return everything


def _share(own: dict[str, Tensor], groups: MeshGroups) -> dict[str, Tensor]:
    """Give every pipeline rank's tensors to all of them."""
    everything: dict[str, Tensor] = {}
    for rank in range(groups.sizes.pp):
        source = dist.get_global_rank(groups.pp, rank)
        here = rank == groups.pp_rank
        box: list[Any] = [[(n, tuple(t.shape), t.dtype) for n, t in own.items()] if here else None]
        dist.broadcast_object_list(box, src=source, group=groups.pp, device=groups.device)
        for name, shape, dtype in box[0]:
            value = (
                own[name].contiguous()
                if here
                else torch.empty(shape, dtype=dtype, device=groups.device)
            )
            dist.broadcast(value, src=source, group=groups.pp)
            everything[name] = value
    return everything


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


def buffer_owner(plan: Plan, buffer: str) -> int:
    """Return the pipeline rank whose copy of a buffer counts: its block's or its siblings'."""
    for i, block in enumerate(plan.blocks):
        if buffer.startswith(block + "."):
            return plan.stages[stage_of(i, plan.stages)].rank
    parent = buffer.rpartition(".")[0]
    near = [p.stages[0] for p in plan.params if p.name.rpartition(".")[0] == parent]
    return plan.stages[min(near, default=0)].rank

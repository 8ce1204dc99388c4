"""Gradients after a step's backward: what is summed over which axis, and the global norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ..mesh.groups import MeshGroups
from .storage import Entry, Storage, local_of


def gradient(entry: Entry) -> Tensor | None:
    """Return this rank's part of the gradient that a run left, or None."""
    grad = entry.compute.grad
    return None if grad is None else local_of(grad)


def set_gradient(entry: Entry, grad: Tensor) -> None:
    """Store a gradient where a run leaves it."""
    if isinstance(entry.compute, DTensor):
        spec = entry.compute
        entry.compute.grad = DTensor.from_local(
            grad,
            spec.device_mesh,
            spec.placements,
            run_check=False,
            shape=spec.shape,
            stride=spec.stride(),
        )
    else:
        entry.compute.grad = grad


def all_reduce_together(tensors: Iterable[Tensor], group: ProcessGroup) -> None:
    """Sum each tensor over ``group`` in place, with one all-reduce for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for x in tensors:
        by_dtype.setdefault(x.dtype, []).append(x)
    for same in by_dtype.values():
        if len(same) == 1 and same[0].is_contiguous():
            dist.all_reduce(same[0], group=group)
            continue
        flat = torch.cat([x.reshape(-1) for x in same])
        dist.all_reduce(flat, group=group)
        for x, part in zip(same, torch.split(flat, [x.numel() for x in same]), strict=True):
            x.copy_(part.view_as(x))


def reduce_gradients(
    storage: Storage,
    groups: MeshGroups,
    partial: frozenset[str],
    ties: Mapping[str, ProcessGroup],
    used: frozenset[str] | None,
) -> None:
    """Sum the gradients that the microbatches left over the ranks that share parameters.

    In order: sums over ``tp`` of replicated parameters used in split regions; sums over
    ``dp`` of what FSDP does not reduce; sums over the stages that share a tied parameter.
    A parameter that no rank used keeps no gradient.

    Args:
        used: the parameters that the step uses, or None when it was not planned.

    Communication: one all-reduce per dtype over ``tp`` and over ``dp``, one for each tie
        group, and one of a byte per parameter over ``dp`` to agree on what was used.
    """
    trainable = [e for e in storage if e.trainable]
    over_dp = [e for e in trainable if e.replicated_over_dp] if groups.dp_cp.size() > 1 else []
    _fill_unused(trainable, partial, ties, used)
    _agree_on_used(over_dp, groups)
    over_tp = [e for e in trainable if e.name in partial]
    all_reduce_together((g for e in over_tp if (g := gradient(e)) is not None), groups.tp)
    all_reduce_together((g for e in over_dp if (g := gradient(e)) is not None), groups.dp_cp)
    for name, group in ties.items():
        grad = gradient(storage.entries[name])
        if grad is not None:
            dist.all_reduce(grad, group=group)


def scale_gradients(storage: Storage, scale: float) -> None:
    """Multiply every gradient that a run left by ``scale``."""
    if scale != 1.0:
        trainable = [e for e in storage if e.trainable]
        grads = [g for e in trainable if (g := gradient(e)) is not None]
        if grads:
            torch._foreach_mul_(grads, scale)


def _fill_unused(
    entries: Sequence[Entry],
    partial: frozenset[str],
    ties: Mapping[str, ProcessGroup],
    used: frozenset[str] | None,
) -> None:
    """Give zeros to what this rank did not use but others may have."""
    for e in entries:
        shared = e.name in partial or e.name in ties
        if gradient(e) is None and shared and (used is None or e.name in used):
            set_gradient(e, torch.zeros_like(e.local))


def _agree_on_used(entries: Sequence[Entry], groups: MeshGroups) -> None:
    """Fill with zeros what another dp rank used and this one did not."""
    if not entries:
        return
    flags = torch.tensor([gradient(e) is not None for e in entries], dtype=torch.uint8)
    flags = flags.to(groups.device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=groups.dp_cp)
    for e, flag in zip(entries, flags.tolist(), strict=True):
        if flag and gradient(e) is None:
            set_gradient(e, torch.zeros_like(e.local))


def counted_here(entry: Entry, groups: MeshGroups) -> bool:
    """Say whether this rank counts its part of a parameter: each element counts once globally."""
    if entry.plan.tp_dim is None and groups.tp_rank != 0:
        return False
    if entry.replicated_over_dp and groups.dp_cp.rank() != 0:
        return False
    return groups.pp_rank == entry.plan.ranks[0]


def norm_of(grads: Mapping[str, Tensor], storage: Storage, groups: MeshGroups) -> Tensor:
    """Return the 2-norm over all parameters and all axes, each element counted once.

    Communication: one all-reduce of a scalar over the world.
    """
    parts = [
        local_of(grad)
        for name, grad in grads.items()
        if grad is not None and counted_here(storage.entries[name], groups)
    ]
    total = torch.zeros((), dtype=torch.float64, device=groups.device)
    if parts:
        norms = torch._foreach_norm(
            [p.float() if p.dtype in (torch.float16, torch.bfloat16) else p for p in parts]
        )
        total = torch.stack([n.double() for n in norms]).square().sum()
    if groups.sizes.world > 1:
        dist.all_reduce(total, group=groups.world)
    return total.sqrt()

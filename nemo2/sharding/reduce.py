"""Gradients after a step's backward: what is summed over which axis, and the global norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

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


def agree(
    flags: Sequence[bool], group: ProcessGroup, device: torch.device
) -> Callable[[], list[bool]]:
    """Ask for each flag whether it is set on any rank of ``group``; return what tells the answer.

    Only who calls that waits for the device.

    Communication: one all-reduce of a byte per flag.
    """
    if not flags:
        return list
    if all(flags):  # made on the device: a copy from the host would wait for it
        everyone = torch.ones(len(flags), dtype=torch.uint8, device=device)
    else:
        everyone = torch.tensor(flags, dtype=torch.uint8).to(device)
    dist.all_reduce(everyone, op=dist.ReduceOp.MAX, group=group)
    return lambda: [bool(flag) for flag in everyone.tolist()]


def reduce_gradients(
    storage: Storage,
    groups: MeshGroups,
    partial: frozenset[str],
    ties: Mapping[str, ProcessGroup],
    used: frozenset[str] | None,
) -> None:
    """Sum gradients, which are summed over ``dp``, over the other ranks that share parameters.

    In order: sums over ``tp`` of replicated parameters used in split regions; sums over the
    stages that share a tied parameter. A parameter that no rank used keeps no gradient.

    Args:
        used: the parameters that the step uses, or None when it was not planned.

    Communication: one all-reduce per dtype over ``tp``, and one for each tie group.
    """
    trainable = [e for e in storage if e.trainable]
    _fill_unused(trainable, partial, ties, used)
    over_tp = [e for e in trainable if e.name in partial]
    all_reduce_together((g for e in over_tp if (g := gradient(e)) is not None), groups.tp)
    for name, group in ties.items():
        grad = gradient(storage.entries[name])
        if grad is not None:
            dist.all_reduce(grad, group=group)


def scale_gradients(storage: Storage, scale: Tensor | float) -> None:
    """Multiply every gradient that a run left by ``scale``, mostly a number on the device."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for entry in storage:
        if entry.trainable and (grad := gradient(entry)) is not None:
            by_dtype.setdefault(grad.dtype, []).append(grad)
    for dtype, grads in by_dtype.items():
        # In 16 bits a number on the host is rounded with the product only.
        narrow = dtype in (torch.float16, torch.bfloat16)
        if narrow or not isinstance(scale, Tensor):
            torch._foreach_mul_(grads, float(scale))
        else:
            torch._foreach_mul_(grads, scale.to(dtype))


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


def counted_here(entry: Entry, storage: Storage, groups: MeshGroups) -> bool:
    """Say whether this rank counts its part of a parameter: each element counts once globally."""
    coordinate = storage.mesh.get_coordinate()
    assert coordinate is not None
    copies = zip(entry.placements, coordinate, strict=True)
    if any(placement.is_replicate() and at > 0 for placement, at in copies):
        return False
    return groups.pp_rank == entry.plan.ranks[0]


def norm_of(grads: Mapping[str, Tensor], storage: Storage, groups: MeshGroups) -> Tensor:
    """Return the 2-norm over all parameters and all axes, each element counted once.

    Communication: one all-reduce of a scalar over the world.
    """
    parts = [
        local_of(grad)
        for name, grad in grads.items()
        if grad is not None and counted_here(storage.entries[name], storage, groups)
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

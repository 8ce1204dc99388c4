"""Parameters that a stage uses but does not hold: lent for the time of a run.

Where a parameter outside the blocks lives is decided before any step is known, by where its
module is registered. When a step then uses it on another stage (a head registered before the
blocks, a scale used at both ends), its owner lends it: the value is sent before each run and
the gradient comes back after. Always right, and shown in the plan, because registering the
module where it is used saves the transfer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..mesh.groups import MeshGroups, stage_group
from ..places import Place
from ..plan import Plan
from .reduce import gradient, set_gradient
from .storage import Entry, Storage


@dataclass
class Loan:
    """One borrowed parameter on a rank that lends or borrows it."""

    name: str
    group: dist.ProcessGroup
    owner: int  # global rank that lends
    copy: nn.Parameter | None  # the borrower's plain local copy
    places: list[Place]


def make_loans(
    borrowed: Mapping[str, tuple[int, ...]], plan: Plan, where: Sequence[Place], groups: MeshGroups
) -> list[Loan]:
    """Make the groups and the borrowers' memory for the loans of one kind of step.

    Communication: making groups; all ranks of the mesh call it with the same loans.
    """
    loans = []
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for name in sorted(borrowed):
        param = plan.param(name)
        lender = min(param.stages)
        stages = (lender, *borrowed[name])
        if groups.pp_rank not in stages:
            continue
        if stages not in made:
            made[stages] = stage_group(groups, stages)
        owner = dist.get_global_rank(groups.pp, lender)
        copy, own = None, []
        if groups.pp_rank != lender:
            value = torch.empty(param.local_shape, dtype=param.dtype, device=groups.device)
            copy = nn.Parameter(value, requires_grad=param.trainable)
            own = [w for w in where if w.param == name and w.leaf in w.module.__dict__]
        loans.append(Loan(name, made[stages], owner, copy, own))
    return loans


@contextmanager
def lent(loans: Sequence[Loan], storage: Storage, groups: MeshGroups) -> Iterator[None]:
    """Lend for the time of a run.

    Communication: for each loan one broadcast of the parameter, and under FSDP a gather.
    """
    undo = []
    for loan in loans:
        if loan.copy is None:
            value = _whole(storage.entries[loan.name], groups)
            dist.broadcast(value, src=loan.owner, group=loan.group)
            continue
        loan.copy.grad = None
        dist.broadcast(loan.copy.detach(), src=loan.owner, group=loan.group)
        for place in loan.places:
            undo.append((place, place.module.__dict__.pop(place.leaf)))
            place.module._parameters[place.leaf] = loan.copy
    try:
        yield
    finally:
        for place, absent in undo:
            place.module._parameters.pop(place.leaf)
            place.module.__dict__[place.leaf] = absent


def give_back(
    loans: Sequence[Loan], storage: Storage, groups: MeshGroups, partial: frozenset[str]
) -> None:
    """Add the gradients of borrowed copies, summed over dp, to those of their owners.

    Communication: for each trainable loan one all-reduce over ``dp`` on the borrower (and one
    over ``tp`` when it was used in a split region), and one over lender and borrowers.
    """
    for loan in loans:
        if loan.copy is not None:
            if not loan.copy.requires_grad:
                continue
            grad = loan.copy.grad if loan.copy.grad is not None else torch.zeros_like(loan.copy)
            if groups.dp_cp.size() > 1:
                dist.all_reduce(grad, group=groups.dp_cp)
            if loan.name in partial:
                dist.all_reduce(grad, group=groups.tp)
            dist.all_reduce(grad, group=loan.group)
            continue
        entry = storage.entries[loan.name]
        if not entry.plan.trainable:
            continue
        grad = torch.zeros(entry.plan.local_shape, dtype=entry.plan.dtype, device=groups.device)
        dist.all_reduce(grad, group=loan.group)
        own, part = gradient(entry), _dp_part(grad, entry, storage)
        if own is None:
            set_gradient(entry, part.contiguous())
        else:
            own.add_(part)


def _whole(entry: Entry, groups: MeshGroups) -> Tensor:
    """Return the parameter's tp-local value, gathered over dp."""
    value = entry.compute.detach()
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.contiguous()


def _dp_part(grad: Tensor, entry: Entry, storage: Storage) -> Tensor:
    if entry.replicated_over_dp:
        return grad
    dim = entry.plan.dp_dim or 0
    shards = storage.mesh.get_group("dp")
    parts = grad.chunk(shards.size(), dim)
    rank = shards.rank()
    return parts[rank] if rank < len(parts) else grad.narrow(dim, 0, 0)

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
from ..pipeline.stages import ranks_of
from ..places import Place, in_order
from ..plan import ParamPlan, Plan
from .precision import compute_copy, filled
from .reduce import gradient, set_gradient
from .storage import Entry, Storage


@dataclass
class Loan:
    """One borrowed parameter on a rank that holds or borrows it.

    A rank may do both: hold it under one name, and borrow it where another stage of its own uses
    another name that it is tied to.
    """

    param: ParamPlan
    group: dist.ProcessGroup
    owner: int  # global rank that lends
    lends: bool
    copy: nn.Parameter | None  # the borrower's plain local copy
    leaf: nn.Parameter | None  # what its run computes with: see Entry.leaf
    places: list[Place]


def make_loans(
    borrowed: Mapping[str, tuple[int, ...]], plan: Plan, where: Sequence[Place], groups: MeshGroups
) -> list[Loan]:
    """Make the groups and the borrowers' memory for the loans of one kind of step.

    Communication: making groups; all ranks of the mesh call it with the same loans.
    """
    loans = []
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    for name in sorted(borrowed):
        param = plan.param(name)
        own = [w for w in where if w.param == name]
        borrowers = borrowing_ranks(param, borrowed[name], own, plan)
        ranks = tuple(dict.fromkeys((*param.ranks, *borrowers)))
        if not borrowers:
            continue
        if ranks not in made:
            made[ranks] = stage_group(groups, ranks)
        group = made[ranks]
        if group is None:
            continue
        copy = leaf = None
        if groups.pp_rank in borrowers:
            value = torch.empty(param.local_shape, dtype=param.dtype, device=groups.device)
            copy = nn.Parameter(value, requires_grad=param.trainable)
            leaf = compute_copy(copy, plan.options.compute_dtype(param.dtype))
        owner = dist.get_global_rank(groups.pp, param.ranks[0])
        lends = groups.pp_rank == param.ranks[0]
        empty = [w for w in own if w.leaf in w.module.__dict__]
        held = empty if copy is not None else []
        loans.append(Loan(param, group, owner, lends, copy, leaf, held))
    return loans


def borrowing_ranks(
    param: ParamPlan, stages: Sequence[int], places: Sequence[Place], plan: Plan
) -> list[int]:
    """Return the ranks of the borrowing ``stages`` that lack one of the parameter's places."""
    holders = [ranks_of(param.homes_of(w.names), plan.stages) for w in places]
    return [r for r in ranks_of(stages, plan.stages) if any(r not in held for held in holders)]


@contextmanager
def lent(
    loans: Sequence[Loan], where: Sequence[Place], storage: Storage, groups: MeshGroups
) -> Iterator[None]:
    """Lend for the time of a run.

    Args:
        where: all places of parameters, in the user's order.

    Communication: for each loan one broadcast of the parameter, and under FSDP a gather.
    """
    undo = []
    for loan in loans:
        if loan.lends:
            value = _whole(storage.entries[loan.param.name], groups)
        else:  # one that only holds it takes part for the sake of giving back
            shape, dtype = loan.param.local_shape, loan.param.dtype
            value = torch.empty(shape, dtype=dtype, device=groups.device)
        dist.broadcast(value, src=loan.owner, group=loan.group)
        if loan.copy is not None:
            loan.copy.grad, loan.copy.data = None, value
        for place in loan.places:
            undo.append((place, place.module.__dict__.pop(place.leaf)))
            place.module._parameters[place.leaf] = loan.leaf
    in_order([place.module for place, _ in undo], where)
    pairs = [(x.copy, x.leaf) for x in loans if x.copy is not None and x.leaf is not None]
    try:
        with filled(pairs):
            yield
    finally:
        for place, absent in undo:
            place.module._parameters.pop(place.leaf)
            place.module.__dict__[place.leaf] = absent


def give_back(
    loans: Sequence[Loan], storage: Storage, groups: MeshGroups, partial: frozenset[str]
) -> None:
    """Add the gradients of borrowed copies, summed over dp, to those of all who hold them.

    Communication: for each trainable loan one all-reduce over ``dp`` on the borrower (and one
    over ``tp`` when it was used in a split region), and one over holders and borrowers.
    """
    for loan in loans:
        param = loan.param
        if not param.trainable:
            continue
        if loan.copy is not None and loan.copy.grad is not None:
            grad = loan.copy.grad
        else:
            grad = torch.zeros(param.local_shape, dtype=param.dtype, device=groups.device)
        if loan.copy is not None:
            if groups.dp_cp.size() > 1:
                dist.all_reduce(grad, group=groups.dp_cp)
            if param.name in partial:
                dist.all_reduce(grad, group=groups.tp)
        dist.all_reduce(grad, group=loan.group)
        entry = storage.entries.get(param.name)
        if entry is None:
            continue
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

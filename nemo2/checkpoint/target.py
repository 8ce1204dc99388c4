"""What a checkpoint holds of a model: its parameters and persistent buffers, ties once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..inside import model_around
from ..mesh.groups import MeshGroups
from ..model import ParallelModel
from ..sharding.fused import in_original_order
from ..sharding.slices import Box, Part, held_parts
from ..sharding.state import buffer_owners, persistent_buffers
from ..sharding.storage import Entry


@dataclass(frozen=True)
class Item:
    """One parameter or persistent buffer.

    Attributes:
        names: all of its names in the unsplit model, the first one first.
        shape: global shape; ``dtype``: as users see it.
        owner: the pipeline rank that saves it.
        local: this rank's memory of it, None on stages without it; ``parts`` say which boxes of
            the whole tensor that is.
        whole: returns the whole tensor; the owner's ranks call it together.
        copy: which of the ``copies`` of this memory, on the ranks of the owner's stage, it is; a
            copy that is never to be saved has a number past them.
        param: what an optimizer has of it, None for buffers and on stages without it; ``wrap``
            makes a tensor of the layout of ``local`` what an optimizer keeps.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    owner: int
    local: Tensor | None
    parts: tuple[Part, ...]
    whole: Callable[[], Tensor]
    copy: int = 0
    copies: int = 1
    param: nn.Parameter | None = None
    wrap: Callable[[Tensor], Tensor] = lambda local: local

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def nbytes(self) -> int:
        return Box.whole(self.shape).numel * self.dtype.itemsize


@dataclass(frozen=True)
class Target:
    """A model to save or load.

    Attributes:
        module: the user's; ``items`` in the order of the unsplit model, the same on all ranks.
        groups: None for a model on one device.
        stage: this rank's pipeline rank; ``writes``: whether this rank writes for its stage.
        parallel: the model that the module is in, None for one on one device.
    """

    module: nn.Module
    items: tuple[Item, ...]
    groups: MeshGroups | None
    stage: int
    writes: bool
    parallel: ParallelModel | None = None

    @property
    def first(self) -> bool:
        """Whether this rank writes what is there once for the whole model."""
        return self.writes and self.stage == 0


def target_of(model: nn.Module) -> Target:
    """Return what a checkpoint holds of a ``ParallelModel``, a part of one, or a plain module.

    A part is a module inside of the one that was split, and has the names that it has alone.

    Raises: CheckpointError for a module that is not whole: on meta, or split by others.
    """
    around = (model, "") if isinstance(model, ParallelModel) else model_around(model)
    if around is None:
        return Target(model, _plain_items(model), None, 0, True)
    parallel, name = around
    groups = parallel.groups
    where = (groups.tp_rank, groups.dp_rank, groups.cp_rank)
    items = _part_of(_param_items(parallel) + _buffer_items(parallel), name)
    module = parallel.module.get_submodule(name)
    return Target(module, items, groups, groups.pp_rank, where == (0, 0, 0), parallel)


def _part_of(items: tuple[Item, ...], module: str) -> tuple[Item, ...]:
    """Return what the submodule ``module`` has of ``items``, under the names in it."""
    if not module:
        return items
    inside = f"{module}."
    named = (
        (item, tuple(n.removeprefix(inside) for n in item.names if n.startswith(inside)))
        for item in items
    )
    return tuple(replace(item, names=names) for item, names in named if names)


def _param_items(model: ParallelModel) -> tuple[Item, ...]:
    items = []
    for param in model.plan.params:
        entry = model.storage.entries.get(param.name)
        local = None if entry is None else entry.local
        parts = () if entry is None else _parts(entry, model)
        names = (param.name, *param.aliases)
        whole = _gathering(entry, model)
        made = Item(names, param.shape, param.dtype, param.ranks[0], local, parts, whole)
        if entry is not None:
            copy, copies = _copy_of(entry, model)
            wrap = partial(entry.wrap, mesh=model.storage.mesh)
            made = replace(made, copy=copy, copies=copies, param=entry.view, wrap=wrap)
        items.append(made)
    return tuple(items)


def _copy_of(entry: Entry, model: ParallelModel) -> tuple[int, int]:
    """Return which copy of its part of a parameter this rank has, and how many there are."""
    mesh, copy, copies = model.storage.mesh, 0, 1
    for dim, placement in enumerate(entry.placements):
        if placement.is_replicate():
            copy = copy * mesh.size(dim) + mesh.get_local_rank(dim)
            copies *= mesh.size(dim)
    return copy, copies


def _parts(entry: Entry, model: ParallelModel) -> tuple[Part, ...]:
    mesh, groups = model.storage.mesh, model.groups
    dp_dim = None if entry.replicated_over_dp else entry.plan.dp_dim
    dp = (mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1))
    return held_parts(entry.plan, (groups.sizes.tp, groups.tp_rank), dp, dp_dim)


def _gathering(entry: Entry | None, model: ParallelModel) -> Callable[[], Tensor]:
    def whole() -> Tensor:
        assert entry is not None, "only the stage that owns a parameter gathers it"
        held = entry.wrap(entry.local, model.storage.mesh).full_tensor()
        return in_original_order(held, entry.plan, model.groups.sizes.tp)

    return whole


def _buffer_items(model: ParallelModel) -> tuple[Item, ...]:
    """Return the buffers; ranks may have different values, and the first one's count."""
    groups = model.groups
    copy = int((groups.tp_rank, groups.dp_rank, groups.cp_rank) != (0, 0, 0))
    owners = buffer_owners(model.plan, model.module)
    return tuple(
        replace(_held_whole(names, buffer, owners[names[0]]), copy=copy)
        for names, buffer in _by_identity(persistent_buffers(model.module, aliases=True))
    )


def _plain_items(model: nn.Module) -> tuple[Item, ...]:
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= persistent_buffers(model, aliases=True)
    odd = next((n for n, t in tensors.items() if t.is_meta or hasattr(t, "placements")), None)
    if odd is not None:
        kind = "on meta" if tensors[odd].is_meta else "a DTensor"
        raise CheckpointError(
            f"cannot save or load {type(model).__name__}: '{odd}' is {kind}\n"
            "  options: give the ParallelModel that parallelize returns | a module with values"
        )
    items = []
    for names, tensor in _by_identity(tensors):
        param = tensor if isinstance(tensor, nn.Parameter) else None
        items.append(replace(_held_whole(names, tensor.detach(), 0), param=param))
    return tuple(items)


def _held_whole(names: tuple[str, ...], tensor: Tensor, owner: int) -> Item:
    shape = tuple(tensor.shape)
    parts = (Part(Box.whole(shape), (0,) * len(shape)),)
    return Item(names, shape, tensor.dtype, owner, tensor, parts, lambda: tensor)


def _by_identity(tensors: dict[str, Tensor]) -> list[tuple[tuple[str, ...], Tensor]]:
    """Return each tensor once, with all of its names."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return [(tuple(own), tensors[own[0]]) for own in names.values()]

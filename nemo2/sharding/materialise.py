"""Giving a rank's parameters their values, one at a time, each cut to this rank's shard at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import Nemo2Error
from ..mesh.groups import MeshGroups
from ..plan import ParamPlan, Plan
from .data_parallel import fsdp_params
from .fused import is_fused
from .initial import Initial
from .storage import Entry


class Source:
    """Whence parameters and buffers get their values: rank 0's copies, or drawn when on meta.

    Raises: Nemo2Error, on all ranks alike, for a model on meta that cannot be drawn again.
    """

    def __init__(self, model: nn.Module, groups: MeshGroups, seed: int) -> None:
        self._groups = groups
        self._initial = Initial(model, seed)
        self._values = {n: p.detach() for n, p in model.named_parameters()}
        self._errors: list[str] = []

    def parameter(self, param: ParamPlan, here: bool) -> Tensor | None:
        """Return the whole value of a parameter where it is wanted; asked for once, on all ranks.

        Communication: one broadcast over the world, unless it is drawn.
        """
        value = self._values.pop(param.name)
        if not value.is_meta:
            return self._from_rank_0(value)
        return self._drawn(param.name, value) if here else None

    def buffer(self, name: str, value: Tensor) -> Tensor:
        """Return the value of a buffer, which all ranks hold.

        Communication: one broadcast over the world, unless it is drawn.
        """
        if not value.is_meta:
            return self._from_rank_0(value)
        return self._drawn(name, value).to(self._groups.device)

    def close(self) -> None:
        """Free what was kept for the next value.

        Communication: one all-gather over the world, if some values were drawn.
        Raises: Nemo2Error on all ranks when a value could not be drawn on one of them.
        """
        self._initial.forget()
        if self._initial.names:
            everyone: list[Any] = [self._errors]
            if self._groups.sizes.world > 1:
                everyone = [None] * self._groups.sizes.world
                dist.all_gather_object(everyone, self._errors, group=self._groups.world)
            for errors in everyone:
                if errors:
                    raise Nemo2Error(errors[0])

    def _drawn(self, name: str, value: Tensor) -> Tensor:
        try:
            return self._initial.value(name)
        except Nemo2Error as error:  # others may wait in a collective: all raise in ``close``
            self._errors.append(str(error))
            return torch.empty_like(value, device="cpu")

    def _from_rank_0(self, value: Tensor) -> Tensor:
        value = value.to(self._groups.device, copy=True).contiguous()
        if self._groups.sizes.world > 1:
            root = int(self._groups.mesh.mesh.reshape(-1)[0])
            dist.broadcast(value, src=root, group=self._groups.world)
        return value


def materialise(
    plan: Plan,
    source: Source,
    entries: Mapping[str, Entry],
    module: nn.Module,
    managed: Sequence[nn.Module],
    groups: MeshGroups,
) -> None:
    """Fill ``entries``, which are on meta, and the buffers of ``module``.

    Args:
        managed: the modules that FSDP2 manages, which take over the shards.

    Communication: one broadcast over the world of each parameter and buffer that has values.
    """
    for param in plan.params:
        _fill(param, source, entries.get(param.name), groups)
    _fill_buffers(source, module)
    source.close()
    for held in fsdp_params(managed):
        held.reset_sharded_param()


def _fill_buffers(source: Source, module: nn.Module) -> None:
    """Give each buffer its value; what is one tensor in several places stays one."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, whose id is then not reused
    for name, sub in module.named_modules():
        for leaf, buffer in sub._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    value = source.buffer(f"{name}.{leaf}" if name else leaf, buffer)
                    made[id(buffer)] = buffer, value
                sub._buffers[leaf] = made[id(buffer)][1]


def _fill(param: ParamPlan, source: Source, entry: Entry | None, groups: MeshGroups) -> None:
    """Give one parameter its value; what is not this rank's is free when this returns."""
    value = source.parameter(param, entry is not None)
    if entry is None or value is None:
        return
    part: Tensor = _tp_part(value, param, groups)
    if isinstance(entry.compute, DTensor):
        part = DTensor.from_local(
            _like_shard(part, entry.compute, groups),
            entry.compute.device_mesh,
            entry.compute.placements,
            run_check=False,
            shape=entry.compute.shape,
            stride=entry.compute.stride(),
        )
    else:
        part = _own(part, value, groups.device)
    entry.compute = nn.Parameter(part, requires_grad=param.trainable)
    for owner, leaf in entry.places:
        owner._parameters[leaf] = entry.compute


def _tp_part(full: Tensor, param: ParamPlan, groups: MeshGroups) -> Tensor:
    """Return this rank's part of a whole parameter: a view, or of a fused one a copy."""
    dim, tp = param.tp_dim, groups.sizes.tp
    if dim is None:
        return full
    if not is_fused(param):
        return full.chunk(tp, dim)[groups.tp_rank]
    assert param.parts is not None
    return torch.cat(
        [p.chunk(tp, dim)[groups.tp_rank] for p in full.split_with_sizes(param.parts, dim)], dim
    )


def _like_shard(part: Tensor, shard: DTensor, groups: MeshGroups) -> Tensor:
    """Return a copy of what this rank's shard (on meta) holds of a tensor-parallel part."""
    (dim,) = (p.dim for p in shard.placements if p.is_shard())  # type: ignore[attr-defined]
    mesh = shard.device_mesh
    ranks, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    size = -(-part.shape[dim] // ranks)
    length = shard._local_tensor.shape[dim]
    own = part.narrow(dim, min(rank * size, part.shape[dim]), length)
    return _own(own, part, groups.device)


def _own(part: Tensor, whole: Tensor, device: torch.device) -> Tensor:
    """Return ``part`` on ``device``, with memory of its own unless it is all of ``whole``."""
    if part.numel() == whole.numel() and part.is_contiguous():
        return part.to(device)
    return torch.empty(part.shape, dtype=part.dtype, device=device).copy_(part)

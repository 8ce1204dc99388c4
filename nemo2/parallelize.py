"""From a module and a mesh to a ``ParallelModel``: plan, place, split, wrap."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .errors import Nemo2Error
from .limits import check_module
from .mesh.groups import MeshGroups, replica_mesh, stage_group
from .mesh.peers import check_peer_memory
from .options import Pipeline
from .places import places
from .plan import Plan, plan

if TYPE_CHECKING:
    from .model import ParallelModel

_PIPELINE = Pipeline()


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    data_parallel: Any = "fsdp",
    pipeline: Pipeline = _PIPELINE,
    inplace: bool = False,
    **options: Any,
) -> ParallelModel:
    """Return ``model`` split over ``mesh`` as its annotations say.

    The caller's module is left alone unless ``inplace``. Weights and buffers are those of
    the mesh's first rank, whatever the others drew. What is on meta is drawn, module by module,
    by the initialisers that its constructor used, from the first rank's
    ``torch.initial_seed()`` and the module's name: the same on every mesh. A rank's memory is
    then its shards and, while it draws, one module.

    Args:
        model: an annotated module, the same on every rank; may be on meta where
            ``reset_parameters`` of each module, ``self.apply(self._init_weights)`` or, in a model
            of transformers, ``_init_weights`` fill all of its tensors.
        mesh: from ``make_mesh``; axes it lacks have size 1.
        data_parallel: ``"fsdp"``, ``"zero1"``, ``"ddp"`` or a ``DataParallel``.
        pipeline: microbatches and schedule.
        inplace: turn the caller's own module into this rank's part.
        options: ``context_parallel``, ``sequence_parallel``, ``precision``, ``remat`` and
            ``compile`` of the plan.

    Communication: one broadcast of each parameter and buffer with values from the first rank.
    Raises: Nemo2Error and its subclasses, from the plan, on all ranks alike.
    """
    # DTensor, which these need, takes half a second to import.
    from .inside import note_parts
    from .model import ParallelModel
    from .pipeline.runner import StageRunner
    from .sharding.materialise import Source, materialise
    from .sharding.optimizers import step_on_shards
    from .sharding.storage import check_same_everywhere, finish, place, shard_over_dp, storage_mesh

    _check_arguments(model, mesh)
    planned = plan(model, mesh, data_parallel=data_parallel, pipeline=pipeline, **options)
    groups = MeshGroups.of(mesh)
    check_same_everywhere(planned, model, groups)
    if planned.options.compile is not None and planned.options.compile.async_tp:
        check_peer_memory(groups)
    seed = _seed(groups)
    source = Source(model, groups, seed)
    module = model if inplace else _copy_without_parameters(model)
    where = places(module)
    entries = place(planned, where, module, groups)
    runner = StageRunner(module, planned, groups, where)
    managed: list[nn.Module] = []
    data = groups.data_mesh
    if planned.options.data_parallel.shards(planned.sizes) > 1:
        data = replica_mesh(groups, planned.options.data_parallel.replicate)
        managed = shard_over_dp(
            planned, runner, module, list(entries.values()), data, groups.pp_rank
        )
    runner.split_into_stages()
    materialise(planned, source, entries, module, managed, groups)
    storage = finish(entries, storage_mesh(groups, data), planned.options)
    ties = _tie_groups(planned, groups)
    made = ParallelModel(runner, planned, groups, storage, managed, ties, mesh, seed, where)
    note_parts(made)
    step_on_shards(storage, groups.sizes.pp)
    return made


def _copy_without_parameters(model: nn.Module) -> nn.Module:
    """Return a deep copy of ``model`` that shares its parameters, to be replaced one by one."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _tie_groups(plan: Plan, groups: MeshGroups) -> dict[str, dist.ProcessGroup]:
    """Make the groups over which the gradients of parameters tied across ranks are summed.

    Communication: making groups; the same order on all ranks of the mesh.
    """
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    ties: dict[str, dist.ProcessGroup] = {}
    for param in plan.params:
        if len(param.ranks) > 1:
            if param.ranks not in made:
                made[param.ranks] = stage_group(groups, param.ranks)
            group = made[param.ranks]
            if group is not None:
                ties[param.name] = group
    return ties


def _seed(groups: MeshGroups) -> int:
    """Return the first rank's random seed, on every rank."""
    seed = torch.tensor(
        [torch.initial_seed() & 0x7FFF_FFFF], dtype=torch.int64, device=groups.device
    )
    if groups.sizes.world > 1:
        dist.broadcast(seed, src=int(groups.mesh.mesh.reshape(-1)[0]), group=groups.world)
    return int(seed.item())


def _check_arguments(model: Any, mesh: Any) -> None:
    """Refuse what is no module of one device, or no mesh of processes."""
    check_module(model, "parallelize")
    if not isinstance(mesh, DeviceMesh):
        raise Nemo2Error(
            f"parallelize(model, mesh): mesh must be a DeviceMesh, it is {type(mesh).__name__}\n"
            "  options: nemo2.make_mesh(tp=2); plan and verify take sizes"
        )

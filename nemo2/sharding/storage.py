"""Where parameters live: plain local tensors inside a run, DTensors outside.

A run computes on plain local parameters (FSDP2's own over ``dp``). Between runs the module
holds *views* of the same memory as DTensors over the mesh ``(tp, dp)``, or with replicas of
shards ``(tp, replicate, dp)``, under the original names: what optimizers, checkpoints and users
see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..errors import Nemo2Error, ShardingError
from ..mesh.groups import MeshGroups
from ..options import Options
from ..pipeline.absent import Absent
from ..pipeline.stages import ranks_of
from ..places import Place
from ..plan import ParamPlan, Plan
from ..trace import Trace
from .collectives import gather_single
from .precision import compute_copy, filled


@dataclass
class Entry:
    """One parameter on this rank.

    Attributes:
        places: the (module, attribute) pairs that hold it on this stage.
        compute: the parameter that a run uses: plain and local to ``tp``; under FSDP its
            shard over ``dp``.
        view: the same memory as a DTensor parameter, outside of runs.
        leaf: what the user's code differentiates in a run: ``compute``, or its copy in another
            precision, whose gradients ``compute`` receives.
    """

    plan: ParamPlan
    places: list[tuple[nn.Module, str]]
    compute: nn.Parameter
    placements: tuple[Placement, ...]
    view: nn.Parameter = field(init=False)
    leaf: nn.Parameter = field(init=False)

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def trainable(self) -> bool:
        """Whether this run differentiates it; the user may freeze it at any time."""
        return self.compute.requires_grad

    @property
    def local(self) -> Tensor:
        """This rank's memory of the parameter."""
        return local_of(self.compute)

    @property
    def replicated_over_dp(self) -> bool:
        return all(p.is_replicate() for p in self.placements[1:])

    def wrap(self, local: Tensor, mesh: DeviceMesh) -> DTensor:
        """Return ``local`` (in the layout of this parameter) as a DTensor of global shape."""
        shape = torch.Size(self.plan.shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, mesh, self.placements, run_check=False, shape=shape, stride=stride
        )

    def show(self, compute: bool) -> None:
        for module, leaf in self.places:
            module._parameters[leaf] = self.leaf if compute else self.view


def local_of(x: Tensor) -> Tensor:
    """Return the local memory of a tensor that may be a DTensor, without autograd."""
    return x._local_tensor if isinstance(x, DTensor) else x.detach()


@dataclass
class Storage:
    """All parameters of this rank's stage, in the order of the unsplit model."""

    entries: dict[str, Entry]
    mesh: DeviceMesh
    shown: bool = field(default=False, init=False)  # whether the plain parameters are in place

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def follow_freezing(self) -> None:
        """Let the next run follow ``requires_grad_(False)`` on the views since the last.

        Raises: Nemo2Error for a parameter that was frozen when the model was split and is not
            now: the plan has left its gradient out.
        """
        late = [e.name for e in self if e.view.requires_grad and not e.plan.trainable]
        if late:
            raise Nemo2Error(
                f"{len(late)} parameters such as '{late[0]}' were frozen when the model was split, "
                "and are trained now\n"
                "  options: unfreeze before parallelize, and freeze after it what is to be frozen"
            )
        for e in self:
            if e.compute.requires_grad != e.view.requires_grad:
                e.compute.requires_grad_(e.view.requires_grad)
                e.leaf.requires_grad_(e.view.requires_grad)

    def check_places(self, door: nn.Module) -> None:
        """Raise Nemo2Error when other tensors stand in the places of parameters.

        Args:
            door: what users call; torch's functions put tensors there, under the same names.
        """
        if self.shown:
            return
        strange = [e.name for e in self for m, x in e.places if m._parameters.get(x) is not e.view]
        strange += [e.name for e in self if e.name in door.__dict__ or e.name in door._parameters]
        if strange:
            raise Nemo2Error(
                f"parameters such as '{strange[0]}' ({len(strange)} in all) were replaced after the"
                " model was split (torch.func.functional_call, load_state_dict(assign=True)), which"
                " a run would not see\n"
                "  options: nemo2.value_and_grad(loss_fn, model)(params, batch) |"
                " model.load_full_state_dict(state) | nemo2.load | copy into them under no_grad"
            )

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Put the plain local parameters into the module for the time of a run, or of several."""
        if self.shown:
            yield
            return
        with filled((entry.compute, entry.leaf) for entry in self):
            for entry in self:
                entry.show(compute=True)
            self.shown = True
            try:
                yield
            finally:
                self.shown = False
                for entry in self:
                    entry.show(compute=False)


def storage_mesh(groups: MeshGroups, data: DeviceMesh) -> DeviceMesh:
    """Return the mesh ``(tp, dp)`` of this stage, on which parameters are DTensors.

    ``tp`` comes first: a dim is split by tensor parallelism, and FSDP splits what is left.

    Args:
        data: the mesh of dp and cp that FSDP uses; when it is ``(replicate, dp)``, the mesh
            returned is ``(tp, replicate, dp)``.
    """
    ranks = groups.mesh.mesh[groups.pp_rank].reshape(-1, groups.sizes.tp).T.contiguous()
    names = ("replicate", "dp") if data.ndim == 2 else ("dp",)
    return DeviceMesh.from_group(
        [groups.tp, *data.get_all_groups()],
        groups.device.type,
        mesh=ranks.reshape(groups.sizes.tp, *data.shape),
        mesh_dim_names=("tp", *names),
    )


def check_same_everywhere(plan: Plan, model: nn.Module, groups: MeshGroups) -> None:
    """Raise on all ranks alike when the ranks do not hold the same model and options.

    Communication: one all-gather of 32 bytes a rank over the world.
    """
    if groups.sizes.world == 1:
        return
    tensors = (*model.named_parameters(), *model.named_buffers())
    on_meta = [name for name, x in tensors if x.is_meta]
    text = repr((plan.sizes, plan.options, plan.params, plan.blocks, plan.stages, on_meta))
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    digest = digest.to(groups.device)
    everyone = digest.new_empty((groups.sizes.world * digest.numel(),))
    gather_single(everyone, digest, group=groups.world)
    rows = everyone.view(groups.sizes.world, -1)
    odd = [r for r in range(groups.sizes.world) if not torch.equal(rows[r], rows[0])]
    if odd:
        raise Nemo2Error(
            "parallelize got different models or options on different ranks:"
            f" ranks {odd} differ from rank 0\n"
            "  options: build the same model with the same annotations and options, on meta or not,"
            " on every rank"
        )


def place(
    plan: Plan, where: Sequence[Place], module: nn.Module, groups: MeshGroups
) -> dict[str, Entry]:
    """Put this rank's parameters, on meta, into the places of ``module``.

    Parameters of other stages leave ``_parameters`` and stay behind as absent attributes.
    """
    entries: dict[str, Entry] = {}
    by_param: dict[str, list[Place]] = {}
    for w in where:
        by_param.setdefault(w.param, []).append(w)
    for param in plan.params:
        if groups.pp_rank in param.ranks:
            part = torch.empty(param.local_shape, dtype=param.dtype, device="meta")
            compute = nn.Parameter(part, requires_grad=param.trainable)
            entries[param.name] = Entry(param, [], compute, ())
        absent = placeholder(param, plan.options, groups.device)
        for w in by_param[param.name]:
            w.module._parameters.pop(w.leaf)
            if groups.pp_rank in ranks_of(param.homes_of(w.names), plan.stages):
                entries[param.name].places.append((w.module, w.leaf))
                w.module._parameters[w.leaf] = entries[param.name].compute
            else:
                w.module.__dict__[w.leaf] = absent
    return entries


def placeholder(param: ParamPlan, options: Options, device: torch.device) -> Absent:
    """Return what stands for a parameter on stages that do not hold it."""
    absent = Absent.like(param.shape, options.compute_dtype(param.dtype), device)
    absent.param = param.name
    return absent


def shard_over_dp(
    plan: Plan,
    runner: nn.Module,
    module: nn.Module,
    entries: Sequence[Entry],
    data: DeviceMesh,
    pp_rank: int,
) -> list[nn.Module]:
    """Split the parameters over ``data`` with FSDP2; returns the modules that FSDP manages.

    They are still on meta, so that no rank ever holds more than its shards. Parameters that
    FSDP2 cannot split are left whole: see ``ParamPlan.dp_dim``. The last module returned is the
    runner, which holds what is outside of the blocks.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # The run casts the batch itself, the same for all kinds of data parallelism.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if plan.options.precision is not None:
        low = plan.options.compute_dtype(torch.float32)
        policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    ignored = {e.compute for e in entries if e.plan.dp_dim is None}
    by_id = {id(e.compute): e for e in entries}
    keep = plan.options.data_parallel.keeps(plan.sizes, plan.options.pipeline)

    def placement(param: nn.Parameter) -> Shard:
        return Shard(by_id[id(param)].plan.dp_dim or 0)

    blocks = [
        module.get_submodule(plan.blocks[i])
        for stage in plan.stages_of(pp_rank)
        for i in range(stage.first, stage.last + 1)
    ]
    managed: list[nn.Module] = []
    for target in (*blocks, runner):
        if target is runner or any(p.numel() for p in target.parameters()):
            fully_shard(
                target,
                mesh=data,
                # Without pipelining the backward of the runner follows its forward at once.
                reshard_after_forward=not (keep or (target is runner and plan.sizes.pp == 1)),
                shard_placement_fn=placement,
                mp_policy=policy,
                ignored_params=ignored,
            )
            managed.append(target)
    for entry in entries:
        owner, leaf = entry.places[0]
        compute = owner._parameters[leaf]
        assert compute is not None
        entry.compute = compute
    return managed


def finish(entries: dict[str, Entry], mesh: DeviceMesh, options: Options) -> Storage:
    """Make the DTensor views and leave the module with them."""
    for entry in entries.values():
        tp = Replicate() if entry.plan.tp_dim is None else Shard(entry.plan.tp_dim)
        over_dp = isinstance(entry.compute, DTensor)
        dtype = entry.plan.dtype if over_dp else options.compute_dtype(entry.plan.dtype)
        entry.leaf = compute_copy(entry.compute, dtype)
        dp = Shard(entry.plan.dp_dim or 0) if over_dp else Replicate()
        entry.placements = (tp, *[Replicate()] * (mesh.ndim - 2), dp)
        entry.view = nn.Parameter(entry.wrap(entry.local, mesh), requires_grad=entry.plan.trainable)
        entry.show(compute=False)
    return Storage(entries, mesh)


def refuse_uses_outside(trace: Trace, plan: Plan) -> None:
    """Raise when a step uses a parameter of a block outside of it: FSDP holds it split there."""
    split = {p.name for p in plan.params if p.dp_dim is not None}
    for name, scopes in trace.param_scopes.items():
        block = next((b for b in plan.blocks if name.startswith(b + ".")), None)
        if name in split and block is not None and any(block not in scope for scope in scopes):
            raise ShardingError(
                f"the step uses '{name}' outside of its block '{block}', where it is split\n"
                "  options: data_parallel='ddp' | the optimizer's weight_decay, not a penalty"
            )

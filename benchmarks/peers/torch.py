"""Hand-written PyTorch: FSDP2, parallelize_module, torch's pipelining, compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from ..case import Case, Step
from ..llama import Llama, fill, loss_of, rotary
from .context import Cut, split_attention


class Part(nn.Module):
    """The layers of one stage, with the embedding or the head where they belong."""

    def __init__(self, whole: Llama, first: int, last: int) -> None:
        super().__init__()
        self.shape, end = whole.shape, last == len(whole.layers)
        self.embed = whole.embed if first == 0 else None
        self.layers = whole.layers[first:last]
        self.norm, self.head = (whole.norm, whole.head) if end else (None, None)
        self.cut: Cut | None = None

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = rotary(self.shape.sequence, self.shape.head, x.device)
        if self.cut is not None:
            cos, sin = self.cut.of(cos, 0), self.cut.of(sin, 0)
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x if self.head is None else self.head(self.norm(x))


def build(case: Case) -> Step:
    sizes = case.sizes
    if sizes.cp > 1 and sizes.pp * sizes.tp > 1:
        raise ValueError(f"this peer's context parallelism is written for dp and cp, not {sizes}")
    shape = tuple(size for _, size in sizes.items())
    mesh = init_device_mesh(case.device.type, shape, mesh_dim_names=("pp", "dp", "cp", "tp"))
    with case.device:
        whole = Llama(case.shape)
    fill(whole)
    count = sizes.pp * case.virtual_stages
    own = [i for i in range(count) if i % sizes.pp == mesh.get_local_rank("pp")]
    each = case.shape.layers / count
    parts = [Part(whole, round(i * each), round((i + 1) * each)) for i in own]
    del whole
    if sizes.cp > 1:
        parts[0].cut = Cut(mesh.get_group("cp"))
        split_attention(parts[0], parts[0].cut)
    for part in parts:
        _parallelize(part, mesh, case)
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=case.lr, fused=True)
    run = _pipeline(parts, own, count, mesh, case) if count > 1 else _plain(parts[0], case)

    def step(ids: Tensor) -> Tensor:
        loss = run(case.part(ids, mesh.get_local_rank("dp")))
        optimizer.step()
        optimizer.zero_grad()
        return _mean(loss, mesh, case)

    return step


def _parallelize(part: Part, mesh: DeviceMesh, case: Case) -> None:
    if case.sizes.tp > 1:
        _tensor_parallel(part, mesh["tp"])
    if case.compile:
        for layer in part.layers:
            layer.compile(fullgraph=True)
    if case.sizes.dp * case.sizes.cp == 1 and case.dtype == torch.float32:
        return
    # On a mesh of one it only casts, which is how it is done by hand.
    policy = MixedPrecisionPolicy(param_dtype=case.dtype, reduce_dtype=torch.float32)
    data = mesh["dp"] if case.sizes.cp == 1 else mesh["dp", "cp"]._flatten("dp_cp")
    how: Any = {"mesh": data, "mp_policy": policy, "reshard_after_forward": case.reshard}
    for layer in part.layers:
        fully_shard(layer, **how)
    fully_shard(part, **how)


def _tensor_parallel(part: Part, mesh: DeviceMesh) -> None:
    """Annotate as torchtitan does: sequence parallel between the projections."""
    whole = PrepareModuleInput(
        input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
    )
    block = {
        "attention_norm": SequenceParallel(),
        "attention": whole,
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.w1": ColwiseParallel(),
        "mlp.w3": ColwiseParallel(),
        "mlp.w2": RowwiseParallel(output_layouts=Shard(1)),
    }
    for layer in part.layers:
        parallelize_module(layer, mesh, block)
    ends: dict[str, Any] = {}
    if part.embed is not None:
        ends["embed"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if part.head is not None:
        ends["norm"] = SequenceParallel()
        ends["head"] = ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        )
    parallelize_module(part, mesh, ends)


def _plain(part: Part, case: Case) -> Callable[[Tensor], Tensor]:
    """Return the step without stages: gradients summed over microbatches."""
    managed: Any = part if hasattr(part, "set_requires_gradient_sync") else None

    def run(ids: Tensor) -> Tensor:
        total = torch.zeros((), device=case.device)
        for i, one in enumerate(ids.chunk(case.microbatches)):
            if managed is not None:
                last = i == case.microbatches - 1
                managed.set_requires_gradient_sync(last)
                managed.set_is_last_backward(last)
                managed.set_reshard_after_backward(last or case.reshard)
            inputs, targets = one[:, :-1], one[:, 1:]
            if part.cut is not None:
                inputs, targets = part.cut.of(inputs, 1), part.cut.of(targets, 1)
            with loss_parallel():
                loss = loss_of(part(inputs), targets) / case.microbatches
                loss.backward()
            total += loss.full_tensor() if isinstance(loss, DTensor) else loss.detach()
        return total

    return run


def _pipeline(
    parts: list[Part],
    own: list[int],
    count: int,
    mesh: DeviceMesh,
    case: Case,
) -> Callable[[Tensor], Tensor]:
    stages = [
        PipelineStage(part, i, count, case.device, group=mesh.get_group("pp"))
        for part, i in zip(parts, own, strict=True)
    ]
    schedule: Any
    if case.virtual_stages > 1:
        schedule = ScheduleInterleaved1F1B(stages, case.microbatches, loss_of)
    else:
        schedule = Schedule1F1B(stages[0], case.microbatches, loss_of)
    first, last = own[0] == 0, own[-1] == count - 1

    def run(ids: Tensor) -> Tensor:
        losses: list[Tensor] = []
        inputs = (ids[:, :-1].contiguous(),) if first else ()
        extra = {"target": ids[:, 1:].contiguous(), "losses": losses} if last else {}
        with loss_parallel():
            schedule.step(*inputs, **extra)
        if not losses:
            return torch.zeros((), device=case.device)
        each = [x.full_tensor() if isinstance(x, DTensor) else x for x in losses]
        return torch.stack([x.detach() for x in each]).mean()

    return run


def _mean(loss: Tensor, mesh: DeviceMesh, case: Case) -> Tensor:
    """Return the mean loss over dp and cp, on every rank."""
    if case.sizes.pp > 1:  # stages without a loss have zero
        dist.all_reduce(loss, group=mesh.get_group("pp"))
    for axis in ("dp", "cp"):
        if mesh[axis].size() > 1:
            dist.all_reduce(loss, group=mesh.get_group(axis))
    return loss / (case.sizes.dp * case.sizes.cp)

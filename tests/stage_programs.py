"""Small models cut by hand into stages that hand over all kinds of boundaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo2.pipeline.boundary import Boundary, TensorSpec
from nemo2.pipeline.megatron import Chunk, run_schedule

Tensors = tuple[Tensor, ...]


def batch(microbatch: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + microbatch)
    return torch.randn(4, 6, dtype=torch.float64, generator=generator).to(device)


class Stage(nn.Module):
    """One stage of a model whose stages hand over what ``kind`` says."""

    def __init__(self, kind: str, index: int, size: int, device: str) -> None:
        super().__init__()
        torch.manual_seed(index)
        self.kind, self.index = kind, index
        self.a, self.b = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))
        self.to(device)
        frozen = {"frozen": range(min(2, size - 1)), "frozen middle": range(1, size - 1)}
        if index in frozen.get(kind, ()):
            self.requires_grad_(False)

    def start(self, microbatch: int) -> Tensors:
        x = batch(microbatch, self.a.weight.device.type)
        return KINDS[self.kind](self, (x,))

    def forward(self, microbatch: int, received: Tensors) -> Tensors:
        dropped = self.kind in ("empty", "integers") or (self.kind == "unused" and self.index == 1)
        if not received or dropped:
            return self.start(microbatch)
        return KINDS[self.kind](self, received)

    def loss(self, microbatch: int, values: Tensors) -> Tensor:
        if self.kind in ("empty", "integers"):
            values = (self.a(batch(microbatch, self.a.weight.device.type)),)
        parts = [torch.view_as_real(v.resolve_conj()) if v.is_complex() else v for v in values]
        return sum((p.double().square().sum() for p in parts), torch.zeros([]).double()).reshape(1)[
            0
        ]


def one(stage: Stage, values: Tensors) -> Tensors:
    return (torch.tanh(stage.a(values[0])),)


def two(stage: Stage, values: Tensors) -> Tensors:
    x = torch.tanh(stage.a(values[0]))
    y = values[1] if len(values) > 1 else x.reshape(2, 2, 6)[:, :, :3]
    return x, y * stage.b(x).mean()


def beside(stage: Stage, values: Tensors) -> Tensors:
    x = torch.tanh(stage.a(values[0]))
    if len(values) > 1:
        _, count, mask, scale = values
        x = torch.where(mask, x, x * count.double().unsqueeze(1) * scale)
    count = torch.arange(4, device=x.device) + stage.index
    return x, count, x.detach() > 0, (x.detach() * 2).float().mean()


def mixed(stage: Stage, values: Tensors) -> Tensors:
    x = torch.tanh(stage.a(values[0]))
    extra = sum((v.double().sum() for v in values[1:]), torch.zeros([]).double().to(x))
    y = stage.b(x) + extra
    return x, y.float(), y.mean().bfloat16()


def complexes(stage: Stage, values: Tensors) -> Tensors:
    x = torch.tanh(stage.a(values[0]))
    y = torch.complex(x, stage.b(x))[:, 1:].conj()
    if len(values) > 2:
        y = y * values[2]
    return x, x.mean().float(), y, y.detach().to(torch.complex64)


def inplace(stage: Stage, values: Tensors) -> Tensors:
    x = values[0] if stage.index else values[0].clone()
    x += stage.a(x.tanh())  # a residual in place, as many models write it
    x.mul_(2.0)
    return x, stage.b(x.tanh()).t()


def noncontiguous(stage: Stage, values: Tensors) -> Tensors:
    x = values[0] if values[0].shape == (4, 6) else values[0].t()
    return (torch.tanh(stage.a(x)).t(),)


def expanded(stage: Stage, values: Tensors) -> Tensors:
    x = torch.tanh(stage.a(values[0]))
    return x[:1].expand(4, 6), x[:, 1:2].detach().expand(4, 3)


def hollow(stage: Stage, values: Tensors) -> Tensors:
    x = torch.tanh(stage.a(values[0][:, :6]))
    return x, x[:0].clone()


def only_hollow(stage: Stage, values: Tensors) -> Tensors:
    x = stage.a(torch.ones_like(stage.a.weight)) + values[0].sum()
    return (x[:0].clone(),)


def empty(stage: Stage, values: Tensors) -> Tensors:
    return ()


def integers(stage: Stage, values: Tensors) -> Tensors:
    return (torch.arange(3, device=values[0].device),)


KINDS: dict[str, Callable[[Stage, Tensors], Tensors]] = {
    "one": one,
    "two": two,
    "beside": beside,
    "mixed": mixed,
    "complex": complexes,
    "inplace": inplace,
    "noncontiguous": noncontiguous,
    "expanded": expanded,
    "hollow": hollow,
    "only_hollow": only_hollow,
    "empty": empty,
    "integers": integers,
    "frozen": one,
    "frozen middle": one,
    "unused": one,
}


# Kinds whose boundary tensors are not contiguous.
STRIDED = {"complex", "expanded", "inplace", "noncontiguous"}


class Program:
    """A stage as the adapter sees it; ``before`` is called in each forward."""

    def __init__(self, stage: Stage, last: bool, before: Callable[[int], None]) -> None:
        self.stage, self.last, self.before = stage, last, before

    def forward(self, microbatch: int, received: Tensors) -> Any:
        self.before(microbatch)
        values = self.stage(microbatch, received)
        return self.stage.loss(microbatch, values) if self.last else values


def spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


class Setup:
    """Every rank builds all stages and knows the boundaries; ``run`` runs its own stages."""

    def __init__(self, kind: str, virtual_stages: int = 1) -> None:
        self.size = dist.get_world_size()
        self.rank = dist.get_rank()
        self.device = "cuda" if torch.cuda.is_initialized() else "cpu"
        count = self.size * virtual_stages
        self.stages = [Stage(kind, i, count, self.device) for i in range(count)]
        self.boundaries: list[Boundary] = []
        values: Tensors = ()
        for stage in self.stages[:-1]:
            values = stage(0, values)
            self.boundaries.append(Boundary(tuple(spec(v) for v in values)))

    @property
    def own(self) -> nn.ModuleList:
        return nn.ModuleList(self.stages[self.rank :: self.size])

    def reference(self, microbatches: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the losses and this rank's gradients of the unsplit program."""
        losses = []
        for microbatch in range(microbatches):
            values: Tensors = ()
            for stage in self.stages:
                values = stage(microbatch, values)
            losses.append(self.stages[-1].loss(microbatch, values))
            losses[-1].backward()
        gradients = [p.grad for p in self.own.parameters()]
        for stage in self.stages:
            stage.zero_grad()
        return [loss.detach() for loss in losses], gradients

    def run(
        self,
        microbatches: int,
        before: Callable[[int], None] = lambda microbatch: None,
        make: Callable[..., Any] = Program,
        **options: Any,
    ) -> list[Any]:
        chunks = []
        for stage in self.stages[self.rank :: self.size]:
            last = stage is self.stages[-1]
            incoming = self.boundaries[stage.index - 1] if stage.index else None
            outgoing = None if last else self.boundaries[stage.index]
            chunks.append(Chunk(make(stage, last, before), incoming, outgoing))
        defaults = {"forward_only": False, "pp_group": dist.group.WORLD}
        return run_schedule(
            chunks,
            microbatches=microbatches,
            pp_rank=self.rank,
            pp_size=self.size,
            device=torch.device(self.device),
            schedule="interleaved" if len(chunks) > 1 else "1f1b",
            **defaults | options,
        )

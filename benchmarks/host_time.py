"""Host time of one block under nemo2 against the same block on plain local tensors.

``torchrun --nproc-per-node 2 -m benchmarks.host_time --compile``: two tensor-parallel ranks.
Without torchrun it is rank 0 of two in a group that sends nothing: all host time. The plain block
is written for one rank's shard, with the two all-reduces forward and two backward that a
hand-written tensor-parallel block has. Times are host microseconds until the calls return, median
of many; on CUDA the device runs behind.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import nemo2
from examples.gpt import GPT, GPTConfig
from nemo2.sharding.collectives import Axis, reduce, vary
from tests import models


class Plain(nn.Module):
    """One rank's shard of ``examples.gpt.Block``, written by hand."""

    def __init__(self, cfg: GPTConfig, axis: Axis) -> None:
        super().__init__()
        width, part = cfg.width, cfg.width // axis.degree
        self.size, self.axis = cfg.width // cfg.heads, axis
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, part) for _ in range(3))
        self.out, self.up = nn.Linear(part, width), nn.Linear(width, 4 * part)
        self.down = nn.Linear(4 * part, width)

    def forward(self, x: Tensor) -> Tensor:
        y = vary(self.norm1(x), self.axis)
        q, k, v = (
            f(y).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + (reduce(F.linear(y, self.out.weight), self.axis) + self.out.bias)
        y = F.gelu(self.up(vary(self.norm2(x), self.axis)))
        return x + (reduce(F.linear(y, self.down.weight), self.axis) + self.down.bias)


class _Copied(torch.autograd.Function):
    """``vary`` as it is written for torch.compile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad.contiguous(), ctx.group), None


class _Reduced(torch.autograd.Function):
    """``reduce`` as it is written for torch.compile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _summed(x: Tensor, group: str) -> Tensor:
    ops: Any = torch.ops._c10d_functional
    out: Tensor = ops.wait_tensor(ops.all_reduce(x, "sum", group))
    return out


class Traced(nn.Module):
    """``Plain`` with functional collectives."""

    def __init__(self, plain: Plain, axis: Axis) -> None:
        super().__init__()
        assert axis.group is not None
        self.plain, self.group = plain, str(axis.group.group_name)

    def forward(self, x: Tensor) -> Tensor:
        p = self.plain
        y = _Copied.apply(p.norm1(x), self.group)
        q, k, v = (
            f(y).unflatten(-1, (-1, p.size)).transpose(1, 2) for f in (p.query, p.key, p.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + (_Reduced.apply(F.linear(y, p.out.weight), self.group) + p.out.bias)
        y = F.gelu(p.up(_Copied.apply(p.norm2(x), self.group)))
        return x + (_Reduced.apply(F.linear(y, p.down.weight), self.group) + p.down.bias)


def host_us(block: Callable[[Tensor], Tensor], x: Tensor, count: int = 200) -> tuple[float, float]:
    """Return the median host time of a forward, and of forward and backward, in microseconds."""
    forward, both = [], []
    for i in range(count):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        y = block(x)
        middle = time.perf_counter()
        y.sum().backward()
        end = time.perf_counter()
        if i > count // 4:
            forward.append(1e6 * (middle - start))
            both.append(1e6 * (end - start))
    return statistics.median(forward), statistics.median(both)


def in_model(model: nn.Module, ids: Tensor, mesh: DeviceMesh, *, compile: bool) -> nn.Module:
    """Return the first block of a parallel model, planned, with its local parameters shown."""
    parallel = nemo2.parallelize(model, mesh, sequence_parallel=False, compile=compile)
    nemo2.value_and_grad(lambda m, b: m(b).float().square().mean(), parallel)(parallel.params, ids)
    for entry in parallel.storage:
        entry.show(compute=True)
    return parallel.module.layers[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compiled blocks, too")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = nemo2.make_mesh(tp=-1, device=device)
    axis = Axis("tp", mesh.get_group("tp"), mesh.get_local_rank("tp"), mesh["tp"].size())
    cfg = GPTConfig(width=32 * 16 if device == "cuda" else 32 * 4, length=64)
    ids = torch.randint(0, 64, (2, 16), device=device)
    x = torch.randn(2, 16, cfg.width, device=device, requires_grad=True)
    plain, rows = Plain(cfg, axis).to(device), []
    proved = in_model(GPT(cfg), ids, mesh, compile=False)
    rows.append(("plain local tensors, by hand", *host_us(plain, x)))
    rows.append(("nemo2, proved (examples/gpt.py)", *host_us(proved, x)))
    if args.compile:
        traced = Traced(plain, axis)
        rows.append(("by hand, torch.compile", *host_us(torch.compile(traced, fullgraph=True), x)))
        own = in_model(GPT(cfg), ids, mesh, compile=True)
        rows.append(("nemo2, compile=True", *host_us(own, x)))
    small = torch.randn(2, 16, models.WIDTH, device=device, requires_grad=True)
    rows.append(("one device, nanoGPT style", *host_us(models.GPT().to(device).layers[0], small)))
    own = in_model(models.GPT(), ids, mesh, compile=False)
    rows.append(("nemo2, emulated (nanoGPT style)", *host_us(own, small)))
    if dist.get_rank() == 0:
        print(f"torch {torch.__version__}, {device}, tp={axis.degree}, {os.cpu_count()} cores")
        for name, forward, both in rows:
            print(f"  {name:34} forward {forward:7.0f} us   forward+backward {both:7.0f} us")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

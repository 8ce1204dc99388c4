"""One peer's training step on one mesh: time, speed, memory, losses; as one line of JSON.

``torchrun --nproc-per-node 4 -m benchmarks.train --shape 8b16l --mesh tp=2,pp=2 --peer nemo2``.
A ratio of two peers counts only when both ran in one go on one machine: ``benchmarks.performance``
does that for whole tables. With ``--alone`` rank 0 of the mesh runs on one device, and its
collectives return at once: what that rank computes, holds and waits for its host, and no losses.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo2.mesh import MeshSizes

from .attribution import attribute, longest, traced
from .case import Case
from .llama import tokens

PEERS = ("nemo2", "torch", "megatron")
KERNELS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "any": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="8b16l")
    parser.add_argument("--mesh", default="dp=1", help="for example tp=2,pp=2")
    parser.add_argument("--peer", choices=PEERS, default="nemo2")
    parser.add_argument("--attention", choices=tuple(KERNELS), default="any")
    parser.add_argument("--virtual-stages", type=int, default=1, help="2 or more: interleaved")
    parser.add_argument("--context", default="ring", help="method of nemo2's context parallelism")
    parser.add_argument("--async-tp", action="store_true", help="nemo2's Compile(async_tp=True)")
    parser.add_argument("--eager", action="store_true", help="do not compile blocks")
    parser.add_argument("--reshard", action="store_true", help="free gathered parameters")
    parser.add_argument("--alone", action="store_true", help="rank 0, without communication")
    parser.add_argument("--steps", type=int, default=5, help="measured, after two")
    parser.add_argument("--profile", action="store_true", help="one more step, attributed")
    parser.add_argument("--losses", type=int, default=0, help="steps whose losses are recorded")
    return parser.parse_args(given)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one peer; called on all ranks of a process group."""
    ranks = 1 if args.alone else dist.get_world_size()
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    index = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", index) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif args.profile:
        raise ValueError("--profile reads a trace of GPU kernels: it needs a GPU for each rank")
    schedule = "interleaved" if args.virtual_stages > 1 else "1f1b"
    case = Case(
        args.shape,
        MeshSizes.of(args.mesh),
        device,
        schedule,
        args.virtual_stages,
        not args.eager,
        args.reshard,
        args.context,
        args.async_tp,
    )
    peak = matmul_flops(device)
    begun = time.perf_counter()
    step = importlib.import_module(f".peers.{args.peer}", __package__).build(case)
    built = time.perf_counter() - begun
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses: list[float] = []
    times: list[float] = []
    with sdpa_kernel(KERNELS[args.attention]), _one_dtype(device):
        for i in range(max(args.steps + 2, args.losses)):
            ids = tokens(case.shape, i, device)
            _synchronize(device)
            start = time.perf_counter()
            loss = step(ids)
            _synchronize(device)
            times.append(time.perf_counter() - start)
            losses.append(float(loss.detach()))
        profiled = profile(partial(step, ids), ranks) if args.profile else {}
    seconds = statistics.median(times[2:])
    used = torch.tensor([memory(device)], device=device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    shape, world = case.shape, dist.get_world_size()
    speed = shape.batch * shape.sequence / seconds / world
    return {
        "shape": args.shape,
        "mesh": args.mesh,
        "peer": args.peer,
        "attention": args.attention,
        "virtual_stages": args.virtual_stages,
        "context": args.context,
        "async_tp": args.async_tp,
        "alone": args.alone,
        "compiled": not args.eager,
        "reshard": args.reshard,
        "ms": round(1e3 * seconds, 2),
        "tokens_per_second_per_device": round(speed, 1),
        "mfu": round(speed * shape.flops / peak, 4),
        "matmul_tflops": round(peak / 1e12, 2),
        "peak_gib": round(float(used) / 2**30, 2),
        "build_s": round(built, 1),
        "first_step_s": round(times[0], 1),
        "losses": [] if args.alone else [round(x, 5) for x in losses[: max(args.losses, 3)]],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        **profiled,
    }


def profile(step: Callable[[], object], ranks: int) -> dict[str, Any]:
    """Return where the time of one step goes, rank by rank; rank 0 says which kernels take most."""
    kernels, wall = traced(step)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, attribute(kernels, wall))
    del everyone[ranks:]
    if dist.get_rank() == 0:
        print("\n".join(longest(kernels)), file=sys.stderr, flush=True)
    return {"milliseconds": everyone}


def matmul_flops(device: torch.device) -> float:
    """Return what a large matrix product reaches on this device, in operations a second."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = []
    for _ in range(12):
        _synchronize(device)
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times[2:])


def memory(device: torch.device) -> float:
    """Return the peak in bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _one_dtype(device: torch.device) -> Iterator[None]:
    """Let float32 products of all peers use the same precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def pretend(world: int) -> None:
    """Make a process group whose other ranks do not exist: they all have what this one has."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def all_gather_object(found: list[Any], own: Any, group: object = None) -> None:
        found[:] = [own] * len(found)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    dist.all_gather_object = all_gather_object


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    gpus = torch.cuda.is_available()
    if args.alone:
        pretend(MeshSizes.of(args.mesh).world)
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    row = measure(args)
    if dist.get_rank() == 0:
        print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

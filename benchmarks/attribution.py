"""Where the time of one step goes on a GPU, read from a trace of torch's profiler.

Time in which several kernels run at once counts for the first kind in the order of ``KINDS``: what
is left for communication is what no computation hides, and ``idle`` is when nothing runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    # flash kernels have cutlass in their template's arguments
    "matmul": r"^(?!.*(flash|fmha)).*(gemm|cutlass|nvjet|xmma|cublas|bmm)|^triton_tem_.*mm",
    "optimizer": r"adam|multi_tensor",
    "compiled": r"^triton",
    "other": r"",
    "copies": r"^memcpy|^memset|copy|catarray",
    "communication": r"nccl|symm",
}
_ASKED = ("communication", "matmul", "compiled", "attention", "optimizer", "copies", "other")


class Kernel(NamedTuple):
    """One kernel's name, and its start and end in microseconds."""

    name: str
    start: float
    end: float


def kind(name: str) -> str:
    """Return the kind of a kernel's name."""
    return next(k for k in _ASKED if re.search(KINDS[k], name.lower()))


def attribute(kernels: Iterable[Kernel], wall: float) -> dict[str, float]:
    """Return milliseconds by kind, and those in which no kernel runs; they sum up to ``wall``.

    Args:
        wall: length of the step in microseconds.
    """
    order = list(KINDS)
    edges = []
    for kernel in kernels:
        which = order.index(kind(kernel.name))
        edges += [(kernel.start, which, 1), (kernel.end, which, -1)]
    edges.sort()
    running, found, before = [0] * len(order), dict.fromkeys(order, 0.0), 0.0
    for at, which, change in edges:
        now = next((k for k, n in zip(order, running, strict=True) if n), None)
        if now is not None:
            found[now] += at - before
        running[which] += change
        before = at
    found["idle"] = wall - sum(found.values())
    return {name: round(us / 1e3, 2) for name, us in found.items()}


def longest(kernels: Iterable[Kernel], count: int = 12) -> Iterator[str]:
    """Yield one line for each of the kernels that take most: milliseconds, calls, name."""
    total: dict[str, list[float]] = {}
    for kernel in kernels:
        total.setdefault(kernel.name, []).append(kernel.end - kernel.start)
    for name, each in sorted(total.items(), key=lambda item: -sum(item[1]))[:count]:
        yield f"{sum(each) / 1e3:9.2f} ms {len(each):6d} x {kind(name):13} {name[:90]}"


def traced(step: Callable[[], object]) -> tuple[list[Kernel], float]:
    """Run ``step``; return the kernels that it ran on this GPU, and its length in microseconds."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
    events = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)  # these span kernels, and idle time
    ]
    kernels = [Kernel(e.name, e.time_range.start, e.time_range.end) for e in events]
    return kernels, 1e3 * begin.elapsed_time(end)

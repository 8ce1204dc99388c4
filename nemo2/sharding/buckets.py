"""Gradients of parameters that every dp rank holds: summed in buckets during the last backward.

Buckets are all-reduced in one order on all ranks, each as soon as it and those before it are
complete. What comes too late, or not at all on this rank, is settled at the end of the step.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .reduce import agree, all_reduce_together
from .storage import Entry

BUCKET_BYTES = 25 * 2**20


def pack(sizes: Sequence[tuple[torch.dtype, int]]) -> list[list[int]]:
    """Return the buckets for tensors of these dtypes and bytes: lists of their indices.

    A bucket has one dtype, and is full when it holds ``BUCKET_BYTES`` or more.

    >>> pack([(torch.float32, 20 * 2**20), (torch.float32, 6 * 2**20), (torch.float32, 4)])
    [[0, 1], [2]]
    """
    buckets: list[list[int]] = []
    filling: dict[torch.dtype, tuple[list[int], int]] = {}
    for index, (dtype, nbytes) in enumerate(sizes):
        if dtype not in filling:
            filling[dtype] = [], 0
            buckets.append(filling[dtype][0])
        bucket, total = filling[dtype]
        bucket.append(index)
        filling[dtype] = bucket, total + nbytes
        if total + nbytes >= BUCKET_BYTES:
            del filling[dtype]
    return buckets


def start_sum(flat: Tensor, group: ProcessGroup) -> Any:
    """Start to sum ``flat`` over ``group`` in place; returns the work to wait for."""
    return dist.all_reduce(flat, group=group, async_op=True)


@dataclass
class _Bucket:
    entries: list[Entry]
    missing: int
    flat: Tensor | None = None
    work: Any = None


class Buckets:
    """Sums the gradients of ``entries`` over ``group``, once a step.

    Buckets are launched in a backward while ``listening``; the others when the step ends.
    Buckets follow the reverse order of registration in the first step, then the order in which
    its gradients came on the group's first rank.
    """

    def __init__(self, entries: Sequence[Entry], group: ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.listening = False
        self._order = [e for e in reversed(entries) if e.plan.trainable]
        self._learned = False
        self._expected: Counter[str] = Counter()
        self._came: Counter[str] = Counter()  # in the order of first arrival
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[str, _Bucket] = {}
        self._launched = 0
        self._used: set[str] = set()
        for entry in self._order:
            leaf: Any = entry.leaf  # untyped upstream
            leaf.register_post_accumulate_grad_hook(_hook(self, entry.name))

    def begin(self) -> None:
        """Start a step: no gradient has come yet."""
        entries = [e for e in self._order if e.trainable]
        packed = pack([(e.plan.dtype, e.local.nbytes) for e in entries])
        self._buckets = [_Bucket([entries[i] for i in part], len(part)) for part in packed]
        self._bucket_of = {e.name: b for b in self._buckets for e in b.entries}
        self._came, self._used, self._launched = Counter(), set(), 0

    def arrived(self, name: str) -> None:
        """Note that a backward has added to a gradient; launch what is complete.

        A gradient may come several times in a step's last backwards: from nested backwards of
        reentrant checkpoints, or from several chunks of a pipeline. Then as many are awaited as
        came in the last step.
        """
        bucket = self._bucket_of.get(name)
        if not self.listening or bucket is None:
            return
        self._came[name] += 1
        if self._came[name] == max(self._expected[name], 1):
            bucket.missing -= 1
            while self._launched < len(self._buckets):
                if self._buckets[self._launched].missing:
                    break
                self._launch()

    def _launch(self) -> None:
        """Start the all-reduce of the next bucket, and take its gradients away.

        What is added to them afterwards is then apart, to be summed at the end of the step.
        """
        bucket = self._buckets[self._launched]
        self._launched += 1
        parts = []
        for entry in bucket.entries:
            grad, entry.compute.grad = entry.compute.grad, None
            if grad is None:
                parts.append(torch.zeros_like(entry.local).view(-1))
            else:
                self._used.add(entry.name)
                parts.append(grad.detach().reshape(-1))
        bucket.flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        bucket.work = start_sum(bucket.flat, self.group)

    def finish(self) -> None:
        """Leave the sums as gradients; a parameter that no rank used keeps none.

        Communication: the all-reduces of what has not been launched; one of two bytes a
            parameter; in the first step a broadcast of 8 bytes a parameter; and one of what
            came after its bucket was launched on some rank, for each dtype.
        """
        while self._launched < len(self._buckets):
            self._launch()
        entries = [e for b in self._buckets for e in b.entries]
        flags = [e.name in self._used for e in entries]
        flags += [e.compute.grad is not None for e in entries]
        agreed = agree(flags, self.group, self.device)()
        used, late = agreed[: len(entries)], agreed[len(entries) :]
        rest = {
            e.name: e.compute.grad if e.compute.grad is not None else torch.zeros_like(e.local)
            for e, flag in zip(entries, late, strict=True)
            if flag
        }
        all_reduce_together(rest.values(), self.group)
        wanted = {e.name for e, *f in zip(entries, used, late, strict=True) if any(f)}
        for bucket in self._buckets:
            bucket.work.wait()
            assert bucket.flat is not None
            parts = torch.split(bucket.flat, [e.local.numel() for e in bucket.entries])
            for entry, part in zip(bucket.entries, parts, strict=True):
                if entry.name in rest:
                    part.add_(rest[entry.name].reshape(-1))
                entry.compute.grad = part.view(entry.local.shape) if entry.name in wanted else None
        self._expected = self._came
        self._learn_order()
        self._buckets, self._bucket_of = [], {}

    def _learn_order(self) -> None:
        """Order the next steps' buckets by when gradients came on the group's first rank."""
        if self._learned or not self._order:
            return
        self._learned = True
        place = {e.name: i for i, e in enumerate(self._order)}
        came = [place[name] for name in self._came]
        order = torch.tensor([*came, *sorted(set(place.values()) - set(came))], dtype=torch.int64)
        order = order.to(self.device)
        dist.broadcast(order, src=dist.get_global_rank(self.group, 0), group=self.group)
        self._order = [self._order[i] for i in order.tolist()]


def _hook(buckets: Buckets, name: str) -> Callable[[Tensor], None]:
    """Return a hook of a parameter that does not keep ``buckets``, which keep the parameter.

    Python's collector does not see such a cycle: it leads through C++.
    """
    found = weakref.ref(buckets)

    def arrived(_: Tensor) -> None:
        alive = found()
        if alive is not None:
            alive.arrived(name)

    return arrived

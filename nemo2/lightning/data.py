"""Which samples each rank reads: the user's own order, dealt out over ``dp``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from ..errors import Nemo2Error


class MeshSampler(Sampler[Any]):
    """Deals out what ``sampler`` yields to ``replicas`` readers, so that together they read it.

    Lightning's own always shuffles the training data anew; this keeps the order that a run on
    one device has. An order of random numbers is drawn from rank 0's generator, everywhere.
    As in ``DistributedSampler``, first samples are repeated until all readers have as many.

    Communication: each epoch a broadcast of the generator's state, 5 kB, over the world.
    """

    def __init__(self, sampler: Iterable[Any], replicas: int, reader: int) -> None:
        self.sampler, self.replicas, self.reader = sampler, replicas, reader

    def __len__(self) -> int:
        assert isinstance(self.sampler, Sized)
        return (len(self.sampler) + self.replicas - 1) // self.replicas

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        _share_generator()
        first: list[Any] = []
        count = 0
        for index in self.sampler:
            if count < self.replicas:
                first.append(index)
            if count % self.replicas == self.reader:
                yield index
            count += 1
        missing = -count % self.replicas
        if first and missing and self.reader >= self.replicas - missing:
            yield first[(self.reader - (self.replicas - missing)) % len(first)]


def can_deal(loader: object) -> bool:
    """Say whether the samples of ``loader`` can be dealt out: by index, and not yet done."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and isinstance(loader.sampler, Sized)
        and not isinstance(loader.sampler, (DistributedSampler, MeshSampler))
    )


def deal_batches(loader: DataLoader[Any], replicas: int, reader: int) -> DataLoader[Any] | None:
    """Return ``loader`` with its own batch sampler over this reader's part of the samples.

    None for a loader with ``batch_size=`` or without batches, whose sampler can be replaced.
    Raises: Nemo2Error for a batch sampler that has no ``sampler`` to deal out.
    """
    batches = loader.batch_sampler
    if loader.batch_size is not None or batches is None:
        return None
    if not isinstance(getattr(batches, "sampler", None), Iterable):
        raise Nemo2Error(
            f"DataLoader(batch_sampler={type(batches).__name__}): its samples cannot be dealt out"
            f" over dp={replicas}, as it draws them itself\n"
            "  options: draw from an attribute 'sampler', as torch's BatchSampler does |"
            " Trainer(use_distributed_sampler=False), and batches of this dp coordinate"
        )
    dealt, part = copy.copy(loader), copy.copy(batches)
    part.sampler = MeshSampler(batches.sampler, replicas, reader)  # type: ignore[attr-defined]
    dealt.__dict__["batch_sampler"] = part
    return dealt


def _share_generator() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        box = [torch.get_rng_state()]
        dist.broadcast_object_list(box, src=0)
        torch.set_rng_state(box[0])

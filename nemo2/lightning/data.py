"""Which samples each rank reads: the user's own order, dealt out over ``dp``.

Where an epoch stands is a number of *global samples* in that order, and the state of the random
numbers from which the order was drawn. So a run goes on with the next sample on any mesh.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from ..checkpoint.generators import generator_states, set_generator_states
from ..errors import CheckpointError, Nemo2Error

_CPU = torch.device("cpu")
_POSITION = "nemo2 position"


class MeshSampler(Sampler[Any]):
    """Deals out what ``sampler`` yields to ``replicas`` readers, so that together they read it.

    Lightning's own always shuffles the training data anew; this keeps the order that a run on
    one device has. An order of random numbers is drawn from rank 0's generator, everywhere.
    As in ``DistributedSampler``, first samples are repeated until all readers have as many.

    Attributes:
        order: the generators' states before the order of this epoch was drawn; None before.

    Communication: each epoch a broadcast of the generator's state, 5 kB, over the world.
    """

    def __init__(self, sampler: Iterable[Any], replicas: int, reader: int) -> None:
        self.sampler, self.replicas, self.reader = sampler, replicas, reader
        self.order: dict[str, Any] | None = None
        self._resume: tuple[dict[str, Any], int, dict[str, Any]] | None = None
        self._before: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def __len__(self) -> int:
        assert isinstance(self.sampler, Sized)
        return (len(self.sampler) + self.replicas - 1) // self.replicas

    @property
    def repeated(self) -> int:
        """How many samples are read twice."""
        assert isinstance(self.sampler, Sized)
        return -len(self.sampler) % self.replicas

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def resume(self, order: dict[str, Any], samples: int, generators: dict[str, Any]) -> None:
        """Begin the next epoch in the order of ``order``, after ``samples`` of it.

        Args:
            generators: the states to go on with after the order has been drawn.
        """
        self.order, self._resume = order, (order, samples, generators)

    def keep(self) -> None:
        """Draw the next epoch's order from the generators as they are now, whatever comes first."""
        own = self.generator
        self._before = torch.get_rng_state(), None if own is None else own.get_state()

    @property
    def generator(self) -> torch.Generator | None:
        """The user's own generator of the order."""
        return getattr(self.sampler, "generator", None)

    def __iter__(self) -> Iterator[Any]:
        resume, self._resume = self._resume, None
        before, self._before = self._before, None
        own = self.generator
        if before is not None:
            torch.set_rng_state(before[0])
            if own is not None and before[1] is not None:
                own.set_state(before[1])
        if resume is None:
            _share_generator()
            own_state = own.get_state() if own is not None else None
            self.order = {"all": generator_states(_CPU), "own": own_state}
        else:
            self.order = resume[0]
            set_generator_states(self.order["all"], _CPU)
            if own is not None and self.order["own"] is not None:
                own.set_state(self.order["own"])
        skipped = 0 if resume is None else resume[1]
        first: list[Any] = []
        count = 0
        for index in self.sampler:
            if count < self.replicas:
                first.append(index)
            if count == skipped and resume is not None:
                set_generator_states(resume[2], _CPU)
            if count >= skipped and (count - skipped) % self.replicas == self.reader:
                yield index
            count += 1
        missing = -(count - skipped) % self.replicas
        if first and missing and self.reader >= self.replicas - missing:
            yield first[(self.reader - (self.replicas - missing)) % len(first)]


class Dealt(DataLoader[Any]):
    """What a training ``DataLoader`` over a ``MeshSampler`` becomes: it knows where it stands.

    A loader keeps its own class beside this one, see ``dealt``.
    """

    _samples = 0  # of the epoch, before this iteration began
    _delivered = 0  # batches, in this iteration
    _resumes = False
    _nothing_left = False
    _resumed = False  # and no iterator has been made since
    _under_way: Callable[[], int]

    def __iter__(self) -> Any:
        resumes, self._resumes = self._resumes, False
        self._delivered = 0
        if resumes:
            return self._deliver(None)
        self._samples = 0
        return self._deliver(self._made())

    def _made(self) -> Iterator[Any]:
        resumed, self._resumed = self._resumed, False
        _share_generator()  # workers draw their seed from it, and what is drawn in them
        if resumed and self.persistent_workers:  # without the resume they would live already
            self.position.keep()
        return super().__iter__()

    def _deliver(self, batches: Iterator[Any] | None) -> Iterator[Any]:
        if batches is None:
            if self._nothing_left:
                self._nothing_left = False
                return
            # Late: the Trainer may not use the iterator that it makes when it resumes, and making
            # one draws a random number.
            batches = self._made()
        for batch in batches:
            self._delivered += 1
            yield batch

    @property
    def position(self) -> MeshSampler:
        sampler = getattr(self.batch_sampler, "sampler", self.sampler)
        assert isinstance(sampler, MeshSampler)
        return sampler

    @property
    def batch_of_all(self) -> int | None:
        """The number of samples in a global batch; None if a batch sampler does not say it."""
        each = 1 if self.batch_sampler is None else getattr(self.batch_sampler, "batch_size", None)
        return None if each is None else each * self.position.replicas

    def state_dict(self) -> dict[str, Any]:
        """Return how many samples of the epoch have been trained on, and what drew its order."""
        done = max(self._delivered - self._under_way(), 0)
        size = self.batch_of_all
        return {
            _POSITION: 1,
            "samples": None if size is None else self._samples + done * size,
            "total": len(self.position.sampler),  # type: ignore[arg-type]
            "order": self.position.order,
            "now": [g.get_state() for g in self._generators()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do: ``resume`` has done it, also where the Trainer does not ask for it."""

    def resume(self, state: dict[str, Any], where: str, generators: dict[str, Any]) -> int:
        """Let the next iteration go on where ``state`` was; return the batches that are done.

        Args:
            where: "inside" of the epoch; at its "end", where nothing is left; or "next", when it
                begins the next epoch.
            generators: the states of the random generators at the time of the save.

        Raises: CheckpointError when another number of samples makes the position meaningless.
        """
        for generator, now in zip(self._generators(), state["now"], strict=False):
            generator.set_state(now)
        self._resumes, self._resumed, self._nothing_left = True, True, where == "end"
        self._samples = 0
        if where != "inside" or state["order"] is None:
            return 0
        samples, size = state["samples"], self.batch_of_all
        total = len(self.position.sampler)  # type: ignore[arg-type]
        problem = ""
        if samples is None or size is None:
            kind = type(self.batch_sampler).__name__
            problem = f"its batch sampler {kind} has no attribute batch_size"
        elif total != state["total"]:
            problem = f"it has {total} samples an epoch, and had {state['total']}"
        elif samples % size:
            problem = f"{samples} samples are done, which global batches of {size} do not make"
        if problem:
            raise CheckpointError(
                f"the training dataloader cannot go on inside of an epoch: {problem}\n"
                "  options: the global batch size (batch_size x dp) and data of the save |"
                " a checkpoint of the end of an epoch"
            )
        self._samples = samples
        self.position.resume(state["order"], samples, generators)
        return int(samples // size)

    def _generators(self) -> list[torch.Generator]:
        """Return the user's own generators of the loader and of its order."""
        both = (self.position.generator, self.generator)
        return list({id(g): g for g in both if g is not None}.values())


def dealt(loader: DataLoader[Any], under_way: Callable[[], int]) -> DataLoader[Any]:
    """Let a training loader over a ``MeshSampler`` know where it stands.

    Args:
        under_way: returns how many batches have been fetched and not yet been trained on.
    """
    kind = type(loader)
    loader.__class__ = type(kind.__name__, (Dealt, kind), {"__module__": kind.__module__})
    loader._under_way = under_way
    return loader


def is_position(state: Any) -> bool:
    """Say whether the state of a dataloader is that of a ``Dealt`` one, the same on all ranks."""
    return isinstance(state, dict) and _POSITION in state


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

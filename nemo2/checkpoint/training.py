"""Saving the state of training: model, optimizers, random numbers, and plain data."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from ..errors import CheckpointError
from ..mesh.groups import MeshGroups
from . import files
from .agree import Problems
from .beside import take_out
from .folder import check_safetensors
from .generators import generator_states
from .index import Index
from .plain import encode
from .saving import Job, Saving
from .shards import Content, content_of
from .target import Target

# The last save of this process; another one begins when it has ended.
_latest: list[Saving] = []


@dataclass(frozen=True)
class Extra:
    """What a checkpoint holds beside tensors and generators.

    Attributes:
        shared: the same on all ranks; the first one's is saved.
        own: of each rank; only the same mesh gives it back.
    """

    shared: Any = None
    own: Any = None


def save_training(
    path: str | Path,
    target: Target,
    optimizers: Sequence[Optimizer] = (),
    *,
    extra: Extra | None = None,
    only: Mapping[str, Any] | None = None,
    asynchronous: bool = False,
) -> Saving:
    """Write a checkpoint; returns when it is complete, or can be completed without the tensors.

    Args:
        only: names of the model's tensors on this rank's stage to save; None for all of them.
        asynchronous: copy the tensors, and write them in a thread.

    Communication: four all-gathers of objects over the world, or three if asynchronous; and a
        broadcast of a token.
    Raises: CheckpointError on all ranks alike; also for what went wrong in the last asynchronous
        save, of which nobody has heard yet.
    """
    place = local_path(path).resolve()
    groups = target.groups
    asked = f"cannot save {type(target.module).__name__} to '{path}'"
    problems = Problems(asked, groups)
    began = time.perf_counter()
    problems.failures += failures_of_last()
    waited = time.perf_counter() - began
    content, shared, own, lock = Content(), None, None, None
    token = secrets.token_hex(6)
    with problems.caught():
        check_safetensors()
        content = content_of(target, optimizers, only)
        shared = take_out(extra.shared, target, content) if extra else None
        shared = encode(shared, "extra")
        own = encode(extra.own if extra else None, "extra")
        own = {"generators": encode(generator_states(device_of(target)), "rng"), "own": own}
    problems.raise_together()
    token = _same_token(token, groups)
    rank, world = rank_of(groups)
    with problems.caught():
        if rank == 0:
            lock = files.begin(place, token)
    try:
        problems.raise_together()
        with problems.caught():
            if not files.unfinished_folder(place, token).is_dir():
                raise CheckpointError("its folder is not there: rank 0 writes to another disk")
        problems.raise_together()
    except CheckpointError:
        if lock is not None:
            lock.close()
            files.clean(place)
        raise
    aliases = {item.name: list(item.names[1:]) for item in target.items if len(item.names) > 1}
    index = Index(place, token, {}, aliases, mesh=mesh_of(target), run=_run(target), extra=shared)
    saving = Saving(Job(place, index, content, own, rank, world, lock), groups, asked, waited)
    if asynchronous:
        saving.start()
        _latest.append(saving)
    else:
        saving.run()
        saving.wait()
    return saving


def failures_of_last() -> list[str]:
    """Wait for the last asynchronous save of this process; return what nobody has heard of it."""
    found = []
    while _latest:
        saving = _latest.pop()
        saving.join()
        found += [f"the save to '{saving.path}' failed: {what}" for what in saving.failures()]
    return found


def local_path(path: str | Path) -> Path:
    """Return ``path``, which all ranks see under the same name.

    Raises: CheckpointError for the address of something that is no file system.
    """
    if "://" in str(path):
        raise CheckpointError(
            f"'{path}' is not on a file system\n"
            "  options: a folder that all ranks see | a mounted bucket"
        )
    return Path(path)


def mesh_of(target: Target) -> dict[str, int]:
    return {} if target.groups is None else dict(target.groups.sizes.items())


def device_of(target: Target) -> torch.device:
    if target.groups is not None:
        return target.groups.device
    return next((i.local.device for i in target.items if i.local is not None), torch.device("cpu"))


def rank_of(groups: MeshGroups | None) -> tuple[int, int]:
    """Return this rank's number in the mesh, and how many there are."""
    if groups is None:
        return 0, 1
    ranks = dist.get_process_group_ranks(groups.world)
    return ranks.index(groups.rank), len(ranks)


def _same_token(token: str, groups: MeshGroups | None) -> str:
    """Return the first rank's token on all ranks."""
    if groups is None or groups.sizes.world == 1:
        return token
    box = [token]
    dist.broadcast_object_list(box, group=groups.world, group_src=0)
    return box[0]


def _run(target: Target) -> dict[str, int]:
    model = target.parallel
    return {} if model is None else {"seed": model.draws.seed, "steps": model.draws.steps}

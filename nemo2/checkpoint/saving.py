"""One save under way: each rank writes its file, and the first rank publishes them together.

Ranks tell each other by files: a rank that has written says so in ``rank-<n>.json``, with its part
of the index. So nothing is communicated in the background, where a collective could meet those of
training.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import CheckpointError
from ..mesh.groups import MeshGroups
from . import files
from .agree import Problems
from .host import HOST
from .index import Index, Stored, TensorInfo, key_of, tensor_facts, tensor_info
from .shards import Content, Shard
from .storage import parts_missing

PATIENCE = 600.0  # seconds without any rank's word after which a save is given up
SHORT_PATIENCE = 10.0  # the same, once the save or the training has failed
_EVERY = 0.02  # seconds between looks at what ranks have said


@dataclass(frozen=True)
class Job:
    """What one rank does of a save.

    Attributes:
        index: what is the same on all ranks, without tensors and files.
        own: this rank's generators and the like, encoded.
        rank: in the order of the mesh; ``world``: how many take part.
    """

    path: Path
    index: Index
    content: Content
    own: Any
    rank: int
    world: int
    lock: IO[str] | None

    @property
    def folder(self) -> Path:
        return files.unfinished_folder(self.path, self.index.token)

    @property
    def file(self) -> str:
        return f"{self.index.token}-rank{self.rank:05d}.safetensors"


class _SilenceError(CheckpointError):
    """Ranks were awaited in vain."""


class Saving:
    """A save, which ``nemo2.save`` returns.

    Attributes:
        path: where the checkpoint will be, or is.
        seconds: what this rank has spent: ``waited`` for the asynchronous save before, ``copied``
            to host memory, and ``written``, which is there when this rank is done.
    """

    def __init__(
        self, job: Job, groups: MeshGroups | None, asked: str, waited: float = 0.0
    ) -> None:
        self.path = job.path
        self.seconds = {"waited": waited, "copied": 0.0}
        self._job, self._groups, self._asked = job, groups, asked
        self._given_up = threading.Event()
        self._failure: str | None = None
        self._thread: threading.Thread | None = None
        self._after: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._ended = False

    @property
    def done(self) -> bool:
        """Whether this rank has nothing to do any more; others may."""
        return self._ended

    def wait(self) -> None:
        """Return when the checkpoint is complete; called on all ranks.

        Communication: one all-gather of objects over the world.
        Raises: CheckpointError on all ranks alike, if it could not be written.
        """
        self.join()
        problems = Problems(self._asked, self._groups)
        problems.failures += self.failures()
        problems.raise_together()

    def join(self) -> None:
        """Wait for this rank's part alone."""
        if self._thread is not None:
            self._thread.join()

    def failures(self) -> list[str]:
        """Return what went wrong on this rank, once."""
        failed, self._failure = self._failure, None
        return [] if failed is None else [failed]

    def give_up(self) -> None:
        """Do not wait long for other ranks any more: some of them may be gone."""
        self._given_up.set()

    def then(self, act: Callable[[], None]) -> None:
        """Call ``act`` on this rank when the save has succeeded; not if it fails."""
        with self._lock:
            if not self._ended:
                self._after.append(act)
                return
        if self._failure is None:
            act()

    def run(self) -> None:
        """Write now, as far as this rank is concerned."""
        began = time.perf_counter()
        try:
            self._write()
        except Exception as error:
            said = isinstance(error, CheckpointError)
            self._failure = str(error) if said else f"{type(error).__name__}: {error}"
            with suppress(OSError):  # a full disk has room again without the part
                (self._job.folder / self._job.file).unlink(missing_ok=True)
                files.write_text(self._said(self._job.rank, "failed"), self._failure)
            if self._job.rank == 0:
                with suppress(OSError, ValueError):
                    self._listen(0.0 if isinstance(error, _SilenceError) else SHORT_PATIENCE)
                shutil.rmtree(self._job.folder, ignore_errors=True)
        finally:
            if self._job.lock is not None:
                self._job.lock.close()
            self._job = replace(self._job, content=Content())  # the tensors' memory is free again
            self.seconds["written"] = time.perf_counter() - began
        with self._lock:
            self._ended = True
        for act in self._after if self._failure is None else ():
            with suppress(OSError):
                act()

    def start(self) -> None:
        """Write in a thread, from copies of the tensors in host memory."""
        began, content = time.perf_counter(), self._job.content
        staged = Content(content.tensors, HOST.copies(content.shards), content.optimizers)
        self._job = replace(self._job, content=staged)
        self.seconds["copied"] = time.perf_counter() - began
        # Not a daemon: a program that ends without ``wait`` still completes its last save.
        self._thread = threading.Thread(target=self.run, name="nemo2-save", daemon=False)
        self._thread.start()

    def _write(self) -> None:
        job = self._job
        entries = [_entry(shard) for shard in job.content.shards]
        size, crc = files.write_tensors(job.folder / job.file, entries)
        stored: dict[str, list[Stored]] = {name: [] for name in job.content.tensors}
        for shard in job.content.shards:
            stored[shard.name].append(Stored(job.file, shard.box))
        tensors = {
            name: tensor_facts(replace(info, parts=tuple(stored[name])))
            for name, info in job.content.tensors.items()
        }
        said = {
            "file": [job.file, size, crc],
            "tensors": tensors,
            "optimizers": job.content.optimizers,
            "own": job.own,
        }
        if job.rank != 0:
            files.write_text(self._said(job.rank, "json"), json.dumps(said))
            return
        everyone = [said, *self._others()]
        assert job.lock is not None
        files.publish(job.path, merged(job.index, everyone), job.lock)

    def _others(self) -> list[Any]:
        """Return what the other ranks have said, when all of them have."""
        found, failed = self._listen(PATIENCE)
        if failed:
            rank = min(failed)
            raise CheckpointError(f"rank {rank} could not write: {failed[rank]}")
        silent = [r for r in range(1, self._job.world) if r not in found]
        if silent:
            raise _SilenceError(f"given up: ranks {silent} have not written their parts")
        return [found[rank] for rank in sorted(found)]

    def _listen(self, patience: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Wait for the other ranks; return what they have written, and why some could not.

        Also of a save that has failed the others are awaited, though not long: what a rank still
        writes would otherwise meet the removal of the folder.
        """
        job, found, failed = self._job, dict[int, Any](), dict[int, str]()
        limit = time.monotonic() + patience
        while True:
            for rank in {*range(1, job.world)} - {*found, *failed}:
                if self._said(rank, "json").is_file():
                    found[rank] = json.loads(self._said(rank, "json").read_text("utf-8"))
                elif self._said(rank, "failed").is_file():
                    failed[rank] = self._said(rank, "failed").read_text("utf-8")
                    patience = min(patience, SHORT_PATIENCE)
                else:
                    continue
                limit = time.monotonic() + patience
            if self._given_up.is_set():
                limit = min(limit, time.monotonic() + SHORT_PATIENCE)
                self._given_up.clear()
            if len(found) + len(failed) == job.world - 1 or time.monotonic() > limit:
                return found, failed
            time.sleep(_EVERY)

    def _said(self, rank: int, how: str) -> Path:
        return self._job.folder / f"rank-{rank:05d}.{how}"


def merged(index: Index, everyone: Sequence[Mapping[str, Any]]) -> Index:
    """Return the index of a save, from what each rank has written."""
    tensors: dict[str, TensorInfo] = {}
    for said in everyone:
        for name, facts in said["tensors"].items():
            info = tensor_info(facts)
            known = tensors.get(name, TensorInfo(info.dtype, info.shape))
            tensors[name] = replace(known, parts=known.parts + info.parts)
            if (known.dtype, known.shape) != (info.dtype, info.shape):
                raise CheckpointError(f"ranks have '{name}' in different shapes or dtypes")
    torn = [name for name, info in tensors.items() if parts_missing(info.parts, info.shape)]
    if torn:
        raise CheckpointError(f"the parts of '{torn[0]}' do not make it whole")
    optimizers = [
        {
            "class": kinds[0]["class"],
            "groups": [
                {
                    "params": list(dict.fromkeys(n for g in groups for n in g["params"])),
                    "options": groups[0]["options"],
                }
                for groups in zip(*(kind["groups"] for kind in kinds), strict=True)
            ],
            "state": {n: s for kind in kinds for n, s in kind["state"].items()},
        }
        for kinds in zip(*(said["optimizers"] for said in everyone), strict=True)
    ]
    written = {said["file"][0]: (said["file"][1], said["file"][2]) for said in everyone}
    own = [said["own"] for said in everyone]
    return replace(index, tensors=tensors, files=written, optimizers=optimizers, ranks=own)


def _entry(shard: Shard) -> files.Entry:
    name = key_of(shard.name, shard.box)
    return files.Entry(name, shard.held.dtype, shard.box.shape, partial(_same, shard))


def _same(shard: Shard) -> torch.Tensor:
    return shard.held

"""A pool of worker processes that run distributed tests.

Spawning ranks costs seconds each time, a job on a running worker costs milliseconds: workers are
spawned once, on first use, and every job gets a fresh default process group.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

SIZE = 8  # workers kept for reuse; larger worlds spawn more
SPAWN_SECONDS = 240.0
PRELOADED = ["tests.preload"]
GRACE_SECONDS = 5.0  # how long ranks may take to follow a rank that failed
# With 2, four ranks share two GPUs as if on two hosts: NCCL over the network instead of NVLink.
HOSTS = int(os.environ.get("NEMO2_TEST_HOSTS", "1"))
FORGOTTEN = ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Job:
    """What one rank is asked to run: ``call`` is a pickled (function, args, kwargs)."""

    number: int
    rank: int
    world_size: int
    device: str
    store: tuple[str, int]
    timeout: float
    call: bytes
    filters: tuple[str, ...]


@dataclass
class Worker:
    """One process of the pool, seen from the test process."""

    process: Any
    pipe: Connection
    stacks: Path
    ready: bool = False

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.pipe.close()

    def dump_stacks(self) -> str:
        """Return the Python stacks of a worker that hangs."""
        before = self.stacks.stat().st_size
        os.kill(self.process.pid, signal.SIGUSR1)
        limit = time.monotonic() + 5.0
        while self.stacks.stat().st_size == before and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.3)  # the rest of it
        return self.stacks.read_text()[before:]


@dataclass
class Pool:
    """Run functions on ranks of a fresh process group, on workers that stay.

    ``device`` is "cpu" (gloo) or "cuda" (gloo for CPU tensors, NCCL for CUDA tensors).
    """

    device: str = "cpu"
    filters: tuple[str, ...] = ()
    _workers: list[Worker] = field(default_factory=list)
    _jobs: int = 0
    _store: TCPStore | None = None
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = 120,
        **kwargs: Any,
    ) -> list[Any]:
        """Run ``fn(*args, **kwargs)`` on ranks 0..world_size-1 and return one result per rank.

        The function must be importable (module level); results are pickled, so return CPU
        tensors. The default process group exists while it runs. Torch's seed is 0 on each rank.

        Raises: RuntimeError with the traceback of the first rank that failed, or with the stacks
        of the ranks that hang after ``timeout`` seconds (spawning not counted).
        """
        __tracebackhide__ = True
        if self.device == "cuda" and world_size > HOSTS * torch.cuda.device_count():
            pytest.skip(f"needs {world_size} GPUs, has {HOSTS} x {torch.cuda.device_count()}")
        workers = self._ready(world_size)
        call = pickle.dumps((fn, args, kwargs))
        self._jobs += 1
        try:
            for rank, worker in enumerate(workers):
                worker.pipe.send(self._job(rank, world_size, timeout, call))
            return self._collect(workers, timeout)
        except BaseException:
            # A rank that is still inside the job cannot be reused; the next run spawns another.
            for worker in workers:
                if not worker.ready:
                    worker.kill()
            raise

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _job(self, rank: int, world_size: int, timeout: float, call: bytes) -> Job:
        if self._store is None:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store = ("127.0.0.1", self._store.port)
        args = (self._jobs, rank, world_size, self.device, store, timeout, call, self.filters)
        return Job(*args)

    def _ready(self, world_size: int) -> list[Worker]:
        """Return ``world_size`` workers that are alive and idle, spawning what is missing."""
        # A worker keeps its rank: NCCL reads once in a process on which host that is.
        for rank in range(world_size):
            if rank == len(self._workers):
                self._workers.append(self._spawn())
            worker = self._workers[rank]
            if worker.pipe.closed or not worker.process.is_alive():
                self._workers[rank] = self._spawn()
        workers = self._workers[:world_size]
        deadline = time.monotonic() + SPAWN_SECONDS
        for worker in workers:
            while not worker.ready:
                if not worker.pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise RuntimeError(f"a worker did not start within {SPAWN_SECONDS:.0f} s")
                worker.ready = worker.pipe.recv() == "ready"
        return workers

    def _spawn(self) -> Worker:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="nemo2-pool-")
        # Workers are forked from one process that has imported everything, not with CUDA.
        context: Any = multiprocessing.get_context(
            "spawn" if self.device == "cuda" else "forkserver"
        )
        if self.device != "cuda":
            context.set_forkserver_preload(PRELOADED)
        ours, theirs = context.Pipe()
        descriptor, name = tempfile.mkstemp(dir=self._folder.name)
        os.close(descriptor)
        # Not daemonic: jobs may start processes (data loaders, launchers) of their own.
        process = context.Process(target=_serve, args=(theirs, name), daemon=False)
        process.start()
        theirs.close()
        return Worker(process, ours, Path(name))

    def _collect(self, workers: Sequence[Worker], timeout: float) -> list[Any]:
        __tracebackhide__ = True
        results: dict[int, Any] = {}
        failures: dict[int, tuple[float, str]] = {}  # rank -> (when, traceback)
        for worker in workers:
            worker.ready = False
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < len(workers):
            pending = {
                workers[rank].pipe: rank
                for rank in range(len(workers))
                if rank not in results and rank not in failures
            }
            arrived = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not arrived:
                break
            for pipe in arrived:
                rank = pending[pipe]  # type: ignore[index]
                ok, value, when = _receive(workers[rank])
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = when, value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        hung = [r for r in range(len(workers)) if r not in results and r not in failures]
        if failures or hung:
            texts = {rank: failures[rank][1] for rank in sorted(failures, key=failures.__getitem__)}
            self._fail(workers, texts, hung, timeout)
        for worker in workers:
            worker.pipe.send("end")
        return [results[rank] for rank in range(len(workers))]

    def _fail(
        self, workers: Sequence[Worker], failures: dict[int, str], hung: list[int], timeout: float
    ) -> None:
        __tracebackhide__ = True
        lines = [f"world size {len(workers)}"]
        if failures:
            lines.append(f"ranks that failed, first to last: {list(failures)}")
        if hung:
            lines.append(f"ranks still running after {timeout:g} s or a failure: {hung}")
        if failures:
            rank = next(iter(failures))
            lines.append(f"rank {rank}:\n{failures[rank]}")
        else:
            lines += [f"rank {r} is at:\n{workers[r].dump_stacks()}" for r in hung]
        for rank, worker in enumerate(workers):
            if rank not in hung and worker.process.is_alive() and not worker.pipe.closed:
                worker.pipe.send("end")
        raise RuntimeError("\n".join(lines))


def _receive(worker: Worker) -> tuple[bool, Any, float]:
    """Return (ok, value, when) of a rank that answered, or what ended its process."""
    try:
        ok, data, when = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(10)
        worker.pipe.close()
        # Dated first: a rank that is killed is why others fail, never the other way round.
        return False, f"the process ended with exit code {worker.process.exitcode}", 0.0
    worker.ready = True
    return ok, pickle.loads(data) if ok else data, when


def _serve(pipe: Connection, stacks: str) -> None:
    """Run jobs until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test process decides
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with open(stacks, "a") as file:
        pipe.send("ready")
        while True:
            try:
                job = pipe.recv()
            except EOFError:
                return
            # For each job anew: a Trainer resets every signal to what Python knows of it.
            faulthandler.unregister(signal.SIGUSR1)
            faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
            with _clean_state():
                _perform(pipe, job)


def _perform(pipe: Connection, job: Job) -> None:
    """Run one job; a rank that failed leaves the group at once, so that its peers notice."""
    failed = True
    answer: tuple[bool, bytes | str]
    try:
        with _warnings_as_configured(job.filters):
            _join(job)
            fn, args, kwargs = pickle.loads(job.call)
            torch.manual_seed(0)  # after the imports of the test file, which may draw numbers
            random.seed(0)
            answer = True, pickle.dumps(fn(*args, **kwargs))
        failed = False
    except BaseException:  # SystemExit and pytest's outcomes are failures of the rank, too
        answer = False, traceback.format_exc()
    pipe.send((*answer, time.monotonic()))  # before peers can notice, so that this rank is first
    if failed:
        _leave(failed)
    if pipe.recv() == "end" and not failed:  # the other ranks have finished, too
        _leave(failed)


def _join(job: Job) -> None:
    local = torch.cuda.device_count() if HOSTS > 1 else job.world_size
    os.environ.update(
        RANK=str(job.rank),
        LOCAL_RANK=str(job.rank % local),
        WORLD_SIZE=str(job.world_size),
        LOCAL_WORLD_SIZE=str(min(local, job.world_size)),
    )
    if HOSTS > 1:
        os.environ.update(NCCL_HOSTID=f"host{job.rank // local}", NCCL_SOCKET_IFNAME="lo")
    for name in FORGOTTEN:
        os.environ.pop(name, None)
    if job.device == "cuda":
        torch.cuda.set_device(job.rank % local)
    host, port = job.store
    # Gives up a little before the test process does: the traceback then says in which collective.
    patience = timedelta(seconds=max(1.0, job.timeout - 1))
    store = TCPStore(host, port, is_master=False, timeout=patience)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if job.device == "cuda" else "gloo",
        store=PrefixStore(f"job{job.number}", store),
        rank=job.rank,
        world_size=job.world_size,
        timeout=patience,
    )


def _leave(failed: bool) -> None:
    """Destroy all process groups, and what torch remembers of their meshes by value."""
    if dist.is_initialized():
        if failed and torch.cuda.is_initialized():
            dist.distributed_c10d._abort_process_group()  # destroying waits for lost peers
        else:
            dist.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        # Equal meshes of two jobs hash alike, but their groups differ.
        _clear_sharding_prop_cache()
    # Models are cyclic: until then the threads of their groups wake 100 times a second each.
    gc.collect()


@contextmanager
def _clean_state() -> Iterator[None]:
    """Give each job the same starting point, and undo its changes of global settings."""
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision, folder = torch.get_float32_matmul_precision(), os.getcwd()
    # Lightning's launcher sets it; ranks with other numbers of threads round otherwise in bf16.
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(True)
        os.chdir(folder)


@contextmanager
def _warnings_as_configured(filters: Sequence[str]) -> Iterator[None]:
    """Apply the test configuration's warning filters inside the worker."""
    from _pytest.config import apply_warning_filters

    with warnings.catch_warnings():
        apply_warning_filters(list(filters), [])
        yield

"""The guard against ranks that die: no rank waits for one that will not come back.

Each rank tells the store that it lives, looks whether others do, and whether one of them left a
record of its failure. The first record wins, so that every survivor names the same rank.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing.util
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store, _world

from nemo2.errors import Nemo2Error
from nemo2.mesh.make import restart
from nemo2.mesh.processes import host_name, lives

NEIGHBOURS = 8  # ranks that one rank watches: every rank is watched, at a cost that does not grow
_LEFT = "it left while other ranks were still running"
TOLD = 9.0  # seconds that SIGTERM may find no answer, as the main thread waits for other ranks
IN_ORDER = 300.0  # the same, counted inside of one step, where SIGTERM ends the run in order
LOST_PEER = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "gloo", "Timed out")


@dataclass(frozen=True)
class Patience:
    """Times in seconds; their sum bounds how long a survivor lives (60 s by default at most)."""

    poll: float = 0.5
    """between two looks at the store, and two signs of life."""
    stale: float = 20.0
    """without a sign of life, after which a rank counts as dead."""
    verdict: float = 5.0
    """that ``explain`` waits for a verdict on a peer of the same host, or a record."""
    grace: float = 10.0
    """that the main thread gets to raise, and again to end, before the process is ended."""

    @classmethod
    def from_environment(cls) -> Patience:
        """Return the defaults, with ``stale`` from NEMO2_WATCHDOG_SECONDS if that is set."""
        return cls(stale=float(os.environ.get("NEMO2_WATCHDOG_SECONDS", cls.stale)))


@dataclass(frozen=True)
class _Beat:
    """A rank's sign of life; ``count`` makes each one differ from the last."""

    count: int
    step: int
    pid: int
    host: str
    left: bool = False


@dataclass(frozen=True)
class _Record:
    """Why the run ends: which rank, at which step, what happened."""

    rank: int
    step: int
    what: str

    def error(self, rank: int, step: int) -> Nemo2Error:
        seen = "" if rank == self.rank else f" (seen by rank {rank} at step {step})"
        return Nemo2Error(f"rank {self.rank}, step {self.step}: {self.what}{seen}")


class Watchdog:
    """Watch the ranks of the default process group; inert if there is one rank only.

    Making one is collective. Set ``step`` as training advances, or run steps in ``guard(step)``.
    A rank that ends well calls ``stop``, or just exits. After a failure let the exception end the
    process: if it has not ended ``2 * grace`` seconds later, the watchdog ends it. ``stop`` also
    calls that off. SIGTERM ends the process, after a word on why if another rank has failed;
    where ``on_sigterm`` is set, that is called in place of it, and has to see to the end.

    Communication: a few small requests to the store each second, from a thread.
    """

    def __init__(self, patience: Patience | None = None) -> None:
        self._signals: tuple[socket.socket, socket.socket] | None = None
        self.on_sigterm: Callable[[], None] | None = None
        self.step = 0
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.patience = patience or Patience.from_environment()
        self._host, self._pid, self._count = host_name(), os.getpid(), 0
        self._record: _Record | None = None
        self._own = False  # the record is this rank's
        self._raised = False  # the main thread knows
        self._said, self._saying = False, threading.Lock()  # the record, to standard error
        self._inside = False  # a guarded step is running
        self._unwatched = False  # the store has ended, in order
        self._answered = time.monotonic()  # when the store last answered
        self._seen: dict[int, tuple[_Beat | None, float]] = {}
        self._leaving, self._ended, self._wake = (threading.Event() for _ in range(3))
        self._threads: list[threading.Thread] = []
        if self.world_size > 1:
            self._start()

    # What the training loop calls

    @contextmanager
    def guard(self, step: int) -> Iterator[None]:
        """Run one step: an error of this rank is reported, one of another rank is named.

        Raises: Nemo2Error that names the rank that failed and its step, if it is another one;
        the step's own exception otherwise.
        """
        self.step, self._inside = step, True
        try:
            yield
        except Exception as error:
            lost = self.explain(error)
            if lost is not None:
                raise lost from error
            self.report(self.rank, step, error)
            raise
        except BaseException as error:  # sys.exit, or an interrupt
            self.report(self.rank, step, f"{_LEFT} ({type(error).__name__}: {error})")
            raise
        finally:
            self._inside = False
        self.check()

    def report(self, rank: int, step: int, error: BaseException | str) -> None:
        """Tell all ranks that this one failed; the first report of a run is the one that counts."""
        if not self._threads or self._record is not None:
            return
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self._own = self._raised = True
        self._own = self._write(_Record(rank, step, text))
        with suppress(Exception):  # the store may be what failed
            self._linger()

    def failure(self) -> Nemo2Error | None:
        """Return the failure that another rank had, if one is known."""
        if self._record is None or self._own:
            return None
        first, self._raised = not self._raised, True
        self._say_record()  # now: a launcher may end this process before its traceback is printed
        if first:
            with suppress(Exception):  # the store may be what failed
                self._linger()
        return self._record.error(self.rank, self.step)

    def check(self) -> None:
        """Raise the failure that another rank had, if one is known."""
        failure = self.failure()
        if failure is not None:
            raise failure

    def explain(self, error: BaseException) -> Nemo2Error | None:
        """Return the failure of another rank that is behind an exception of this one, else None.

        Collectives fail at once when a peer dies, but do not say which: this waits for the verdict,
        ``verdict`` seconds if the dead rank may be on this host, ``stale`` seconds if not.
        """
        if not self._threads or isinstance(error, Nemo2Error) or not lost_a_peer(error):
            return self.failure()
        here = all(beat is None or beat.host == self._host for beat, _ in self._seen.values())
        limit = time.monotonic() + self.patience.verdict + (0 if here else self.patience.stale)
        while self._record is None and time.monotonic() < limit:
            self._wake.set()
            time.sleep(0.05)
        left = [(rank, beat.step) for rank, (beat, _) in self._seen.items() if beat and beat.left]
        if self._record is None and left:
            self._write(_Record(*left[0], _LEFT))
        return self.failure()

    def stop(self) -> None:
        """Say goodbye: this rank has ended well, or its caller deals with the failure."""
        if self._ended.is_set() or os.getpid() != self._pid:
            return
        self._leaving.set()
        self._wake.set()
        if self._threads:
            self._threads[0].join(4 * self.patience.poll + 1)
            self._ended.set()
            self._threads[1].join(1)
            self._unhook()
        self._ended.set()

    # The thread that talks to the store

    def _start(self) -> None:
        store = _get_default_store()
        # The n-th watchdogs of all ranks belong together, under a name that no other run has.
        # What dead ranks have left there, one more than another, does not count.
        here = f"nemo2/watchdog/restart{restart()}"
        number = store.add(f"{here}/{self.rank}", 1)
        name = store.compare_set(f"{here}/name{number}", "", uuid.uuid4().hex)
        self._store = PrefixStore(f"nemo2/{name.decode()}", _own_client(store))
        self._beat()
        now = time.monotonic()
        ahead = [(self.rank + k) % self.world_size for k in range(NEIGHBOURS + 1)]
        # Everyone watches rank 0: it mostly hosts the store, which goes when it leaves.
        self._seen = dict.fromkeys({0, *ahead} - {self.rank}, (None, now))
        for target in (self._probe, self._judge):
            thread = threading.Thread(target=target, name=f"nemo2-{target.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._hook()

    def _probe(self) -> None:
        try:
            previous = time.monotonic()
            while not self._leaving.is_set() and self._record is None:
                self._beat()
                self._look(time.monotonic() - previous)
                previous = self._answered = time.monotonic()
                self._wake.wait(self.patience.poll)
                if not self._leaving.is_set():
                    self._wake.clear()
            failed = self._record is not None
            if not failed or self.rank != 0:  # others must not take a failed host's end for good
                self._beat(left=True)
            if not failed:
                self._linger()
        except Exception as error:  # the store's server is gone
            host, _ = self._seen.get(0, (None, 0.0))
            if host is not None and host.left:
                self._unwatched = True  # it ended well and took the store with it
            elif not self._leaving.is_set() and self._record is None:
                self._record = self._without_store(
                    f"is gone ({str(error).partition(chr(10))[0][:200]})"
                )

    def _beat(self, *, left: bool = False) -> None:
        self._count += 1
        beat = _Beat(self._count, self.step, self._pid, self._host, left)
        self._store.set(f"beat{self.rank}", json.dumps(asdict(beat)))

    def _look(self, pause: float) -> None:
        """Look for a record, then for neighbours that are dead."""
        if self._store.check(["record"]):
            self._record = _Record(**json.loads(self._store.get("record")))
            return
        now = time.monotonic()
        # The time that this process itself was stopped says nothing about the others.
        slept = max(0.0, pause - 2 * self.patience.poll)
        for rank, beat in self._beats().items():
            last, since = self._seen[rank]
            if beat != last:
                self._seen[rank] = beat, now
                continue
            self._seen[rank] = beat, since + slept
            what = self._verdict(rank, beat, now - since - slept)
            if what is not None:
                self._write(_Record(rank, beat.step if beat else 0, what))
                return

    def _verdict(self, rank: int, beat: _Beat | None, silent: float) -> str | None:
        """Return what happened to a rank that is dead; None for one that lives or has left."""
        stale = self.patience.stale
        if beat is None:  # not started yet: it may still be loading
            return f"has not started after {silent:.0f} s" if silent > 3 * stale else None
        if beat.left:
            return None
        if beat.host == self._host and not lives(beat.pid):
            last = self._read(rank)  # it may have said goodbye since
            return None if last is not None and last.left else "its process died"
        if silent > stale:
            return f"no sign of life for {silent:.0f} s: it died, is stopped, or lost its network"
        return None

    def _beats(self) -> dict[int, _Beat | None]:
        """Return the last sign of life of each neighbour, in one request once all have started."""
        if any(beat is None for beat, _ in self._seen.values()):
            return {rank: self._read(rank) for rank in self._seen}
        texts = self._store.multi_get([f"beat{rank}" for rank in self._seen])
        return {r: _Beat(**json.loads(text)) for r, text in zip(self._seen, texts, strict=True)}

    def _read(self, rank: int) -> _Beat | None:
        key = f"beat{rank}"
        return _Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _write(self, record: _Record) -> bool:
        """Write the record, unless there is one; take, and return whether it is, the first."""
        try:
            text = self._store.compare_set("record", "", json.dumps(asdict(record)))
            self._record = _Record(**json.loads(text))
        except Exception:  # the store is gone: then each rank says what it knows
            self._record = record
        return self._record == record

    def _linger(self) -> None:
        """Let others read the last word, or the record, before rank 0's exit ends the store."""
        limit = time.monotonic() + 2 * self.patience.poll + 0.5
        others = set(range(1, self.world_size)) if self.rank == 0 else set()
        others -= {self._record.rank} if self._record is not None else set()
        while others and time.monotonic() < limit:
            others -= {rank for rank in others if (beat := self._read(rank)) and beat.left}
            time.sleep(0.05)

    def _without_store(self, what: str) -> _Record:
        host = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") else "rank 0"
        step = next((b.step for r, (b, _) in self._seen.items() if r == 0 and b), self.step)
        return _Record(0, step, f"the store that {host} hosts {what}")

    # The thread that ends the process

    def _judge(self) -> None:
        patience, tick = self.patience, 0.25
        silent, answered, told = 0.0, self._answered, 0.0
        alone, step, told_at = 0.0, self.step, -1
        while self._record is None:
            if self._ended.wait(tick):
                return
            # Counted in ticks: the time that this process itself was stopped does not count.
            waits = answered == self._answered and not self._unwatched
            silent = silent + tick if waits else 0.0
            answered = self._answered
            if silent > patience.stale and self._record is None:
                self._record = self._without_store(f"has not answered for {silent:.0f} s")
            left = self._left_behind_by()
            alone = alone + tick if left and step == self.step else 0.0
            step = self.step
            # NCCL waits for such a rank, gloo raises. One that left in this very step may have
            # done all of it, and this rank be slow.
            enough = patience.stale * (3 if left and left.step == step else 1)
            if left and alone > enough and self._record is None:
                self._record = left
            told += tick if told or self._was_told_to_end() else 0.0
            if self.on_sigterm and told and not (self._inside and told_at == self.step):
                told, told_at = tick, self.step  # it goes on
            # Python runs the handler in the main thread, which waits for others
            if told > (IN_ORDER if self.on_sigterm else TOLD):
                _say(f"rank {self.rank}: told to end (SIGTERM) in a collective of step {self.step}")
                os._exit(128 + signal.SIGTERM)
        if not self._own:
            self._say_record()
            threading.Thread(target=_abort_groups, daemon=True).start()
        if self._ended.wait(patience.grace):
            return
        if self._raised and self._ended.wait(patience.grace):
            return
        _say(f"rank {self.rank}: ending this process, which did not end by itself")
        os._exit(1)

    def _say_record(self) -> None:
        with self._saying:
            said, self._said = self._said, True
        if not said and self._record is not None:
            _say(str(self._record.error(self.rank, self.step)))

    def _left_behind_by(self) -> _Record | None:
        """Return a rank that has left before or in the step that this one runs, if there is one."""
        if not self._inside:
            return None
        known = [(rank, beat.step) for rank, (beat, _) in self._seen.items() if beat and beat.left]
        behind = [(step, rank) for rank, step in known if step <= self.step]
        return _Record(min(behind)[1], min(behind)[0], _LEFT) if behind else None

    # The ways in which a process ends

    def _hook(self) -> None:
        self._excepthook = sys.excepthook
        sys.excepthook = self._uncaught
        atexit.register(self.stop)
        if multiprocessing.parent_process() is not None:  # there atexit does not run
            multiprocessing.util.Finalize(self, self._child_ends, exitpriority=100)
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            # A launcher sends it as soon as one rank died; stay long enough to say which.
            signal.signal(signal.SIGTERM, self._told_to_end)
            self._signals = socket.socketpair()
            for end in self._signals:
                end.setblocking(False)
            if (other := signal.set_wakeup_fd(self._signals[1].fileno())) != -1:
                signal.set_wakeup_fd(other)

    def _was_told_to_end(self) -> bool:
        """Say whether SIGTERM has arrived; any thread sees it, whatever the main one does."""
        with suppress(BlockingIOError):
            return self._signals is not None and signal.SIGTERM in self._signals[0].recv(64)
        return False

    def _unhook(self) -> None:
        atexit.unregister(self.stop)
        if sys.excepthook == self._uncaught:
            sys.excepthook = self._excepthook
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) == self._told_to_end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self._signals is not None:
                own = self._signals[1].fileno()
                if (current := signal.set_wakeup_fd(-1)) != own:
                    signal.set_wakeup_fd(current)  # somebody else's by now

    def _uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self._excepthook(kind, error, trace)
        self.report(self.rank, self.step, error)

    def _child_ends(self) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            self.report(self.rank, self.step, error)
        else:
            self.stop()

    def _told_to_end(self, number: int, frame: FrameType | None) -> None:
        if self.on_sigterm is not None and not self._ended.is_set():
            self.on_sigterm()
            return
        limit = time.monotonic() + 6.0
        while self._record is None and not self._ended.is_set() and time.monotonic() < limit:
            self._wake.set()
            time.sleep(0.05)
        time.sleep(0.5 if self._record is not None else 0.0)  # the other thread is saying it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def lost_a_peer(error: BaseException) -> bool:
    """Return whether an exception looks like a collective that lost one of its ranks."""
    known = isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER)
    return known or isinstance(error, dist.DistError)


def _own_client(store: Any) -> Any:
    """Return a client of the same store that does not wait for the main thread's requests."""
    if hasattr(store, "clone"):
        return store.clone()
    while isinstance(store, PrefixStore):  # older torch: the prefix is lost, our names are unique
        store = store.underlying_store
    if isinstance(store, TCPStore):
        return TCPStore(store.host, store.port, is_master=False)
    return store


def _abort_groups() -> None:
    """Make blocked NCCL collectives return; gloo has no such way (torch 2.11 to 2.13)."""
    for group in list(_world.pg_map):
        with suppress(Exception):
            if torch.cuda.is_available() and "nccl" in dist.get_backend_config(group):
                group.abort()


def _say(text: str) -> None:
    print(f"nemo2: {text}", file=sys.stderr, flush=True)

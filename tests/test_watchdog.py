"""The guard against ranks that die, with processes that do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

WORLD = 2 if os.environ.get("NEMO2_TEST_DEVICE") == "cuda" else 3

# Runs on each rank: 60 steps of one all-reduce; at step 5 of the rank chosen, something happens.
SCRIPT = """
import os, signal, sys, time
import torch, torch.distributed as dist
from nemo2.mesh.watchdog import Patience, Watchdog

mode, chosen, stale = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
if os.environ.get("NEMO2_TEST_DEVICE") == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device, backend = "cuda", "cpu:gloo,cuda:nccl"
else:
    device, backend = "cpu", "gloo"
if len(sys.argv) == 4:  # a launcher has made the store
    dist.init_process_group(backend)
else:
    rank, world, port, server = map(int, sys.argv[4:])
    server = server if rank == 0 else None
    store = dist.TCPStore(
        "127.0.0.1", port, world, rank == 0, wait_for_workers=False, master_listen_fd=server
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
rank = dist.get_rank()
value = torch.ones(1000, device=device)
dist.all_reduce(value)
if mode == "cut" and rank != chosen:
    sys.excepthook = lambda *_: os._exit(9)  # as a launcher may do it, before the traceback
watchdog = Watchdog(Patience(stale=stale, grace=3))
for step in range(5 if mode == "short" and rank == chosen else 60):
    with watchdog.guard(step):
        if mode == "stop" and step == 5:
            print("there", flush=True)
        if rank == chosen and step == 5:
            time.sleep(2.0)  # a few signs of life: the others know the step
            if mode in ("kill", "cut"):
                os.kill(os.getpid(), signal.SIGKILL)
            if mode == "raise":
                raise ValueError("planted")
            if mode == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if mode == "leave":
                sys.exit(0)
            if mode == "break":
                break
            if mode == "busy":
                end = time.monotonic() + 2 * stale
                while time.monotonic() < end:
                    sum(range(1000))
        dist.all_reduce(value.fill_(1.0))
        if device == "cuda":
            torch.cuda.synchronize()
    if rank == chosen and step == 5 and mode == "uncaught":
        raise ValueError("planted outside")
if mode == "early" and rank != chosen:
    time.sleep(4)
if mode == "twice":
    watchdog.stop()
    with Watchdog().guard(1):
        dist.all_reduce(value)
print("done", flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int
    out: str
    err: str


def start(mode: str, chosen: int, stale: float = 20.0) -> list[subprocess.Popen[str]]:
    """Start the ranks; rank 0's store listens on a socket made here, so no port is taken twice."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        command = [sys.executable, "-c", SCRIPT, mode, str(chosen), str(stale)]
        return [
            subprocess.Popen(
                [*command, *map(str, (rank, WORLD, port, server.fileno()))],
                env=os.environ | loopback | {"LOCAL_RANK": str(rank)},
                pass_fds=[server.fileno()] if rank == 0 else [],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(WORLD)
        ]


def finish(ranks: list[subprocess.Popen[str]], seconds: float, skip: int = -1) -> list[Ended]:
    """Wait for all ranks but one; whatever happens, leave no process behind.

    The seconds count from the first end: a busy machine may take long to start them.
    """
    start = time.monotonic()
    while time.monotonic() < start + 120 and all(process.poll() is None for process in ranks):
        time.sleep(0.05)
    limit = time.monotonic() + seconds
    try:
        for rank, process in enumerate(ranks):
            if rank != skip:
                process.wait(max(0.1, limit - time.monotonic()))
    finally:
        for process in ranks:
            process.kill()
    ended = []
    for process in ranks:
        out, err = process.communicate()
        ended.append(Ended(process.returncode, out, err))
    return ended


@pytest.mark.parametrize(
    ("mode", "chosen", "what"),
    [
        ("kill", 0, "step 5: "),
        ("kill", 1, "step 5: its process died"),
        ("raise", 1, "step 5: ValueError: planted"),
        ("uncaught", 0, "step 5: ValueError: planted outside"),
        ("leave", 0, "step 5: it left while other ranks were still running"),
    ],
)
def test_survivors_end_and_name_rank_and_step(mode: str, chosen: int, what: str) -> None:
    ended = finish(start(mode, chosen), 50)
    for rank, one in enumerate(ended):
        if rank != chosen:
            assert one.code not in (0, -signal.SIGKILL), one.err
            assert f"rank {chosen}, {what}" in one.err
            assert "done" not in one.out


def test_survivors_name_it_before_they_raise() -> None:
    for rank, one in enumerate(finish(start("cut", 1), 50)):
        if rank != 1:
            assert one.code == 9, one.err
            assert "nemo2: rank 1, step 5: its process died" in one.err


@pytest.mark.parametrize("chosen", [0, 1])
@pytest.mark.parametrize(("mode", "last"), [("short", 4), ("break", 5)])
def test_a_rank_whose_loop_is_shorter_is_named(mode: str, last: int, chosen: int) -> None:
    # The rank that left has done nothing wrong; NCCL may keep it at its exit until it is killed.
    ended = finish(start(mode, chosen, stale=3), 50, skip=chosen)
    for rank, one in enumerate(ended):
        if rank != chosen:
            assert one.code not in (0, -signal.SIGKILL), one.err
            assert f"rank {chosen}, step {last}: it left while other ranks" in one.err
            assert "done" not in one.out


@pytest.mark.parametrize("chosen", [0, WORLD - 1])
def test_a_rank_that_hangs_is_named_and_the_others_end(chosen: int) -> None:
    ended = finish(start("stop", chosen, stale=3), 45, skip=chosen)
    for rank, one in enumerate(ended):
        if rank != chosen:
            assert one.code == 1, one.err
            assert f"nemo2: rank {chosen}, step 5: " in one.err


@pytest.mark.parametrize("mode", ["busy", "early", "twice"])
def test_no_false_alarm(mode: str) -> None:
    for one in finish(start(mode, 0, stale=3), 60):
        assert one.code == 0, one.err
        assert "nemo2:" not in one.err
        assert "done" in one.out


def test_torchrun_names_rank_and_step() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={WORLD}", "--no-python", sys.executable]
    done = subprocess.run(
        [*command, "-c", SCRIPT, "kill", "1", "20"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "rank 1, step 5: its process died" in done.stderr


def test_sigterm_ends_ranks_that_wait_in_a_collective() -> None:
    """Python's handler runs in the main thread only, which here waits for a stopped rank."""
    ranks = start("stop", 1, stale=60.0)
    others = [rank for rank in range(WORLD) if rank != 1]
    try:
        for rank in range(WORLD):
            out = ranks[rank].stdout
            assert out is not None
            assert out.readline() == "there\n"
        time.sleep(4.0)  # rank 1 stops after two of them
        for rank in others:
            ranks[rank].terminate()
        ended = finish(ranks, 20, skip=1)
    finally:
        for process in ranks:
            process.kill()
    for rank in others:
        assert ended[rank].code == 128 + signal.SIGTERM
        assert "told to end (SIGTERM) in a collective of step 5" in ended[rank].err

"""Which processes of this host are alive."""

from __future__ import annotations

import os
import time
from contextlib import suppress

_GLOO = "pt_gloo_runloop"  # what torch names the threads of a gloo group
_LOOK = 0.01  # seconds between two looks at them; who waits for the GIL wakes each 0.005


def host_name() -> str:
    """Return what processes have in common that can see each other's process ids."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {os.getpid()}"


def lives(pid: int) -> bool:
    """Return whether a process of this host runs; one that ended but was not awaited does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def settle(limit: float = 2.0) -> None:
    """Wait, without the GIL, until gloo's threads have dropped the tensors of what they have done.

    A collective returns before its thread drops its tensors, for which that takes the GIL. Once
    Python has begun to end, this aborts the process (Python 3.11, torch 2.13, pytorch#190489). A
    thread has nothing to drop if it did not run while the GIL was free.

    Args:
        limit: seconds after which it returns anyway: a collective may never end.
    """
    end = time.monotonic() + limit
    before = None
    while time.monotonic() < end and ((now := _gloo_threads()) != before or "R" in now.values()):
        before = now
        time.sleep(_LOOK)


def _gloo_threads() -> dict[str, str]:
    """Return of each of gloo's threads how often it has run, or "R" if it does not sleep."""
    found: dict[str, str] = {}
    with suppress(OSError):  # no Linux
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError), open(f"/proc/self/task/{thread}/status") as file:
                status = dict(line.split(":", 1) for line in file)
                if status["Name"].strip() == _GLOO:
                    runs = status["voluntary_ctxt_switches"], status["nonvoluntary_ctxt_switches"]
                    found[thread] = "".join(runs) if "S" in status["State"].split()[0] else "R"
    return found

"""Which processes of this host are alive."""

from __future__ import annotations

import os


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

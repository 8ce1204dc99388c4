"""The Trainer's own launcher, which lets a failure be named before it ends the processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from .last import last_of
from .preemption import EXIT_STATUS


class Launcher(_SubprocessScriptLauncher):
    """Starts this script once more for each other device of the node.

    Lightning's own kills all processes up to 5 seconds after one has failed; here survivors
    first get the time to say, by the watchdog, which rank failed, at which step, and why.
    Where something else has started the processes, it only runs what it is given.

    Attributes:
        asked_for_last: whether what runs was given ``ckpt_path="last"``.
        last: the checkpoint that it then has in place of it.
    """

    asked_for_last = False
    last: str | None = None

    @property
    def is_interactive_compatible(self) -> bool:
        external: bool = self.cluster_environment.creates_processes_externally
        return external

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any
    ) -> Any:
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            self._call_children_scripts()
            _Observer(os.getpid(), self.procs).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        # The Trainer gives its own methods one text, the path of a checkpoint.
        self.asked_for_last = any(isinstance(arg, str) and arg == "last" for arg in args)
        if self.asked_for_last and trainer is not None:
            self.last = last_of(trainer)
            args = tuple(self.last if isinstance(a, str) and a == "last" else a for a in args)
        return function(*args, **kwargs)


class _Observer(_ChildProcessObserver):
    patience = 20.0  # seconds; more than a watchdog needs, see Patience

    def __init__(self, main_pid: int, children: list[Any]) -> None:
        super().__init__(main_pid, children, sleep_period=1)

    def _terminate_all(self) -> None:
        failed = [
            (i + 1, p.returncode) for i, p in enumerate(self._child_processes) if p.returncode
        ]
        if all(code == EXIT_STATUS for _, code in failed):
            return  # all ranks leave together, this one as well
        limit = time.monotonic() + self.patience
        while time.monotonic() < limit and any(p.poll() is None for p in self._child_processes):
            time.sleep(0.2)
        time.sleep(max(0.0, min(5.0, limit - time.monotonic())))  # for the main process itself
        shown = ", ".join(f"local rank {rank} (exit code {code})" for rank, code in failed)
        print(f"nemo2: ended early: {shown}; ending what still runs", file=sys.stderr, flush=True)
        super()._terminate_all()

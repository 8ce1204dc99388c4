"""Measures how long the other ranks live when one of a training fails, and what a stop costs.

``python -m benchmarks.failure`` trains the small model of ``benchmarks.reliability`` under the
Trainer in two processes. In step 5 something happens to rank 1; printed are the seconds until
rank 0 has ended, its exit status, and what it said.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

import nemo2
from benchmarks.reliability import WIDTH, Model

STEP = 5
EVENTS = {
    "killed": signal.SIGKILL,
    "raises": None,
    "stopped": signal.SIGSTOP,
    "told to end": signal.SIGTERM,
}


class Happens(L.Callback):
    def __init__(self, event: str, file: Path) -> None:
        self.event, self.file = event, file

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step != STEP:
            return
        time.sleep(1.0)  # a sign of life: the other rank knows the step
        if trainer.global_rank == 1:
            self.file.write_text(str(time.time()))
            number = EVENTS[self.event]
            if number is None:
                raise RuntimeError("planted")
            os.kill(os.getpid(), number)


def train(event: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=nemo2.MegatronStrategy(dp=2),
        max_steps=1000,
        callbacks=[Happens(event, folder / "when")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    data = TensorDataset(torch.randn(80, WIDTH))
    trainer.fit(Model(), DataLoader(data, batch_size=4))


def be(rank: int, port: int, event: str, folder: Path) -> None:
    """Be one rank; never returns."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    code: Any = 1
    try:
        train(event, folder)
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def measure(event: str, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            be(rank, port, event, folder)
        children.append(child)
    code = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    seconds = time.time() - float((folder / "when").read_text())
    os.kill(children[1], signal.SIGKILL)
    os.waitpid(children[1], 0)
    said = [x for x in (folder / "rank0.log").read_text().splitlines() if "rank 1" in x]
    print(f"{event}: {seconds:.1f} s, exit status {code}, {said[0].strip() if said else '-'}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="nemo2-failure-") as root:
        for event in sys.argv[1:] or EVENTS:
            for number in range(3):
                folder = Path(root, f"{event}{number}")
                folder.mkdir()
                measure(event, folder)


if __name__ == "__main__":
    main()

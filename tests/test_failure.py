"""Trainings that are killed, fail, or are told to end, and go on from their last checkpoint.

As a script (``python -m tests.test_failure FOLDER``) this file is the training: ``FAIL`` says what
happens in which life, and each rank notes what it trained on. With a number of restarts it is
torchrun, too, whose agent then forks the ranks: so what takes seconds is imported once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lightning_programs import Lit, RecordSamples, fit

ROOT = Path(__file__).parent.parent
SECONDS = 240.0  # of one training with all of its lives; on an idle machine it takes 20
STEPS, GLOBAL, SAMPLES = 10, 8, 64  # an epoch has 8 steps
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


# --- the training


class Notes(RecordSamples):
    """Writes step, loss and samples to a file of this rank, line by line."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, *rest)
        line = {"life": life(self.folder), "step": trainer.global_step}
        line |= {"loss": self.losses[-1], "samples": self.samples[-1]}
        with (self.folder / f"rank{trainer.global_rank}.notes").open("a") as file:
            file.write(json.dumps(line) + "\n")


class Fails(Lit):
    """Does in some step what FAIL says: a list, life by life, of [what, rank, step] or null."""

    folder: Path

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        plan = json.loads(os.environ.get("FAIL", "[]"))
        what, rank, step = (plan[life(self.folder) :] or [None])[0] or (None, -1, -1)
        if self.global_rank == rank and self.global_step == step:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "raise":
                raise RuntimeError("planted")
            if what == "told":
                os.kill(os.getpid(), signal.SIGTERM)
            if what == "launcher":
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(1)
            if what == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
        return super().training_step(batch, batch_idx)


def life(folder: Path) -> int:
    """Return how often this training was started before: by torchrun, or by the test."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return restarts + int(os.environ.get("LIFE", "0"))


def train(folder: Path, options: dict[str, Any]) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    torch.set_num_threads(1)
    saves = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=2, save_top_k=-1)
    Fails.folder = folder
    fit(
        folder,
        {"dp": 2, **options},
        batch=GLOBAL // 2,
        samples=SAMPLES,
        build=Fails,
        ckpt_path="last",
        shuffle=True,
        devices=2,
        max_steps=STEPS,
        max_epochs=3,
        callbacks=[Notes(folder), saves],
        enable_checkpointing=True,
    )
    print("done", flush=True)


def launch(folder: Path, restarts: int) -> None:
    """Do what ``torchrun --standalone --nproc-per-node=2 --max-restarts=N`` does, by forking."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    import nemo2.lightning  # noqa: F401

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=restarts,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
    )
    elastic_launch(config, forked)(folder, json.loads(os.environ.get("OPTIONS", "{}")))


def forked(folder: Path, options: dict[str, Any]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the agent's
    train(folder, options)


# --- what tests do with it


def run(
    folder: Path, *launcher: str, restarts: int | None = None, **environment: str
) -> tuple[int, str]:
    """Run the training to its end; return its exit status and what all of its ranks said."""
    own = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    program = ["-m", "tests.test_failure", str(folder)]
    process = subprocess.Popen(
        [sys.executable, *launcher, *program, *([] if restarts is None else [str(restarts)])],
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(process.communicate()[0])
    finally:
        with suppress(ProcessLookupError):  # whatever happens, no process is left behind
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same training without interruption, on one device."""
    folder = tmp_path_factory.mktemp("whole")
    options = {"max_steps": STEPS, "max_epochs": 3}
    return fit(folder, None, batch=GLOBAL, samples=SAMPLES, shuffle=True, **options)


def check(folder: Path, whole: dict[str, Any], begins: list[int]) -> None:
    """Compare every step of every life; life by life, ``begins`` has the steps done before."""
    ranks = [
        [json.loads(line) for line in (folder / f"rank{r}.notes").read_text().splitlines()]
        for r in range(2)
    ]
    for notes in ranks:
        first = {line["life"]: line["step"] for line in reversed(notes)}
        assert [first[n] - 1 for n in sorted(first)] == begins
        assert {line["step"] for line in notes} == set(range(1, STEPS + 1))
        for line in notes:
            assert line["loss"] == pytest.approx(whole["losses"][line["step"] - 1], rel=1e-9)
    seen = {(line["life"], line["step"]): line["samples"] for line in ranks[1]}
    for line in ranks[0]:
        other = seen.get((line["life"], line["step"]))
        if other is not None:  # else killed in between
            pairs = zip(line["samples"], other, strict=True)
            assert [x for pair in pairs for x in pair] == whole["samples"][line["step"] - 1]


def test_torchrun_restarts_from_the_last_checkpoint(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Killed, failed, and one rank told to end: each time training goes on by itself."""
    fail = [["kill", 1, 3], ["raise", 0, 5], ["told", 1, 6], None]
    code, said = run(tmp_path, restarts=3, FAIL=json.dumps(fail))
    assert code == 0, said
    assert said.count("done") == 2, said
    assert "rank 1, step 3: its process died" in said or "rank 1, step 2:" in said, said
    assert "rank 0, step 5: RuntimeError: planted" in said, said
    place = tmp_path / "saved" / "preempted-step=7.ckpt"
    told = "rank 1 was told to end (SIGTERM) at global step 7: saved "
    assert f"nemo2: {told}'{place}', leaving with exit status 143" in said
    check(tmp_path, whole, [0, 2, 4, 7])


if __name__ == "__main__":
    if len(sys.argv) > 2:
        launch(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        train(Path(sys.argv[1]), json.loads(os.environ.get("OPTIONS", "{}")))

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
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

import nemo2
from nemo2.checkpoint.index import INDEX, Index
from nemo2.checkpoint.plain import encode
from nemo2.lightning.last import check_same, last_of
from nemo2.lightning.preemption import folder_of
from tests.lightning_programs import Lit, RecordSamples, fit, trainer
from tests.pool import Pool

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
            if what == "launcher":  # which sends it on to all ranks
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(1)
        return super().training_step(batch, batch_idx)


def life(folder: Path) -> int:
    """Return how often this training was started before: by torchrun, or by the test."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return restarts + int(os.environ.get("LIFE", "0"))


def train(folder: Path, options: dict[str, Any]) -> None:
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
    options: dict[str, Any] = {"max_steps": STEPS, "max_epochs": 3}
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
    assert "rank 0, step 5: RuntimeError: planted" in said, said
    place = tmp_path / "saved" / "preempted-step=7.ckpt"
    told = "rank 1 was told to end (SIGTERM) at global step 7: saved "
    assert f"nemo2: {told}'{place}', leaving with exit status 143" in said
    check(tmp_path, whole, [0, 2, 4, 7])


def test_sigterm_saves_and_leaves(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Told through torchrun; then only the process that has started the others; then it ends."""
    fail = json.dumps([["launcher", 1, 3], ["told", 0, 6], None])
    options = {"asynchronous_save": True}
    with_all = {"FAIL": fail, "OPTIONS": json.dumps(options)}
    place = tmp_path / "saved"
    code, said = run(tmp_path, *TORCHRUN, **with_all)
    assert code not in (0, -signal.SIGKILL), said
    told = f"nemo2: rank 0 was told to end (SIGTERM) at global step 4: saved '{place}/"
    assert f"{told}preempted-step=4.ckpt', leaving with exit status 143" in said, said
    code, said = run(tmp_path, **with_all, LIFE="1")
    assert code == 143, said
    told = f"nemo2: rank 0 was told to end (SIGTERM) at global step 7: saved '{place}/"
    assert f"{told}preempted-step=7.ckpt', leaving with exit status 143" in said, said
    assert "ended early" not in said
    kept = [path.name for path in place.glob("preempted*")]
    assert kept == ["preempted-step=7.ckpt"]
    code, said = run(tmp_path, restarts=0, **with_all, LIFE="2")
    assert code == 0, said
    check(tmp_path, whole, [0, 4, 7])


class Told(RecordSamples):
    """Sends SIGTERM to one rank in one step; twice, and again while it saves."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        super().on_train_batch_start(trainer, *rest)
        last = trainer.global_rank == trainer.world_size - 1
        if last and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    def on_save_checkpoint(self, *rest: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def stop_and_go_on(folder: str, case: dict[str, Any], step: int, world: int) -> list[Any]:
    """Train, told to end in step ``step``, and go on; return both parts, and the checkpoint."""
    handler = signal.getsignal(signal.SIGTERM)
    options = {"batch": GLOBAL // world, "samples": SAMPLES, "shuffle": True, "devices": world}
    options |= {"max_steps": STEPS, "max_epochs": 20} | case
    told, rest = Told(step), RecordSamples()
    with pytest.raises(SystemExit) as left:
        fit(folder, {"dp": world}, callbacks=[told], **options)
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    (path,) = Path(folder, "checkpoints").glob("*")
    fit(folder, {"dp": world}, ckpt_path="last", callbacks=[rest], **options)
    assert signal.getsignal(signal.SIGTERM) == handler
    return [told.losses, rest.losses, told.samples, rest.samples, path.name]


@pytest.mark.parametrize(
    ("world", "case", "step", "stops"),
    [
        (2, {}, 4, 5),  # after its validation
        (2, {}, 7, 9),  # the last step of an epoch: after the next one
        (2, {"limit_train_batches": 1, "val_check_interval": 1.0}, 3, 4),
        (2, {"accumulate_grad_batches": 2, "val_check_interval": 1.0}, 1, 2),
        (1, {}, 2, 3),
    ],
)
def test_training_goes_on_exactly(
    pool: Pool, tmp_path: Path, world: int, case: dict[str, Any], step: int, stops: int
) -> None:
    ranks = pool.run(world, stop_and_go_on, str(tmp_path), case, step, world)
    options = {"samples": SAMPLES, "shuffle": True, "max_steps": STEPS, "max_epochs": 20} | case
    want = fit(tmp_path / "whole", None, batch=GLOBAL, **options)
    for told, rest, _, _, name in ranks:
        assert name == f"preempted-step={stops}.ckpt"
        assert len(told) == stops * case.get("accumulate_grad_batches", 1)
        assert told + rest == pytest.approx(want["losses"], rel=1e-9)
    read = zip(*(before + after for _, _, before, after, _ in ranks), strict=True)
    order = [[x for same in zip(*own, strict=True) for x in same] for own in read]
    assert order == want["samples"]


# --- which checkpoint is the last


def make(folder: Path, name: str, when: int, extra: Any = None, missing: int = 0) -> Path:
    """Write a checkpoint without tensors, of one file of 8 bytes, completed at ``when``."""
    path = folder / name
    path.mkdir(parents=True)
    extra = {"lightning": {"callbacks": {}}} if extra is None else extra
    index = Index(path, "0" * 12, {}, files={"data": (8, 0)}, extra=encode(extra, "extra"))
    (path / "data").write_bytes(b" " * (8 - missing))
    (path / INDEX).write_text(index.text)
    os.utime(path / INDEX, (when, when))
    return path


def last(folder: Path, fn: TrainerFn = TrainerFn.FITTING) -> str | None:
    saves = ModelCheckpoint(folder / "saved")
    made = trainer(folder, callbacks=[saves], enable_checkpointing=True)
    made.state.fn = fn
    return last_of(made)


def test_the_last_is_the_newest_complete_one(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    with pytest.warns(UserWarning, match="finds no checkpoint in .*saved': nothing is loaded"):
        assert last(tmp_path) is None
    make(saved, "step=30.ckpt", 10)
    newest = make(saved, "preempted-step=20.ckpt", 20)
    make(saved, ".step=40.ckpt.unfinished-000000000000", 30)
    make(saved, "bare", 40, extra={"step": 1})
    weights = make(saved, "weights.ckpt", 50, extra={"lightning": {}})
    (saved / "step=50.ckpt").mkdir()
    (saved / "step=50.ckpt" / "000000000000-rank00000.safetensors").touch()
    (saved / "last.ckpt").write_text("of Lightning's own")
    assert last(tmp_path) == str(newest)
    assert last(tmp_path, TrainerFn.VALIDATING) == str(weights)
    make(saved, "step=60.ckpt", 60, missing=1)
    with pytest.warns(UserWarning, match="takes an older one, .*20.ckpt, as .*data was truncated"):
        assert last(tmp_path) == str(newest)


def test_nothing_but_damage_is_no_beginning(tmp_path: Path) -> None:
    make(tmp_path / "saved", "step=1.ckpt", 10, missing=8)
    broken = make(tmp_path / "saved", "step=2.ckpt", 20)
    (broken / INDEX).write_text("{")
    with pytest.raises(nemo2.CheckpointError) as caught:
        last(tmp_path)
    said = str(caught.value)
    assert "every checkpoint in" in said
    assert "step=2.ckpt': checkpoint.json was truncated" in said
    assert "step=1.ckpt': data was truncated: it has 0 bytes of 8" in said


def test_without_a_callback_it_is_where_a_told_fit_saves(tmp_path: Path) -> None:
    path = make(tmp_path / "checkpoints", "preempted-step=1.ckpt", 10)
    made = trainer(tmp_path)
    made.state.fn = TrainerFn.FITTING
    assert last_of(made) == str(path)
    assert folder_of(made) == path.parent


def test_ranks_that_see_other_folders_are_told() -> None:
    check_same(["a", "a"])
    with pytest.raises(nemo2.CheckpointError, match=r"ranks \[0, 2\]: a\n  ranks \[1\]: none"):
        check_same(["a", None, "a"])


if __name__ == "__main__":
    if len(sys.argv) > 2:
        launch(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        train(Path(sys.argv[1]), json.loads(os.environ.get("OPTIONS", "{}")))

"""The Trainer on a mesh gives the numbers of a Trainer on one device."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

import nemo2
from tests.lightning_programs import VOCABULARY, Lit, data, fit, trainer
from tests.pool import Pool

TWO = nemo2.Pipeline(microbatches=2)
INTERLEAVED = nemo2.Pipeline(2, "interleaved", 2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a Trainer without a strategy sees: batches of 8 samples."""
    return fit(tmp_path_factory.mktemp("plain"), None)


def check(got: list[dict[str, Any]], want: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Compare the losses with ``want``, and what each rank logged with what rank 0 did."""
    assert got[0]["losses"] == pytest.approx(want["losses"], abs=tolerance)
    assert got[0]["fitted"] == pytest.approx(want["fitted"], abs=tolerance)
    assert got[0]["validated"] == pytest.approx(want["validated"], abs=tolerance)
    for rank in got[1:]:
        for key in ("losses", "seen", "fitted", "logged", "validated"):
            assert rank[key] == got[0][key]


MESHES = [
    ({"pp": 2, "tp": 2, "pipeline": TWO}, 4),
    ({"dp": 2, "tp": 2}, 4),
    ({"dp": 2, "tp": 2, "data_parallel": "ddp", "pipeline": TWO}, 4),
    ({"dp": 2, "tp": 2, "data_parallel": "zero1", "pipeline": TWO}, 4),
    ({"pp": 2, "tp": 2, "pipeline": TWO}, 8),
    ({"pp": 2, "tp": 1, "pipeline": INTERLEAVED}, 4),
    ({"cp": 2, "tp": 1, "context_parallel": nemo2.ContextParallel(balance=False)}, 4),
]


@pytest.mark.parametrize(("mesh", "world"), MESHES)
def test_losses_equal_those_of_one_device(
    pool: Pool, tmp_path: Path, plain: dict[str, Any], mesh: dict[str, Any], world: int
) -> None:
    dp = world // (mesh.get("pp", 1) * mesh.get("cp", 1) * mesh["tp"])
    got = pool.run(world, fit, tmp_path, mesh, batch=8 // dp, devices=world)
    check(got, plain)


def test_one_process_is_the_same_program(pool: Pool, tmp_path: Path, plain: dict[str, Any]) -> None:
    check(pool.run(1, fit, tmp_path, {"pipeline": TWO}), plain)


def with_dropout(folder: str, strategy: dict[str, Any], **options: Any) -> dict[str, Any]:
    return fit(folder, strategy, build=functools.partial(Lit, 0.2), **options)


def test_dropout_is_that_of_one_process(pool: Pool, tmp_path: Path, plain: dict[str, Any]) -> None:
    """The samples that the ranks read in turns have the masks that they have on one device."""
    (one,) = pool.run(1, with_dropout, str(tmp_path), {})
    assert one["losses"] != pytest.approx(plain["losses"], abs=1e-3)
    check(pool.run(2, with_dropout, str(tmp_path), {"dp": 2}, batch=4, devices=2), one)


def accumulating(folder: str, strategy: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
    return fit(
        folder,
        strategy,
        batch=4,
        accumulate_grad_batches=2,
        gradient_clip_algorithm="value",
        gradient_clip_val=0.01,
        **options,
    )


def test_accumulated_gradients_and_clipping_by_value(pool: Pool, tmp_path: Path) -> None:
    want = accumulating(str(tmp_path), None)
    got = pool.run(2, accumulating, str(tmp_path), {"pp": 2, "pipeline": TWO}, devices=2)
    check(got, want)


class Sums(Lit):
    """Returns a dict, a sum and a count, and keeps what it saw in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, logits = self.loss(batch)
        self.kept.append(loss.detach())
        self.log("loss", loss)
        self.log("samples", float(len(batch[0])), reduce_fx="sum", on_step=True)
        self.log("best", logits.argmax(-1).eq(batch[1]).double().mean(), prog_bar=True)
        return {"loss": loss, "logits": logits} if batch_idx % 2 else loss

    def on_train_epoch_end(self) -> None:
        assert all(type(x) is Tensor for x in self.kept)  # nothing from planning
        self.log("kept", float(len(self.kept)), sync_dist=True)


def sums(folder: str, strategy: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
    return fit(folder, strategy, build=Sums, **options)


class Early(Sums):
    """Logs before it calls the model, where every stage comes by."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("early", float(len(batch[0])), reduce_fx="sum", on_step=True)
        return super().training_step(batch, batch_idx)


def early(folder: str, strategy: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
    return fit(folder, strategy, build=Early, **options)


def test_what_is_logged_before_the_model_counts_once(pool: Pool, tmp_path: Path) -> None:
    got = pool.run(2, early, str(tmp_path), {"pp": 2, "pipeline": INTERLEAVED}, devices=2)
    assert [rank["fitted"]["early"] for rank in got] == [8, 8]


def test_sums_are_logged_over_the_whole_batch(pool: Pool, tmp_path: Path) -> None:
    want = sums(str(tmp_path), None, batch=8)
    got = pool.run(2, sums, str(tmp_path), {"dp": 2, "pipeline": TWO}, batch=4, devices=2)
    assert got[0]["fitted"]["samples"] == want["fitted"]["samples"] == 8
    assert got[0]["fitted"]["kept"] == 2 * want["fitted"]["kept"] == 20
    assert got[0]["losses"] == pytest.approx(want["losses"])
    for rank in got:
        assert rank["fitted"]["best"] == pytest.approx(want["fitted"]["best"])


class Measured(Lit):
    """Logs metric objects; the validation metric gets the split logits."""

    def __init__(self) -> None:
        super().__init__()
        options = {"num_classes": VOCABULARY, "average": "micro"}
        self.accuracy = MulticlassAccuracy(**options)
        self.checked = MulticlassAccuracy(**options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, logits = self.loss(batch)
        self.accuracy(logits.flatten(0, 1), batch[1].flatten())
        self.log("loss", loss)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.checked.update(self.loss(batch)[1].flatten(0, 1), batch[1].flatten())
        self.log("checked", self.checked)


def measure(folder: str, strategy: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
    return fit(folder, strategy, build=Measured, **options)


@pytest.mark.parametrize("mesh", [{"pp": 2, "tp": 2, "pipeline": TWO}, {"dp": 2, "tp": 2}])
def test_logged_metric_objects(pool: Pool, tmp_path: Path, mesh: dict[str, Any]) -> None:
    batch = 8 // mesh.get("dp", 1)
    check(
        pool.run(4, measure, str(tmp_path), mesh, batch=batch, devices=4),
        measure(str(tmp_path), None),
    )


def shuffle(folder: str, strategy: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
    with patch.dict(os.environ, PL_GLOBAL_SEED="0"):  # as L.seed_everything(0) leaves it
        return fit(folder, strategy, shuffle=True, max_epochs=2, max_steps=20, **options)


def test_a_shuffled_loader_gives_the_batches_of_one_device(pool: Pool, tmp_path: Path) -> None:
    want = shuffle(str(tmp_path), None)
    check(pool.run(2, shuffle, str(tmp_path), {"dp": 2}, batch=4, devices=2), want)


def resume(folder: str, strategy: dict[str, Any], devices: int) -> list[Any]:
    """Train 10 steps at once, and 5 with the default ModelCheckpoint, then 5 from it."""
    options: dict[str, Any] = {"devices": devices, "build": Dropped, "max_epochs": 3}
    options["batch"] = 8 // strategy.get("dp", 1)
    whole = fit(folder, strategy, samples=40, max_steps=10, **options)
    options["enable_checkpointing"] = True
    first = fit(folder, strategy, samples=40, max_steps=5, **options)
    folder = str(Path(folder, "last"))
    last = fit(folder, strategy, samples=40, max_steps=10, ckpt_path=first["checkpoint"], **options)
    return [whole, first, last]


class Dropped(Lit):
    """With dropout, late construction, and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2, late=True)
        self.register_buffer("count", torch.zeros(()))

    def on_train_batch_end(self, *rest: Any) -> None:
        self.count += 1


@pytest.mark.parametrize(
    ("mesh", "world"),
    [
        ({"pp": 2, "tp": 2, "pipeline": TWO}, 4),
        ({"dp": 2}, 2),
        ({"dp": 4, "data_parallel": nemo2.DataParallel(replicate=2)}, 4),
    ],
)
def test_a_resumed_run_equals_one_without_interruption(
    pool: Pool, tmp_path: Path, mesh: dict[str, Any], world: int
) -> None:
    for whole, first, last in pool.run(world, resume, str(tmp_path), mesh, world):
        assert Path(first["checkpoint"]).is_dir()
        assert first["losses"] + last["losses"] == whole["losses"]
        assert last["validated"] == whole["validated"]


def predict(folder: str, mesh: dict[str, Any], devices: int) -> tuple[list[Tensor], Any]:
    made = trainer(folder, strategy=nemo2.MegatronStrategy(**mesh), devices=devices)
    torch.manual_seed(1)
    module = Lit()
    out = made.predict(module, data(8, 16))
    return out, made.test(module, data(8, 16), verbose=False)


def test_predict_and_test_on_all_stages(pool: Pool, tmp_path: Path) -> None:
    got = pool.run(4, predict, str(tmp_path), {"pp": 2, "tp": 2, "pipeline": TWO}, 4)
    torch.manual_seed(1)
    module = Lit().double()
    want = [module(batch[0]).detach() for batch in data(8, 16)]
    for out, tested in got:
        torch.testing.assert_close(out, want)
        assert tested == got[0][1]


# --- what a step does not wait for


class Logs(Lit):
    """Logs tensors and a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=VOCABULARY, validate_args=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, logits = self.loss(batch)
        self.accuracy(logits.flatten(0, 1), batch[1].flatten())
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", logits.max(), reduce_fx="max", batch_size=1 + len(batch[0]))
        return loss


class Waits(L.Callback):
    """Notes who reads a value of a tensor, and so waits for it, in the steps 5 to 7.

    In the 1st, 2nd, 4th and 8th the batches of ranks are compared.
    """

    readers = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._patches = ExitStack()

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, at: int) -> None:
        if at == 7:
            self._patches.close()
        if at == 4:
            for name in self.readers:
                read = functools.partial(self._read, getattr(Tensor, name))
                self._patches.enter_context(
                    patch.object(Tensor, name, lambda x, *a, _read=read, **k: _read(x, *a, **k))
                )

    def _read(self, original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        frames = [f.filename for f in traceback.extract_stack()[:-2]]
        self.seen.add(str(Path(*Path(frames[-1]).parts[-3:])))
        return original(x, *args, **kwargs)

    def on_exception(self, *rest: Any) -> None:
        self._patches.close()


def waits(folder: str, strategy: dict[str, Any], devices: int, precision: str) -> list[str]:
    note = Waits()
    made = trainer(
        folder,
        strategy=nemo2.MegatronStrategy(**strategy),
        devices=devices,
        callbacks=[note],
        precision=precision,
        log_every_n_steps=100,
        limit_val_batches=0,
    )
    made.fit(Logs(), data(4, 80), data(4, 16))
    return sorted(note.seen)


@pytest.mark.parametrize(
    ("mesh", "world", "precision"),
    [
        ({"dp": 2, "pipeline": TWO}, 2, "32-true"),
        ({"dp": 2, "pipeline": TWO}, 2, "bf16-true"),
        ({"dp": 2, "pp": 2, "pipeline": TWO}, 4, "bf16-mixed"),
        ({"tp": 2}, 2, "32-true"),
    ],
)
def test_no_step_waits_for_the_device(
    pool: Pool, tmp_path: Path, mesh: dict[str, Any], world: int, precision: str
) -> None:
    """What is read are sizes of objects sent through the host, who was told to end, step counts."""
    host = {
        "torch/distributed/distributed_c10d.py",
        "nemo2/lightning/preemption.py",
        "torch/optim/optimizer.py",
    }
    for seen in pool.run(world, waits, str(tmp_path), mesh, world, precision):
        assert set(seen) <= host, seen


# --- launching and failing


def script(
    folder: Path, *command: str, fail: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    environment |= {"FAIL": fail} if fail else {}
    program = ["-m", "tests.lightning_programs", str(folder), '{"pp": 2}', "2"]
    return subprocess.run(
        [sys.executable, *command, *program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        cwd=Path(__file__).parent.parent,
    )


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.parametrize("command", [(), TORCHRUN], ids=["trainer", "torchrun"])
def test_launched_as_a_script(
    tmp_path: Path, plain: dict[str, Any], command: tuple[str, ...]
) -> None:
    done = script(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    check([json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)], plain)


@pytest.mark.parametrize(
    ("fail", "command", "says"),
    [
        ("raise", (), "rank 1, step 3: RuntimeError: planted"),
        ("kill", (), "rank 1, step "),
        ("kill", TORCHRUN, "rank 1, step "),
    ],
)
def test_survivors_of_a_failed_rank_end_and_name_it(
    tmp_path: Path, fail: str, command: tuple[str, ...], says: str
) -> None:
    done = script(tmp_path, *command, fail=fail)
    assert done.returncode != 0
    assert says in done.stderr
    assert "(seen by rank 0 at step 3)" in done.stderr


# --- errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pipelines": 2}, "unknown option 'pipelines'"),
        ({"data_parallel": nemo2.DataParallel(reshard=2)}, "reshard=2.* is unknown"),
        ({"cp": 2, "context_parallel": "rings"}, "'rings' is unknown"),
        ({"inplace": True}, "takes no 'inplace'"),
        ({"precision": "bf16"}, "takes no 'precision'"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], says: str) -> None:
    with pytest.raises(nemo2.Nemo2Error, match=says):
        nemo2.MegatronStrategy(**options)


def test_sizes_are_checked_before_processes_start() -> None:
    with pytest.raises(nemo2.MeshError, match="does not fit world size 3"):
        trainer(".", strategy=nemo2.MegatronStrategy(pp=2, tp=2), devices=3)


def test_other_precisions_are_refused() -> None:
    with pytest.raises(nemo2.Nemo2Error, match="options: Trainer\\(precision='32-true'"):
        trainer(".", strategy=nemo2.MegatronStrategy(), precision="16-true")


class Low(Lit):
    """Notes the dtypes of weights and logits in a step, and of what the optimizer has."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, logits = self.loss(batch)
        assert logits.dtype == self.net.embed.weight.dtype == torch.bfloat16
        assert not torch.is_autocast_enabled("cpu")
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert {p.dtype for p in params} == {torch.float32}
        assert {p.grad.dtype for p in params} == {torch.float32}


@pytest.mark.parametrize("mesh", [{"pp": 2}, {"dp": 2}])
def test_bf16_mixed_keeps_masters(pool: Pool, tmp_path: Path, mesh: dict[str, Any]) -> None:
    """Training goes as in float32, as far as bfloat16 has digits."""
    options = {"pipeline": TWO, **mesh}
    how: dict[str, Any] = {"devices": 2, "batch": 4, "max_steps": 6, "val_check_interval": 3}
    full = pool.run(2, fit, tmp_path, options, precision="32-true", **how)[0]
    low = pool.run(2, fit, tmp_path, options, precision="bf16-mixed", build=Low, **how)[0]
    assert low["losses"] == pytest.approx(full["losses"], rel=0.02)
    assert low["losses"] != full["losses"]


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Silent(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


def refused(folder: str, build: type[L.LightningModule], **options: Any) -> str:
    with pytest.raises(nemo2.Nemo2Error) as caught:
        fit(folder, {"pp": 2}, build=build, devices=2, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("build", "options", "says"),
    [
        (Manual, {"gradient_clip_val": None}, "manual optimization"),
        (Silent, {}, "training_step returned no loss"),
        (Lit, {"ckpt_path": "missing.ckpt"}, "there is no folder 'missing.ckpt'"),
    ],
)
def test_what_cannot_run_is_refused_on_all_ranks(
    pool: Pool, tmp_path: Path, build: type[Lit], options: dict[str, Any], says: str
) -> None:
    for message in pool.run(2, refused, str(tmp_path), build, **options):
        assert says in message

"""One function for each feature of the Trainer: it runs on a mesh and without a strategy alike."""

from __future__ import annotations

import csv
import struct
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import grad_norm
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import nemo2
import nemo2.lightning
from tests.lightning_programs import VOCABULARY, Lit, Record, data, trainer

MESH = {"dp": 2, "pp": 2, "pipeline": nemo2.Pipeline(microbatches=2)}


@dataclass
class Run:
    """Where a feature runs: on ``MESH``, or on one device without a strategy."""

    folder: str
    on_mesh: bool

    @property
    def readers(self) -> int:
        return 2 if self.on_mesh else 1

    @property
    def reader(self) -> int:
        return torch.distributed.get_rank() % 2 if self.on_mesh else 0

    def trainer(self, **options: Any) -> L.Trainer:
        if self.on_mesh:
            options |= {"strategy": nemo2.MegatronStrategy(**MESH), "devices": 4}
        base = {"max_steps": 4, "val_check_interval": None, "num_sanity_val_steps": 0}
        return trainer(self.folder, **(base | options))

    def data(self, samples: int = 32) -> DataLoader[Any]:
        return data(8 // self.readers, samples)

    def fit(
        self,
        build: Callable[[], L.LightningModule] = Lit,
        train: Any = None,
        check: Any = None,
        callbacks: Any = (),
        **options: Any,
    ) -> dict[str, Any]:
        record = Record()
        made = self.trainer(callbacks=[record, *callbacks], **options)
        torch.manual_seed(1)
        module = build()
        made.fit(module, self.data() if train is None else train, check or self.data(16))
        metrics = {n: float(v) for n, v in made.callback_metrics.items()}
        return {"losses": record.losses, "metrics": metrics, "steps": made.global_step}


# --- what a step returns and logs


class SumAndCount(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, logits = self.loss(batch)
        self.log("loss", loss)
        count = logits.shape[0] * logits.shape[1]
        return (loss * count, count)


class Mean(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self.loss(batch)
        self.log("loss", loss)
        return loss


def sum_and_count(run: Run) -> Any:
    return run.fit(SumAndCount if run.on_mesh else Mean)


class Logs(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("synced", 3 * loss, on_epoch=True, sync_dist=True)
        self.log("quiet", loss, logger=False, prog_bar=True)
        self.log("largest", batch[1].max().float(), reduce_fx="max", on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("hook", 2 * float(outputs["loss"]))

    def on_validation_epoch_end(self) -> None:
        self.log("number", 7.0, sync_dist=True)


def self_log(run: Run) -> Any:
    bar: dict[str, float] = {}

    class Bar(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            bar.update({n: float(v) for n, v in trainer.progress_bar_metrics.items()})

    result = run.fit(Logs, callbacks=[Bar()])
    assert "quiet" in bar
    assert bar.keys().isdisjoint({"synced", "hook"})
    return result, bar


# --- options of the Trainer


def overfit_batches(run: Run) -> Any:
    return run.fit(overfit_batches=2, max_epochs=3, max_steps=6)


def limit_batches(run: Run) -> Any:
    result = run.fit(
        limit_train_batches=3, limit_val_batches=1, check_val_every_n_epoch=2, max_epochs=2
    )
    assert result["steps"] == 4
    return result


def fast_dev_run(run: Run) -> Any:
    result = run.fit(fast_dev_run=2)
    assert result["steps"] == 2
    return result


def detect_anomaly(run: Run) -> Any:
    return run.fit(detect_anomaly=True)


def test_and_predict(run: Run) -> Any:
    made = run.trainer(limit_test_batches=2, limit_predict_batches=1)
    torch.manual_seed(1)
    module = Lit()
    tested = made.test(module, run.data(), verbose=False)
    (own,) = made.predict(module, run.data())
    parts = {run.reader: own}
    if run.on_mesh:
        everyone: list[Any] = [None] * 4
        torch.distributed.all_gather_object(everyone, (run.reader, own))
        parts = dict(everyone)
    whole = torch.stack([parts[i] for i in sorted(parts)], 1).flatten(0, 1)
    return tested, whole.double().mean(dim=(1, 2)).tolist()


def clip_by_norm(run: Run) -> Any:
    return run.fit(gradient_clip_val=0.05, gradient_clip_algorithm="norm", inference_mode=False)


def precision_32(run: Run) -> Any:
    return run.fit(precision="32-true")


def precision_bf16(run: Run) -> Any:
    return run.fit(precision="bf16-true")


def several_validation_loaders(run: Run) -> Any:
    class Two(Lit):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.loss(batch)[0])

    result = run.fit(Two, check=[run.data(16), run.data(24)])
    assert {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"} <= set(result["metrics"])
    return result


# --- learning-rate schedulers


class Plateau(Lit):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-6)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=0, threshold=10.0
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"},
        }


class Rates(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def reduce_on_plateau(run: Run) -> Any:
    rates = Rates()
    result = run.fit(Plateau, callbacks=[rates], max_epochs=4, max_steps=16)
    assert rates.seen[-1] < rates.seen[0]
    return result, rates.seen


class ByEpoch(Lit):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def scheduler_by_epoch(run: Run) -> Any:
    rates = Rates()
    result = run.fit(ByEpoch, callbacks=[rates], max_epochs=2, max_steps=8)
    assert rates.seen[0] == 4 * rates.seen[-1]  # stepped at the end of both epochs
    return result, rates.seen


# --- callbacks and loggers


def early_stopping(run: Run) -> Any:
    stop = lightning_callbacks.EarlyStopping("val_loss", min_delta=10.0, patience=1)
    result = run.fit(callbacks=[stop], max_epochs=5, max_steps=-1)
    assert result["steps"] == 8
    return result, stop.stopped_epoch, float(stop.best_score)


def model_checkpoint(run: Run) -> Any:
    keep = lightning_callbacks.ModelCheckpoint(
        run.folder, monitor="val_loss", save_top_k=1, save_last=True, filename="{step}"
    )
    result = run.fit(callbacks=[keep], max_epochs=3, max_steps=12, enable_checkpointing=True)
    assert Path(keep.best_model_path).exists()
    assert Path(keep.last_model_path).exists()
    return result, Path(keep.best_model_path).stem, float(keep.best_model_score)


def learning_rate_monitor(run: Run) -> Any:
    logger = CSVLogger(run.folder, name="", version="log")
    run.fit(callbacks=[lightning_callbacks.LearningRateMonitor("step")], logger=logger)
    return _csv(Path(run.folder, "log", "metrics.csv"), "lr-AdamW")


def csv_logger(run: Run) -> Any:
    logger = CSVLogger(run.folder, name="", version="log")
    run.fit(logger=logger)
    path = Path(run.folder, "log", "metrics.csv")
    return _csv(path, "loss_step"), _csv(path, "val_loss")


def _csv(path: Path, column: str) -> list[float]:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    with path.open() as file:
        found = [float(row[column]) for row in csv.DictReader(file) if row[column]]
    assert found
    return found


def tensorboard(run: Run) -> Any:
    logger = TensorBoardLogger(run.folder, name="", version="board")
    run.fit(logger=logger)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    found: dict[str, list[float]] = {}
    for file in Path(run.folder, "board").glob("events.*"):
        for event in _events(file):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(value.simple_value)
    return [found[name] for name in ("loss_step", "val_loss", "epoch")]


def _events(file: Path) -> Iterator[Any]:
    """Read the records of a file of events: length, checksum, record, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, at = file.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size


class Memory(Logger):
    """A logger of the user."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.kept.append((int(step or 0), dict(metrics)))

    def log_hyperparams(self, *rest: Any, **options: Any) -> None:
        pass


def any_logger(run: Run) -> Any:
    one, two = Memory(), Memory()
    run.fit(logger=[one, two])
    assert one.kept == two.kept
    assert one.kept
    return one.kept


def progress_bars(run: Run) -> Any:
    rich, plain = lightning_callbacks.RichProgressBar(), lightning_callbacks.TQDMProgressBar()
    made = [run.fit(callbacks=[bar], enable_progress_bar=True) for bar in (rich, plain)]
    shown: list[Any] = [None]
    if not run.on_mesh or torch.distributed.get_rank() == 0:
        text = rich._metric_component.render(rich.progress.tasks[0]).plain
        shown = [(text.split(), plain.train_progress_bar.postfix)]
        assert "loss_step" in text
        assert "loss_step=" in shown[0][1]
    if run.on_mesh:
        torch.distributed.broadcast_object_list(shown)
    return made, shown


def summaries(run: Run) -> Any:
    """They count the parameters of the whole model, not of a stage."""
    read: list[Any] = []

    def note(data: Any, total: int, trainable: int, *rest: Any, **more: Any) -> None:
        read.append((data, total, trainable))

    for kind in (lightning_callbacks.ModelSummary, lightning_callbacks.RichModelSummary):
        with mock.patch.object(kind, "summarize", staticmethod(note)):
            run.fit(callbacks=[kind(max_depth=2)], enable_model_summary=True)
    assert run.on_mesh or len(read) == 2
    if run.on_mesh:
        box = [read]
        torch.distributed.broadcast_object_list(box)
        read = box[0]
    return read


def device_stats(run: Run) -> Any:
    monitor, logger = lightning_callbacks.DeviceStatsMonitor(), Memory()
    stats = mock.Mock(return_value={"busy": 7.0})  # what a machine measures differs
    where = "lightning.pytorch.accelerators"
    with (
        mock.patch(f"{where}.CPUAccelerator.get_device_stats", stats),
        mock.patch(f"{where}.CUDAAccelerator.get_device_stats", stats),
        mock.patch("lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", new=True),
    ):
        result = run.fit(callbacks=[monitor], logger=logger, log_every_n_steps=1)
    seen = [step for step, values in logger.kept if 7.0 in values.values()]
    assert seen
    return result, seen


def timer(run: Run) -> Any:
    result = run.fit(max_time={"microseconds": 1})
    assert result["steps"] == 1
    return run.fit(max_time="00:01:00:00"), result


def accumulation_scheduler(run: Run) -> Any:
    schedule = lightning_callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    result = run.fit(callbacks=[schedule], max_epochs=2, max_steps=-1)
    assert result["steps"] == 4 + 2
    return result


class Average(L.Callback):
    """An exponential moving average of the weights, of the shards that a rank has."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.kept = {n: p.detach().clone() for n, p in module.named_parameters()}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
        for name, p in module.named_parameters():
            self.kept[name].lerp_(p.detach(), 0.5)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(self.kept[name])


def moving_average(run: Run) -> Any:
    made = run.trainer(callbacks=[Average()])
    torch.manual_seed(1)
    module = Lit()
    made.fit(module, run.data(), run.data(16))
    return made.validate(module, run.data(16), verbose=False)


class Meter:
    """Counts, as users' own classes do."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1


class Reader:
    """Is written to by another thread, too: nobody but its owner puts back what it holds."""

    def __init__(self) -> None:
        self.lock, self.taken = threading.Lock(), 0

    def read(self) -> None:
        with self.lock:
            self.taken += 1


class Keeps(Lit):
    """Keeps in its attributes what its steps make, before and after the model is called."""

    def __init__(self) -> None:
        super().__init__()
        self.losses, self.outputs, self.by_batch, self.met = [], [], {}, 0
        self.given: list[float] = []
        self.ordered, self.recent = OrderedDict(a=1), deque(maxlen=3)
        self.nested, self._hidden, self.meter = {"all": [[]]}, [], Meter()
        self.array, self.indices = np.zeros(2), set()
        self.reader = Reader()
        self.register_buffer("running", torch.zeros((), dtype=torch.float64))
        self.counted = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.met += 1
        self.reader.read()
        loss, _ = self.loss(batch)
        self.losses.append(loss.detach())
        self.after, self.last = self.met, loss.detach()
        self.recent.append(loss.item())
        self.nested["all"][0].append(loss.detach())
        self._hidden.append(batch_idx)
        self.meter.update(loss.item())
        self.indices.add(batch_idx)
        self.array[:] = batch_idx
        self.counted.add_(1)
        self.running = self.running + loss.detach()
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        assert self.after == self.met
        assert self.met % len(self.losses) == 0
        assert self.losses[-1].equal(self.last)
        count = len(self.losses)
        assert self.reader.taken >= self.met
        assert len(self.nested["all"][0]) == len(self._hidden) == self.meter.count == self.met
        assert self.counted == self.met
        assert self.indices == set(range(4))
        assert list(self.array) == [3, 3]
        assert list(self.recent) == [x.item() for x in self.losses[-3:]]
        total = torch.stack(self.nested["all"][0]).sum().item()
        assert self.meter.total == pytest.approx(total)
        assert self.running.item() == pytest.approx(total)
        assert self.met == count * (self.current_epoch + 1)
        kept = self.all_gather(torch.stack(self.losses).mean()).mean()
        self.log("mean", kept, sync_dist=True)
        self.losses.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, logits = self.loss(batch)
        self.outputs.append({"loss": loss, "largest": float(logits.max())})
        self.by_batch[batch_idx] = loss
        self.log("val_loss", loss)
        return loss

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.given.append(float(outputs))

    def on_validation_epoch_end(self) -> None:
        assert list(self.by_batch) == [0, 1]
        kept = torch.stack([x["loss"] for x in self.outputs]).mean()
        given = torch.tensor(self.given, dtype=kept.dtype).mean()
        assert given.item() == pytest.approx(kept.item())
        self.log("kept", kept, sync_dist=True)
        largest = max(x["largest"] for x in self.outputs)
        self.log("largest", self.all_gather(torch.tensor(largest)).max(), sync_dist=True)
        self.outputs.clear()
        self.given.clear()


def kept_in_attributes(run: Run) -> Any:
    return run.fit(Keeps, max_epochs=2, max_steps=8)


class KeepsMuch(Lit):
    """Keeps what is too large to bring to other stages, and what cannot be sent."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self.loss(batch)
        self.large, self.small = torch.zeros(1 << 18), loss.detach()
        self.function = lambda: loss
        self.log("loss", loss)
        return loss


def too_much(folder: str) -> tuple[list[str], bool, bool]:
    run = Run(folder, True)
    made = run.trainer(max_steps=2)
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(module := KeepsMuch(), run.data(), run.data(16))
    said = [str(w.message) for w in caught if "stays on the last stage" in str(w.message)]
    return said, hasattr(module, "small"), hasattr(module, "large")


def interleaved(folder: str) -> Any:
    """Return what ``Keeps`` keeps where a rank has two chunks of the model."""
    pipeline = nemo2.Pipeline(microbatches=2, virtual_stages=2, schedule="interleaved")
    strategy = nemo2.MegatronStrategy(pp=2, pipeline=pipeline)
    options = {"val_check_interval": None, "num_sanity_val_steps": 0, "max_steps": 4}
    made = trainer(folder, strategy=strategy, devices=2, **options)
    torch.manual_seed(1)
    made.fit(module := Keeps(), data(8, 32), data(8, 16))
    return module.met, module.meter.total, list(module.recent)


class Norms(Lit):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        on_mesh = self.trainer.world_size > 1
        self.log_dict((nemo2.lightning.grad_norm if on_mesh else grad_norm)(self, 2))


def gradient_norms(run: Run) -> Any:
    result = run.fit(Norms)
    assert "grad_2.0_norm_total" in result["metrics"]
    assert "grad_2.0_norm/net.layers.3.up.bias" in result["metrics"]
    return result


class Gathers(Lit):
    """Gathers over the replicas in its steps, with and without gradients, and in its hooks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, logits = self.loss(batch)
        self.log("loss", loss)
        self.log("squares", self.all_gather(logits.detach()).square().mean())
        self.log("largest", self.all_gather(batch[0].max().float()).max())
        return loss + 0.1 * self.all_gather(logits, sync_grads=True).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.all_gather(self.loss(batch)[0]).mean())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        mine = torch.tensor(float(self.trainer.strategy.global_rank % 2))
        self.readers = sorted(self.all_gather(mine).reshape(-1).tolist())

    def on_train_epoch_end(self) -> None:
        assert self.readers == [0.0, 1.0][: len(self.readers)]


def all_gather(run: Run) -> Any:
    return run.fit(Gathers)


class Recording(Memory):
    """A logger with an experiment, as TensorBoard's."""

    def __init__(self) -> None:
        super().__init__()
        self.made = mock.Mock()

    save_dir = "here"

    @property
    def experiment(self) -> Any:
        return self.made


class LogsItself(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert isinstance(self.logger, Recording)
        assert self.logger.save_dir == "here"
        self.logger.experiment.add_scalar("mine", float(batch[0].max()), self.global_step)
        loss, _ = self.loss(batch)
        self.log("loss", loss)
        return loss


def logger_in_a_step(run: Run) -> Any:
    """What a step tells a logger itself is told when it runs, not when it is planned."""
    logger = Recording()
    result = run.fit(LogsItself, logger=logger)
    each = 2 if run.on_mesh else 1  # microbatches
    steps = [call.args[2] for call in logger.made.add_scalar.call_args_list]
    assert steps == [step for step in range(4) for _ in range(each)]
    return result


# --- data


class Numbers(IterableDataset[Any]):
    """A stream that is read in turns by ``readers``, each of which drops what others take."""

    def __init__(self, reader: int, readers: int, samples: int) -> None:
        self.reader, self.readers, self.samples = reader, readers, samples

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(4)
        for i in range(self.samples):
            ids = torch.randint(VOCABULARY, (7,), generator=generator)
            if i % self.readers == self.reader:
                yield ids[:-1], ids[1:]


def iterable_dataset(run: Run) -> Any:
    stream = Numbers(run.reader, run.readers, 32)
    return run.fit(train=DataLoader(stream, batch_size=8 // run.readers))


def _samples(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(VOCABULARY, (count, 7), generator=generator)
    return TensorDataset(ids[:, :-1], ids[:, 1:])


def samplers(run: Run) -> Any:
    generator = torch.Generator().manual_seed(2)
    weighted = WeightedRandomSampler(range(1, 41), 32, generator=generator)
    size = 8 // run.readers
    return run.fit(train=DataLoader(_samples(40), size, sampler=weighted))


def batch_sampler(run: Run) -> Any:
    order = RandomSampler(_samples(40), generator=torch.Generator().manual_seed(2))
    batches = BatchSampler(order, 8 // run.readers, drop_last=True)
    return run.fit(train=DataLoader(_samples(40), batch_sampler=batches))


def last_incomplete_batch(run: Run) -> Any:
    result = run.fit(train=run.data(20), check=run.data(12))
    assert result["steps"] == 3
    return result


def map_dataset_subset(run: Run) -> Any:
    return run.fit(train=DataLoader(Subset(_samples(40), range(3, 35)), 8 // run.readers))


FEATURES: dict[str, Callable[[Run], Any]] = {
    f.__name__: f
    for f in (
        sum_and_count,
        self_log,
        overfit_batches,
        limit_batches,
        fast_dev_run,
        detect_anomaly,
        test_and_predict,
        clip_by_norm,
        precision_32,
        precision_bf16,
        several_validation_loaders,
        reduce_on_plateau,
        scheduler_by_epoch,
        early_stopping,
        model_checkpoint,
        learning_rate_monitor,
        csv_logger,
        tensorboard,
        any_logger,
        progress_bars,
        summaries,
        device_stats,
        timer,
        accumulation_scheduler,
        moving_average,
        kept_in_attributes,
        gradient_norms,
        all_gather,
        logger_in_a_step,
        iterable_dataset,
        samplers,
        batch_sampler,
        last_incomplete_batch,
        map_dataset_subset,
    )
}


# --- what is refused


class TwoOptimizers(Lit):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in list(self.parameters())[:2]]


class Reads(Lit):
    """Takes its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)[0]


class AsksRankZero(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self.loss(batch)
        assert self.trainer.log_dir is not None
        return loss


class NoNumber(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (0 * self.loss(batch)[0]).sqrt()


class Changed(TensorDataset):
    """Samples are changed at random, by a generator that no one has seeded alike."""

    def __getitem__(self, index: int) -> Any:
        ids, labels = super().__getitem__(index)
        by_rank = torch.Generator().manual_seed(index + torch.distributed.get_rank())
        return torch.randint_like(ids, VOCABULARY, generator=by_rank), labels


class Ragged(Numbers):
    """Readers have different numbers of samples."""

    def __iter__(self) -> Iterator[Any]:
        for i, sample in enumerate(super().__iter__()):
            if i < 12 or self.reader == 0:
                yield sample


class Broken(Numbers):
    """One reader fails."""

    def __iter__(self) -> Iterator[Any]:
        for i, sample in enumerate(super().__iter__()):
            if i == 8 and self.reader == 1:
                raise RuntimeError("planted")
            yield sample


class Bucketed:
    """A batch sampler that draws samples itself."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1, 2, 3], [4, 5, 6, 7]])

    def __len__(self) -> int:
        return 2


def stream(run: Run, kind: type[Numbers]) -> DataLoader[Any]:
    return DataLoader(kind(run.reader, run.readers, 32), batch_size=4)


def several_optimizers(run: Run) -> Any:
    return run.fit(TwoOptimizers)


def second_trainer(run: Run) -> Any:
    module = Lit()
    run.trainer().fit(module, run.data(), run.data(16))
    return run.trainer().fit(module, run.data(), run.data(16))


class Unfreezes(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net.layers.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net.layers.requires_grad_(True)


def unfreezing(run: Run) -> Any:
    return run.fit(Unfreezes, max_epochs=2, max_steps=8)


def finetuning(run: Run) -> Any:
    return run.fit(callbacks=[lightning_callbacks.BackboneFinetuning()])


class Generates(Lit):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        nemo2.generate(self.net, [[1, 2]], max_new_tokens=2)


def generates_in_a_step(run: Run) -> Any:
    return run.trainer().validate(Generates(), run.data(16))


def weight_averaging(run: Run) -> Any:
    return run.fit(callbacks=[lightning_callbacks.WeightAveraging()])


def stochastic_weight_averaging(run: Run) -> Any:
    return run.fit(callbacks=[lightning_callbacks.StochasticWeightAveraging(1e-2)])


def reads_itself(run: Run) -> Any:
    warnings.filterwarnings("ignore", message=".*dataloader_iter")
    return run.fit(Reads)


def asks_rank_zero(run: Run) -> Any:
    return run.fit(AsksRankZero)


def samples_by_rank(run: Run) -> Any:
    order = DistributedSampler(_samples(40), shuffle=False)
    return run.fit(train=DataLoader(_samples(40), 4, sampler=order))


def stream_by_rank(run: Run) -> Any:
    mine = Numbers(torch.distributed.get_rank(), torch.distributed.get_world_size(), 40)
    return run.fit(train=DataLoader(mine, 4))


def samples_changed_apart(run: Run) -> Any:
    return run.fit(train=DataLoader(Changed(*_samples(40).tensors), 4))


def uneven_batches(run: Run) -> Any:
    return run.fit(train=stream(run, Ragged))


def failing_dataset(run: Run) -> Any:
    return run.fit(train=stream(run, Broken))


def own_batch_sampler(run: Run) -> Any:
    return run.fit(train=DataLoader(_samples(40), batch_sampler=Bucketed()))


def indivisible_batch(run: Run) -> Any:
    return run.fit(train=run.data(18))


_DIFFERENT = "the ranks of dp coordinate 0, 1 were given different batches"
REFUSED: dict[Callable[[Run], Any], str] = {
    several_optimizers: r"several optimizers do not work(.|\n)*one optimizer with parameter groups",
    second_trainer: "Lit has been split by another strategy(.|\n)*use the same Trainer again",
    unfreezing: "were frozen when the model was split, and are trained now",
    finetuning: "BackboneFinetuning does not work with MegatronStrategy",
    generates_in_a_step: r"generate is called inside of a step(.|\n)*options: between steps",
    weight_averaging: "WeightAveraging does not work with MegatronStrategy",
    stochastic_weight_averaging: "StochasticWeightAveraging does not work with",
    reads_itself: r"training_step\(self, dataloader_iter\) does not work",
    asks_rank_zero: r"trainer\.strategy\.broadcast \(of which trainer\.log_dir makes use\)",
    samples_by_rank: _DIFFERENT,
    stream_by_rank: _DIFFERENT,
    samples_changed_apart: _DIFFERENT,
    uneven_batches: r"after 3 the data of some has ended(.|\n)*limit_train_batches=3",
    failing_dataset: "planted|batch 2 could not be read on another rank",
    own_batch_sampler: r"DataLoader\(batch_sampler=Bucketed\)",
    indivisible_batch: "cannot split a batch of 1 samples over microbatches=2",
}
FEATURES_REFUSED = {f.__name__: (f, says) for f, says in REFUSED.items()}


def refusal(name: str, folder: str) -> str:
    """Return the message with which a run ends on this rank."""
    try:
        FEATURES_REFUSED[name][0](Run(folder, True))
    except Exception as error:
        return str(error)
    raise AssertionError("nothing was refused")


def on_meta(folder: str, world: int) -> Any:
    """Train a module whose weights are on meta until it is split."""

    class Meta(Lit):
        def configure_model(self) -> None:
            if self.net is None:
                with torch.device("meta"):
                    super().configure_model()

    strategy = nemo2.MegatronStrategy(**(MESH if world > 1 else {}))
    record = Record()
    options = {"strategy": strategy, "devices": world, "val_check_interval": None}
    made = trainer(folder, callbacks=[record], max_steps=3, **options)
    batch = 8 // (2 if world > 1 else 1)
    made.fit(Meta(late=True), data(batch, 24), data(batch, 16))
    return record.losses


def feature(name: str, folder: str, on_mesh: bool) -> Any:
    """Return what a feature's run shows on this rank."""
    return FEATURES[name](Run(folder, on_mesh))

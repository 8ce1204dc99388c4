"""Models and Trainer runs for ``test_lightning``."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nemo2
from nemo2 import shard

WIDTH, VOCABULARY, LENGTH = 16, 24, 6


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        shard(self.up.weight, "tp", dim=0)
        shard(self.up.bias, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Tied embedding and head, split over ``tp`` along the vocabulary."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        shard(self.embed.weight, "tp", dim=0)
        shard(self.layers, "pp")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Lit(L.LightningModule):
    """A LightningModule that knows nothing of meshes."""

    def __init__(self, dropout: float = 0.0, late: bool = False) -> None:
        super().__init__()
        self.dropout, self.net, self.calls = dropout, None, 0
        if not late:
            self.net = Net(dropout)

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(5)
            self.net = Net(self.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        ids, labels = batch
        logits = self(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss, logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss, _ = self.loss(batch)
        self.calls += 1
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log_dict({"double": 2 * loss.item(), "index": float(batch_idx)})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self.loss(batch)
        self.log("val_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch)[0])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-6)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + 0.1 * n))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Record(L.Callback):
    """Keeps the losses that the Trainer logs, step by step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        metrics = {n: float(v) for n, v in trainer.callback_metrics.items()}
        self.losses.append(metrics["loss_step"] if "loss_step" in metrics else metrics["loss"])
        self.seen.append(metrics)


class RecordSamples(Record):
    """Keeps the samples of each of this rank's batches, too."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[list[int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, at: int) -> None:
        powers = VOCABULARY ** torch.arange(LENGTH, device=batch[0].device)
        self.samples.append((batch[0] * powers).sum(1).tolist())


def data(batch: int, samples: int, shuffle: bool = False, workers: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (samples, LENGTH + 1), generator=generator)
    pairs = TensorDataset(ids[:, :-1], ids[:, 1:])
    reading = {"num_workers": workers, "persistent_workers": workers > 0}
    return DataLoader(pairs, batch_size=batch, shuffle=shuffle, **reading)


def trainer(folder: str | Path, **options: Any) -> L.Trainer:
    ignore_upstream_warnings()
    base: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "64-true",
        "max_steps": 10,
        "max_epochs": 1,
        "val_check_interval": 5,
        "num_sanity_val_steps": 1,
        "gradient_clip_val": 0.5,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": str(folder),
    }
    return L.Trainer(**(base | options))


def ignore_upstream_warnings() -> None:
    # lightning 2.6 under torch 2.12 and later, and its advice on numbers of workers.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="The dirpath has changed")
    warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)


def fit(
    folder: str | Path,
    strategy: dict[str, Any] | None,
    *,
    batch: int = 8,
    samples: int = 80,
    build: Callable[[], L.LightningModule] = Lit,
    ckpt_path: str | None = None,
    shuffle: bool = False,
    workers: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Train; return what the Trainer saw on this rank."""
    torch.manual_seed(1)
    if strategy is not None:
        options |= {"strategy": nemo2.MegatronStrategy(**strategy)}
    record = RecordSamples()
    made = trainer(folder, callbacks=[record, *options.pop("callbacks", [])], **options)
    torch.manual_seed(1)
    module = build()
    loader = data(batch, samples, shuffle, workers)
    made.fit(module, loader, data(batch, 16), ckpt_path=ckpt_path)
    fitted = {n: float(v) for n, v in made.callback_metrics.items()}
    (validated,) = made.validate(module, data(batch, 16), verbose=False)
    checkpoint = made.checkpoint_callback
    return {
        "checkpoint": getattr(checkpoint, "best_model_path", None),
        "names": sorted(n for n, _ in module.named_parameters()),
        "losses": record.losses,
        "seen": record.seen,
        "samples": record.samples,
        "fitted": fitted,
        "logged": {n: float(v) for n, v in made.logged_metrics.items()},
        "validated": validated,
        "calls": getattr(module, "calls", None),
    }


class Fails(Lit):
    """Fails on rank 1 at step 3, as told by the environment variable FAIL."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and self.global_step == 3:
            if os.environ["FAIL"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("planted")
        return super().training_step(batch, batch_idx)


def main(folder: str, mesh: str, devices: str) -> None:
    """Train as a script, with the processes that a launcher or the Trainer starts."""
    torch.set_num_threads(1)
    build = Fails if "FAIL" in os.environ else Lit
    strategy = json.loads(mesh) | {"pipeline": nemo2.Pipeline(microbatches=2)}
    result = fit(folder, strategy, build=build, devices=int(devices))
    rank = torch.distributed.get_rank()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

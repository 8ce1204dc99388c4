"""The GPT as a LightningModule, and text as its data; neither is written for several devices."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from gpt import GPT, GPTConfig
from text import Windows, default_files, read_bytes
from torch import Tensor
from torch.utils.data import DataLoader


class LitGPT(L.LightningModule):
    """Predicts the next byte.

    Args:
        cfg: the sizes of the model.
        steps: optimizer steps of the learning-rate schedule.
        lr: its highest learning rate.
    """

    def __init__(self, cfg: GPTConfig, steps: int = 300, lr: float = 3e-3) -> None:
        super().__init__()
        self.model, self.steps, self.lr, self.curve = GPT(cfg), steps, lr, []

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def loss(self, window: Tensor) -> Tensor:
        logits = self(window[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())

    def training_step(self, window: Tensor, index: int) -> Tensor:
        loss = self.loss(window)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, window: Tensor, index: int) -> None:
        self.log("held-out", self.loss(window))

    test_step = validation_step

    def predict_step(self, window: Tensor, index: int) -> Tensor:
        return self(window[:, :-1])

    def on_train_batch_end(self, outputs: dict[str, Tensor], window: Tensor, index: int) -> None:
        self.curve.append(float(outputs["loss"]))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), fused=True)
        warmup = max(self.steps // 20, 1)

        def scale(i: int) -> float:
            return min((i + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * min(i / self.steps, 1)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def predicted(window: Tensor) -> int:
    """Return the number of bytes that windows predict."""
    return window.numel() - len(window)


class TextData(L.LightningDataModule):
    """Windows of the bytes of text files; a 20th of the text is held out.

    Args:
        files: text files; None: the source of Python's standard library.
        length: bytes that a window predicts.
        steps: batches of an epoch.
        batch: windows in the global batch.
        held_out: windows to validate on.
    """

    def __init__(
        self,
        files: list[Path] | None = None,
        length: int = 128,
        steps: int = 300,
        batch: int = 32,
        held_out: int = 128,
    ) -> None:
        super().__init__()
        self.length, self.steps, self.batch, self.held_out = length, steps, batch, held_out
        self.text, self.held_out_text = read_bytes(files or default_files())

    def loader(self, text: Tensor, windows: int, batch: int, seed: int) -> DataLoader[Tensor]:
        readers = self.trainer.distributed_sampler_kwargs["num_replicas"] if self.trainer else 1
        return DataLoader(Windows(text, self.length, windows, seed), batch // readers)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return self.loader(self.text, self.steps * self.batch, self.batch, seed=0)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self.loader(self.held_out_text, self.held_out, min(self.held_out, 32), seed=1)

    test_dataloader = predict_dataloader = val_dataloader

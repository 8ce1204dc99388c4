"""Train a byte-level GPT on real text, on any mesh: ``train_gpt.py --mesh dp=2,pp=2``.

By default the text is the source of Python's own standard library. Without GPUs the ranks are
CPU processes. The model (gpt.py) and the LightningModule know nothing of the mesh.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from gpt import GPT, GPTConfig
from text import Windows, default_files, read_bytes, save_curve
from torch import Tensor
from torch.utils.data import DataLoader

import nemo2


class LitGPT(L.LightningModule):
    def __init__(self, cfg: GPTConfig, steps: int, lr: float = 3e-3) -> None:
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

    def on_train_batch_start(self, window: Tensor, index: int) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, outputs: dict[str, Tensor], window: Tensor, index: int) -> None:
        ranks = self.trainer.strategy.mesh["dp"].size()
        tokens = ranks * (window.numel() - len(window))
        self.log("tokens/s", tokens / (time.perf_counter() - self.started), prog_bar=True)
        self.curve.append(float(outputs["loss"]))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), fused=True)
        warmup = max(self.steps // 20, 1)

        def scale(i: int) -> float:
            return min((i + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * min(i / self.steps, 1)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


PROMPT = "def "


def show(prompt: int, byte: int) -> None:
    print(chr(byte), end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    gpus = torch.cuda.device_count()
    default = {1: "tp=1", 2: "tp=2", 3: "tp=2"}.get(gpus, "pp=2,tp=2")
    parser.add_argument("--mesh", default=default, help="for example dp=2,pp=2")
    parser.add_argument("--data", nargs="*", type=Path, default=None, help="text files")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="windows in the global batch")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=2 if gpus else 1)
    parser.add_argument("--generate", type=int, default=120, help="bytes to generate at the end")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the loss curve")
    args = parser.parse_args()

    warnings.filterwarnings("ignore", message=".*LeafSpec")  # lightning 2.6 under torch 2.13
    L.seed_everything(0, verbose=False)
    cfg, sizes = GPTConfig(layers=args.layers), nemo2.mesh.MeshSizes.of(args.mesh)
    train, held_out = read_bytes(args.data or default_files())
    lit = LitGPT(cfg, args.steps)
    axes = dict(sizes.items())
    pipeline = nemo2.Pipeline(microbatches=args.microbatches)
    strategy = nemo2.MegatronStrategy(**axes, pipeline=pipeline)
    trainer = L.Trainer(
        strategy=strategy,
        devices=sizes.world,
        accelerator="gpu" if gpus >= sizes.world else "cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Windows(train, cfg.length, args.steps * args.batch), args.batch // sizes.dp)
    if trainer.is_global_zero:
        window = next(iter(loader))
        print(nemo2.plan(lit, axes, step=LitGPT.loss, batch=window, pipeline=pipeline), flush=True)
    check = DataLoader(Windows(held_out, cfg.length, 128, seed=1), 32 // sizes.dp)
    trainer.fit(lit, loader, check)
    reached = float(trainer.callback_metrics["held-out"])
    if trainer.is_global_zero:
        curve = save_curve(lit.curve, reached, args.out / "loss.png")
        print(f"held-out: {reached:.3f} nats per byte; loss curve: {curve}")
        print("generated on the same mesh:\n" + PROMPT, end="", flush=True)
    prompt, how = list(PROMPT.encode()), {"max_new_tokens": args.generate, "temperature": 0.7}
    nemo2.generate(lit.model, [prompt], stream=show if trainer.is_global_zero else None, **how)
    if trainer.is_global_zero:
        print()


if __name__ == "__main__":
    main()

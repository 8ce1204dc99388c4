"""Train a byte-level GPT on real text, on any mesh: ``train_gpt.py --mesh dp=2,pp=2``.

By default the text is the source of Python's own standard library. Without GPUs the ranks are
CPU processes. The model (gpt.py) and the LightningModule (lit_gpt.py) know nothing of the mesh.
``train_gpt.py fit --config examples/mesh.yaml`` is the same from YAML (train_gpt_cli.py).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from gpt import GPTConfig
from lit_gpt import LitGPT, TextData, predicted
from text import save_curve

import nemo2
from nemo2.lightning import Throughput

SUBCOMMANDS = ("fit", "validate", "test", "predict")
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

    L.seed_everything(0, verbose=False)
    cfg, sizes = GPTConfig(layers=args.layers), nemo2.mesh.MeshSizes.of(args.mesh)
    data = TextData(args.data, cfg.length, args.steps, args.batch)
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
        callbacks=[Throughput(tokens=predicted)],
    )
    if trainer.is_global_zero:
        window = next(iter(data.train_dataloader()))[: args.batch // sizes.dp]
        print(nemo2.plan(lit, axes, step=LitGPT.loss, batch=window, pipeline=pipeline), flush=True)
    trainer.fit(lit, data)
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
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # lightning 2.6 under torch 2.13
    if sys.argv[1:2] and sys.argv[1] in SUBCOMMANDS:
        from train_gpt_cli import main
    main()

"""Fine-tune a causal language model of transformers on a text file, on any mesh.

``finetune_hf.py --model FOLDER --text FILE --mesh pp=2,tp=2 --save TUNED``: transformers then opens
``TUNED``, which has the curve in ``log``. Without a tokenizer in ``FOLDER`` it trains on bytes.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from text import Windows
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

import nemo2


class FineTune(L.LightningModule):
    def __init__(self, folder: Path, lr: float, warmup: int) -> None:
        super().__init__()
        self.folder, self.lr, self.warmup, self.model = folder, lr, warmup, None

    def configure_model(self) -> None:
        if self.model is None:
            config = AutoConfig.from_pretrained(self.folder)
            with self.trainer.init_module(empty_init=True):  # shapes: no rank holds all of it
                self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if (self.folder / "generation_config.json").is_file():
                self.model.generation_config = GenerationConfig.from_pretrained(self.folder)
            nemo2.annotate(self.model)  # what is sharded is derived

    def on_fit_start(self) -> None:
        # By now the model is on the mesh: each rank reads the bytes of its own shards.
        nemo2.load(self.folder, self.model)

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), fused=True)
        schedule = LambdaLR(optimizer, lambda i: min((i + 1) / self.warmup, 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the folder's tokenizer, or None when it has none."""
    files = [*folder.glob("tokenizer*"), *folder.glob("vocab*")]
    return AutoTokenizer.from_pretrained(folder) if files else None


def tokens_of(file: Path, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> Tensor:
    """Return the text as token ids; without a tokenizer its bytes, within the vocabulary."""
    if tokenizer is not None:
        return torch.tensor(tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    vocabulary = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    return torch.tensor(list(file.read_bytes())) % vocabulary


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--save", type=Path, required=True, help="folder of the tuned model")
    parser.add_argument("--mesh", default="tp=1", help="for example dp=2,pp=2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="windows in the global batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--microbatches", type=int, default=1, help="parts of each rank's batch")
    modes = ("32-true", "64-true", "bf16-true", "bf16-mixed")
    parser.add_argument("--precision", choices=modes, default="bf16-mixed")
    parser.add_argument("--remat", choices=("selective", "full"), help="recompute in backward")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> L.Trainer:
    args = arguments(given)
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # lightning 2.6 under torch 2.13
    L.seed_everything(0, verbose=False)
    sizes, gpus = nemo2.mesh.MeshSizes.of(args.mesh), torch.cuda.device_count()
    if args.batch % sizes.dp:
        raise SystemExit(f"--batch {args.batch} does not divide by dp={sizes.dp}")
    tokenizer = tokenizer_of(args.model)
    tokens = tokens_of(args.text, tokenizer, args.model)
    if len(tokens) <= args.length:
        raise SystemExit(f"{args.text} has {len(tokens)} tokens: not enough for --length")
    pipeline = nemo2.Pipeline(microbatches=args.microbatches)
    trainer = L.Trainer(
        strategy=nemo2.MegatronStrategy(**dict(sizes.items()), pipeline=pipeline, remat=args.remat),
        devices=sizes.world,
        accelerator="gpu" if gpus >= sizes.world else "cpu",
        precision=args.precision,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=CSVLogger(args.save, name="", version="log"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    windows = Windows(tokens, args.length - 1, args.steps * args.batch)
    tuned = FineTune(args.model, args.lr, warmup=max(args.steps // 20, 1))
    trainer.fit(tuned, DataLoader(windows, args.batch // sizes.dp))
    nemo2.save(args.save, tuned.model, format="safetensors")
    if trainer.is_global_zero:
        if tokenizer is not None:
            tokenizer.save_pretrained(args.save)
        loss = float(trainer.callback_metrics["loss"])
        print(f"loss at the end: {loss:.3f} nats per token; saved: {args.save}")
    return trainer


if __name__ == "__main__":
    main()

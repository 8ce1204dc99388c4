"""A training that is killed and goes on, on another mesh; and text from it.

``python -m benchmarks.resume --shape 1b --first dp=2,tp=2 --then pp=2,tp=2`` trains under the
Trainer with saves in the background, kills one rank with SIGKILL, waits for the others to end, goes
on from the newest checkpoint on another mesh, and generates there. Its table has the times, and the
losses of the steps that both lives ran.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import nemo2
from nemo2.mesh import MeshSizes

from .llama import Llama, fill, loss_of
from .peers.nemo2 import RULES
from .shapes import SHAPES, Shape

TEXTS = 64  # different sequences: few enough to be learned by heart


class Texts(Dataset[Tensor]):
    """Sequences of random tokens, each of them again in every epoch."""

    def __init__(self, shape: Shape, steps: int) -> None:
        self.shape, self.steps = shape, steps

    def __len__(self) -> int:
        return self.shape.batch * self.steps

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index % TEXTS)
        return torch.randint(self.shape.vocab, (self.shape.sequence + 1,), generator=generator)


class Lit(L.LightningModule):
    """The model that is timed, as a LightningModule."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Llama(shape)
        fill(self.model)
        nemo2.annotate(self.model, RULES)

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        return loss_of(self.model(ids[:, :-1]), ids[:, 1:])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4, fused=True)


class Notes(L.Callback):
    """Writes each step's end to a file, from rank 0."""

    def __init__(self, file: Path) -> None:
        self.file, self.begun = file, 0.0
        self.saving: Any = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begin()
        self.write(began=trainer.global_step, pids=_gathered(os.getpid()))

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int
    ) -> None:
        saving = trainer.strategy._checkpoints._saving
        if saving is not self.saving:
            self.saving = saving
            self.write(saved=trainer.global_step, **saving.seconds)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        loss = float(outputs["loss"])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begun
        self.write(step=trainer.global_step, loss=loss, seconds=seconds)
        self._begin()  # a save follows this hook: it counts to the next step

    def write(self, **facts: Any) -> None:
        if torch.distributed.get_rank() == 0:
            with self.file.open("a") as opened:
                opened.write(json.dumps({**facts, "at": time.time()}) + "\n")

    def _begin(self) -> None:
        self.begun = time.perf_counter()


def _gathered(value: int) -> list[int]:
    everyone = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def live(args: argparse.Namespace) -> None:
    """Be one rank of one life."""
    warnings.simplefilter("ignore")
    shape, sizes = SHAPES[args.shape], MeshSizes.of(args.mesh)
    cuda = torch.cuda.device_count() >= sizes.world
    torch.set_float32_matmul_precision("high" if cuda else "highest")
    notes = Notes(args.folder / "notes.jsonl")
    saves = ModelCheckpoint(args.folder, "{step}", save_top_k=-1, every_n_train_steps=args.every)
    trainer = L.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=sizes.world,
        strategy=nemo2.MegatronStrategy(
            **dict(sizes.items()),
            pipeline=nemo2.Pipeline(microbatches=shape.batch // sizes.dp),
            compile=args.compile,
            asynchronous_save=True,
        ),
        precision="bf16-mixed" if cuda else "32-true",
        max_steps=args.steps,
        callbacks=[notes, saves],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    lit = Lit(shape)
    loader = DataLoader(Texts(shape, args.steps), shape.batch // sizes.dp, shuffle=False)
    trainer.fit(lit, loader, ckpt_path="last")
    began = time.perf_counter()
    prompt = Texts(shape, 1)[0][: shape.sequence // 2].tolist()
    whole = nemo2.generate(lit.model, [prompt], max_new_tokens=args.tokens)[0].tolist()
    right = Texts(shape, 1)[0][len(prompt) : len(whole)].tolist()
    known = sum(a == b for a, b in zip(whole[len(prompt) :], right, strict=True))
    notes.write(generated=len(right), known=known, seconds=time.perf_counter() - began)


def run(args: argparse.Namespace, mesh: str, kill: int | None) -> tuple[list[dict[str, Any]], str]:
    """Run a life, kill a rank after a step if asked; return its notes and how it ended."""
    notes, log = args.folder / "notes.jsonl", args.folder / f"{mesh}.log"
    notes.unlink(missing_ok=True)
    world = MeshSizes.of(mesh).world
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
    command += ["--standalone", "-m", "benchmarks.resume", "--life", f"--mesh={mesh}"]
    command += [f"--{name}={getattr(args, name)}" for name in ("shape", "steps", "every")]
    command += [f"--folder={args.folder}", f"--tokens={args.tokens}"]
    command += ["--compile"] if args.compile else []
    began, killed = time.time(), 0.0
    with log.open("w") as opened:
        process = subprocess.Popen(command, stdout=opened, stderr=opened)
        while process.poll() is None and kill is not None and not killed:
            time.sleep(0.02)
            lines = read(notes)
            if lines and lines[-1].get("step", 0) >= kill:
                os.kill(lines[0]["pids"][-1], signal.SIGKILL)
                killed = time.time()
        process.wait()
    lines = read(notes)
    if not lines or (kill is None and process.returncode != 0):
        raise SystemExit(log.read_text()[-4000:])
    said = [line for line in log.read_text().splitlines() if "its process died" in line]
    ended = f"all ranks had ended {time.time() - killed:.1f} s after the kill" if killed else ""
    lines[0]["started"] = lines[0]["at"] - began
    return lines, f"{ended}; {said[0].strip()}" if said else ended


def read(notes: Path) -> list[dict[str, Any]]:
    text = notes.read_text() if notes.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def table(args: argparse.Namespace, lives: Sequence[list[dict[str, Any]]]) -> list[str]:
    """Return what the lives have noted, as lines."""
    lines = []
    for mesh, notes in zip((args.first, args.then), lives, strict=True):
        steps = {x["step"]: x for x in notes if "step" in x}
        after = [x["seconds"] for n, x in steps.items() if n % args.every == 1 and n > min(steps)]
        other = [x["seconds"] for n, x in steps.items() if n % args.every != 1 and n > min(steps)]
        lines.append(
            f"{mesh}: steps {min(steps)} to {max(steps)}, {notes[0]['started']:.1f} s until the"
            f" first began; {statistics.median(other):.3f} s a step, those that a save begins"
            f" in {', '.join(f'{x:.3f}' for x in after)} s"
        )
        lines += [
            f"{mesh}: save at step {x['saved']}: waited {x['waited']:.2f} s for the one before,"
            f" copied in {x['copied']:.2f} s"
            for x in notes
            if "saved" in x
        ]
    first, then = ({x["step"]: x["loss"] for x in notes if "step" in x} for notes in lives)
    both = sorted({*first} & {*then})
    worst = max((abs(first[n] - then[n]) / abs(first[n]) for n in both), default=float("nan"))
    lines.append(f"steps that both ran: {both}; losses differ by {worst:.1e} at most")
    shown = [n for n in (1, *both[:1], *both[-1:], max(then)) if n in first | then]
    lines.append("losses: " + ", ".join(f"{n}: {(first | then)[n]:.4f}" for n in shown))
    made = next(x for x in lives[1] if "generated" in x)
    lines.append(
        f"{args.then}: generated {made['generated']} tokens in {made['seconds']:.1f} s, of which"
        f" {made['known']} are those of the text that it has seen"
    )
    return lines


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1b", choices=tuple(SHAPES))
    parser.add_argument("--first", default="dp=2,tp=2")
    parser.add_argument("--then", default="pp=2,tp=2")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--every", type=int, default=10, help="steps from one save to the next")
    parser.add_argument("--kill", type=int, default=27, help="step after which a rank is killed")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="of checkpoints; temporary by default")
    parser.add_argument("--compile", action="store_true", help="the blocks")
    parser.add_argument("--life", action="store_true", help="be a rank, under torchrun")
    parser.add_argument("--mesh", help="of this life")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    if args.life:
        live(args)
        return
    with tempfile.TemporaryDirectory(prefix="nemo2-resume-") as folder:
        args.folder = args.folder or Path(folder)
        one, ended = run(args, args.first, args.kill)
        other, _ = run(args, args.then, None)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{args.shape}, {device}, torch {torch.__version__}\n{ended}")
    print("\n".join(table(args, [one, other])), flush=True)


if __name__ == "__main__":
    main()

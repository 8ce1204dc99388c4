"""Kills a training at random moments, again and again, and looks at what every kill has left.

``python -m benchmarks.reliability --kills 50`` trains a small model under the Trainer in two
processes, on a mesh that changes with every life (dp, tp, pp in turns), and saves after every
step, in turns in the foreground and in the background; so many kills fall into a save. Both
processes get SIGKILL at a random moment, and after each kill

- every checkpoint that calls itself complete is read whole, its checksums compared, and its
  weights with those that a training without interruption had at that step,
- the next life resumes from the newest one, which must be no older than the last save whose end
  the training had noted,
- each step of each life must have the samples, in the same order, and the loss of the training
  without interruption.

Processes are forked from one that has imported everything: a life takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nemo2
from nemo2 import shard
from nemo2.checkpoint.index import MODEL, Index, is_checkpoint
from nemo2.checkpoint.storage import Reader, read_whole

MESHES = ({"dp": 2}, {"dp": 1, "tp": 2}, {"dp": 1, "pp": 2})
SAMPLES, BATCH, WIDTH = 80, 8, 16
RTOL = 1e-9  # sums in another order on another mesh, in float64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)
        shard(self.up.weight, "tp", dim=0)
        shard(self.up.bias, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(x))))


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        shard(self.layers, "pp")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, eps=1e-6)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + 0.01 * n))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Note(L.Callback):
    """Writes what happens to a file, line by line; what is written survives the kill."""

    def __init__(self, file: Path, states: bool) -> None:
        self.handle, self.states = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), states
        self.kept: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy: Any = trainer.strategy
        dp = strategy.mesh.get_local_rank("dp")
        loss = float(outputs["loss"])
        self.write(step=trainer.global_step, dp=dp, ids=batch[1].tolist(), loss=loss)
        if self.states:
            self.kept[trainer.global_step] = strategy.parallel_model.full_state_dict()
            self.kept[trainer.global_step] = {
                n: t.clone() for n, t in self.kept[trainer.global_step].items()
            }

    def write(self, **facts: Any) -> None:
        os.write(self.handle, (json.dumps(facts) + "\n").encode())


class Saves(ModelCheckpoint):
    """Notes the ends of saves that end before training goes on."""

    note: Note

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        strategy: Any = trainer.strategy
        if not strategy._checkpoints.asynchronous:
            self.note.write(saved=trainer.global_step)


def train(
    folder: Path, notes: Path, mesh: dict[str, int], steps: int, *, background: bool, saving: bool
) -> Note:
    """Train up to ``steps``, from the newest checkpoint in ``folder`` if there is one."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    note = Note(notes, states=not saving)
    callbacks: list[L.Callback] = [note]
    if saving:  # the newest three stay: so saves replace nothing, and removals are killed, too
        saves = Saves(
            folder, "{step}", monitor="step", mode="max", save_top_k=3, every_n_train_steps=1
        )
        saves.note = note
        callbacks.append(saves)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=mesh.get("dp", 1) * mesh.get("tp", 1) * mesh.get("pp", 1),
        strategy=nemo2.MegatronStrategy(asynchronous_save=background, **mesh),
        precision="64-true",
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=saving,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    data = torch.randn(SAMPLES, WIDTH, dtype=torch.float64), torch.arange(SAMPLES)
    torch.manual_seed(1)
    module = Model()
    loader = DataLoader(TensorDataset(*data), batch_size=BATCH // mesh["dp"], shuffle=True)
    newest = max(complete(folder), default=None)
    trainer.fit(module, loader, ckpt_path=None if newest is None else str(path_of(folder, newest)))
    return note


def reference(root: Path, notes: Path, steps: int) -> dict[int, dict[str, Tensor]]:
    """Train without a kill; return the weights after each step.

    In a process of its own: with a CUDA build of torch, one that has run a backward cannot fork.
    """
    made = root / "reference.pt"

    def whole() -> None:
        note = train(root / "none", notes, {"dp": 1}, steps, background=False, saving=False)
        torch.save(note.kept, made)

    if reaped(forked(whole)):
        raise SystemExit("the training without a kill failed")
    states: dict[int, dict[str, Tensor]] = torch.load(made)
    return states


def forked(run: Callable[[], object]) -> int:
    """Run a function in a process of its own, whose status says whether it ended; return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step={step}.ckpt"


def complete(folder: Path) -> list[int]:
    """Return the steps of the checkpoints that call themselves complete."""
    return [
        int(path.stem.partition("=")[2])
        for path in folder.glob("step=*.ckpt")
        if is_checkpoint(path)
    ]


class Harness:
    """Lives and deaths of one training after another, and what is wrong."""

    def __init__(self, root: Path, steps: int, seed: int) -> None:
        self.root, self.steps = root, steps
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.problems: list[str] = []
        self.life = self.training = 0
        self.folder = root / "training0"
        notes = root / "reference.jsonl"
        self.states = reference(root, notes, steps)
        lines = [json.loads(line) for line in notes.read_text().splitlines()]
        self.reference = {line["step"]: line for line in lines}

    def one(self) -> None:
        """Live, die, and look at it."""
        mesh = MESHES[self.life % len(MESHES)]
        background = self.life % 2 == 1
        notes = self.root / f"life{self.life}.jsonl"
        self.life += 1
        start = max(complete(self.folder), default=0)
        children = self._fork(notes, mesh, background)
        ended = self._kill(children, notes)
        self.seen["finished before the kill" if ended else "kills"] += 1
        self.seen["lives saving in the background"] += background
        saved = self._compare(notes, start, mesh["dp"])
        self._inspect(saved, background)
        if ended or max(complete(self.folder), default=0) >= self.steps:
            shutil.rmtree(self.folder)
            self.training += 1
            self.folder = self.root / f"training{self.training}"

    def _fork(self, notes: Path, mesh: dict[str, int], background: bool) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        be = partial(self._be, port=port, notes=notes, mesh=mesh, late=background)
        return [forked(partial(be, rank)) for rank in range(2)]

    def _be(self, rank: int, port: int, notes: Path, mesh: dict[str, int], late: bool) -> None:
        """Be one rank of one life."""
        log = os.open(f"{notes}.rank{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        train(self.folder, notes, mesh, self.steps, background=late, saving=True)

    def _kill(self, children: list[int], notes: Path) -> bool:
        """Kill both at a random moment after the first step; say if they ended by themselves."""
        limit = time.monotonic() + 120
        while not notes.exists() or not notes.stat().st_size:
            if time.monotonic() > limit or os.waitpid(children[0], os.WNOHANG)[0]:
                self.problems.append(f"life {self.life} did not begin: see {notes}.rank0.log")
                break
            time.sleep(0.01)
        time.sleep(self.random.uniform(0.0, 1.5))
        self.random.shuffle(children)
        codes = []
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            codes.append(reaped(child))
        return codes == [0, 0]

    def _compare(self, notes: Path, start: int, dp: int) -> int:
        """Compare the steps of a life with the reference; return the last save that it noted."""
        lines = []
        for line in notes.read_text().splitlines() if notes.exists() else ():
            with suppress(ValueError):  # the last one may be cut
                lines.append(json.loads(line))
        steps: dict[int, dict[int, Any]] = {}
        for line in lines:
            if "step" in line:
                steps.setdefault(line["step"], {})[line["dp"]] = line
        if steps and min(steps) != start + 1:
            self.problems.append(f"a life that began at {start} trained step {min(steps)} first")
        for step, readers in steps.items():
            want = self.reference[step]
            self.seen["steps trained"] += 1
            if len(readers) == dp:
                pairs = zip(*(readers[r]["ids"] for r in range(dp)), strict=True)
                if [x for pair in pairs for x in pair] != want["ids"]:
                    self.problems.append(f"step {step} had other samples")
            loss = next(iter(readers.values()))["loss"]
            if abs(loss - want["loss"]) > RTOL * abs(want["loss"]):
                self.problems.append(f"step {step} had loss {loss}, not {want['loss']}")
        return max((line["saved"] for line in lines if "saved" in line), default=start)

    def _inspect(self, saved: int, background: bool) -> None:
        """Read what calls itself complete, whole, and compare it with the reference."""
        found = complete(self.folder)
        newest = max(found, default=0)
        if newest < saved:
            self.problems.append(f"step {saved} was saved, and the newest left is {newest}")
        unfinished = list(self.folder.glob(".*.unfinished-*"))
        self.seen["kills inside of a save"] += bool(unfinished)
        self.seen["kills inside of a save in the background"] += bool(unfinished) and background
        self.seen["kills inside of a removal"] += bool(list(self.folder.glob(".*.removed-*")))
        for step in found:
            self.seen["complete checkpoints read"] += 1
            try:
                index = Index.read(path_of(self.folder, step))
                wrong = index.check_sizes()
                wrong += [x for name in index.files for x in index.check_bytes(name)]
                with Reader(index) as reader:
                    for name, want in self.states[step].items():
                        got = read_whole(reader, MODEL + name)
                        if not torch.allclose(got, want, rtol=RTOL, atol=RTOL):
                            wrong.append(f"{name} is not what it was at step {step}")
            except Exception as error:
                wrong = [repr(error)]
            self.problems += [f"{path_of(self.folder, step)}: {what}" for what in wrong]


def reaped(child: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except ChildProcessError:
        return 1


def main() -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it runs on CPUs, and forks its ranks
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=300, help="of a training; then another one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nemo2-reliability-") as root:
        harness = Harness(Path(root), args.steps, args.seed)
        while harness.seen["kills"] < args.kills and not harness.problems:
            harness.one()
            print(dict(harness.seen), file=sys.stderr, flush=True)
        for problem in harness.problems:
            print(problem)
        if harness.problems:
            for log in sorted(Path(root).glob(f"life{harness.life - 1}*.log")):
                print(log.read_text()[-3000:])
    for what, count in harness.seen.items():
        print(f"{what}: {count}")
    print(f"wrong: {len(harness.problems)}; {time.monotonic() - began:.0f} s")
    return 1 if harness.problems else 0


if __name__ == "__main__":
    sys.exit(main())

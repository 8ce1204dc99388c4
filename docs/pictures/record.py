"""Records a step of each schedule: four processes, megatron-core's own schedule functions.

The blocks sleep, so that four processes on few cores take the times that four devices would.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import nemo2
from nemo2 import shard

from .data import RECORDED, problems

RANKS, MICROBATCHES, LAYERS = 4, 8, 8
FORWARD, BACKWARD = 0.1, 0.2  # seconds of a block: what processes wait for a core is less
TRIALS = 3  # the fastest step is kept
SCHEDULES = {
    "1f1b": nemo2.Pipeline(MICROBATCHES),
    "interleaved": nemo2.Pipeline(MICROBATCHES, "interleaved", 2),
}


class Sleeping(nn.Module):
    """A block that takes ``forward`` and ``backward`` seconds."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seconds = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds[0])
        y: Tensor = self.linear(x)
        if type(y) is Tensor and y.requires_grad:
            y.register_hook(lambda _: time.sleep(self.seconds[1]))
        return y


class Net(nn.Module):
    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Sleeping(forward, backward) for _ in range(LAYERS))
        shard(self.layers, "pp")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Clock:
    """Times Megatron's forward and backward steps of this rank, from outside."""

    def __enter__(self) -> Clock:
        from megatron.core.pipeline_parallel import schedules

        self.rows: list[list[Any]] = []
        self.waiting: list[tuple[Any, int, int]] = []  # output of a forward, stage, microbatch
        self.forward, self.backward = schedules.forward_step, schedules.backward_step
        schedules.forward_step, schedules.backward_step = self.forward_step, self.backward_step
        return self

    def __exit__(self, *_: object) -> None:
        from megatron.core.pipeline_parallel import schedules

        schedules.forward_step, schedules.backward_step = self.forward, self.backward

    def forward_step(self, *args: Any, **kwargs: Any) -> Any:
        stage = args[2].stage  # of our adapter: what Megatron takes for the model
        microbatch, start = stage.microbatch, time.monotonic()
        out = self.forward(*args, **kwargs)
        self.note(stage.index, "forward", microbatch, start)
        self.waiting.append((_first(out[0]), stage.index, microbatch))
        return out

    def backward_step(self, received: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        found = (i for i, (out, _, _) in enumerate(self.waiting) if out is _first(output))
        _, stage, microbatch = self.waiting.pop(next(found))
        start = time.monotonic()
        out = self.backward(received, output, *args, **kwargs)
        self.note(stage, "backward", microbatch, start)
        return out

    def note(self, stage: int, way: str, microbatch: int, start: float) -> None:
        self.rows.append([dist.get_rank(), stage, way, microbatch, start, time.monotonic()])


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, list) else output


def trials(pipeline: nemo2.Pipeline, count: int, forward: float, backward: float) -> Any:
    """Run ``count`` steps on this rank and return the rows of each; called on all ranks."""
    model = nemo2.parallelize(Net(forward, backward), nemo2.make_mesh(pp=RANKS), pipeline=pipeline)
    run = nemo2.value_and_grad(lambda module, x: module(x).square().mean(), model)
    batch, found = torch.ones(MICROBATCHES, 4), []
    run(model.params, batch)  # plans
    with Clock() as clock:
        for _ in range(count):
            clock.rows = []
            dist.barrier()
            run(model.params, batch)
            found.append(clock.rows)
    return found


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of imports
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    for name, pipeline in SCHEDULES.items():
        found = trials(pipeline, TRIALS, FORWARD, BACKWARD)
        Path(folder, f"{name}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def joined(trial: Iterable[list[list[Any]]]) -> list[list[Any]]:
    """Return the rows of all ranks in order, in ms since the first began."""
    rows = sorted(row for own in trial for row in own)
    zero = min(row[4] for row in rows)
    return [[*row[:4], *(round(1000 * (t - zero)) for t in row[4:])] for row in rows]


def record() -> None:
    """Run both schedules and write ``schedules.json``."""
    recorded = {}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder,), RANKS)
        for name, pipeline in SCHEDULES.items():
            files = [Path(folder, f"{name}-{rank}.json") for rank in range(RANKS)]
            steps = zip(*(json.loads(file.read_text()) for file in files), strict=True)
            rows = min((joined(trial) for trial in steps), key=lambda r: max(x[-1] for x in r))
            stages = RANKS * pipeline.virtual_stages
            found = problems(rows, RANKS, stages, MICROBATCHES)
            if found:
                raise RuntimeError(f"{name} was not recorded: {found}")
            shape = {"ranks": RANKS, "stages": stages, "microbatches": MICROBATCHES}
            recorded[name] = shape | {"rows": rows}
    # One row a line, so that a new recording can be read as a diff.
    text = json.dumps(recorded).replace("], [", "],\n[").replace("[[", "[\n[")
    RECORDED.write_text(text + "\n")

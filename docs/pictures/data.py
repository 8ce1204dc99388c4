"""What the pictures show: read off real plans, layouts and the recorded schedules."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemo2
from examples.gpt import GPT, GPTConfig
from nemo2.communication import collectives
from nemo2.mesh import MeshSizes
from nemo2.pipeline.microbatch import first_microbatch
from nemo2.plan import ParamPlan, Plan
from nemo2.sharding.collectives import Axis, take
from nemo2.sharding.slices import held_parts
from nemo2.trace import Activation, Event

FOLDER = Path(__file__).parent
RECORDED = FOLDER / "schedules.json"
CONFIG = GPTConfig(vocab=64, width=16, heads=4, layers=4, length=16)
BATCH, LENGTH = 8, 16
Data = dict[str, Any]


def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def coordinates(sizes: MeshSizes) -> list[dict[str, int]]:
    """Return the coordinates of each rank, in the order of ``make_mesh``."""
    ranks = torch.arange(sizes.world).view([size for _, size in sizes.items()])
    places = [(ranks == rank).nonzero()[0].tolist() for rank in range(sizes.world)]
    return [{axis: i for (axis, _), i in zip(sizes.items(), p, strict=True)} for p in places]


def boxes(plan: Plan, param: ParamPlan, at: dict[str, int]) -> list[list[list[int]]]:
    """Return what a rank keeps of a parameter between steps: boxes of [start, stop] by dim."""
    if at["pp"] not in param.ranks:
        return []
    shards = plan.options.data_parallel.shards(plan.sizes)
    dp = shards, at["dp"] % shards
    split = param.dp_dim if shards > 1 else None
    parts = held_parts(param, (plan.sizes.tp, at["tp"]), dp, split)
    return [
        [[a, a + n] for a, n in zip(p.box.start, p.box.shape, strict=True)]
        for p in parts
        if p.box.numel
    ]


def matrices(plan: Plan, block: str = "") -> list[ParamPlan]:
    return [p for p in plan.params if len(p.shape) == 2 and p.name.startswith(block)]


def samples(plan: Plan, at: dict[str, int]) -> list[int]:
    """Return the numbers of a dp coordinate's samples in the global batch."""
    own = torch.arange(BATCH).chunk(plan.sizes.dp)[at["dp"]]
    assert len(first_microbatch(own, plan.options.pipeline.microbatches))
    return own.tolist()


def mesh() -> Data:
    """Eight ranks, and what each holds of all matrices of the model."""
    plan = nemo2.plan(GPT(CONFIG), "dp=2,pp=2,tp=2")
    params = matrices(plan)
    return {
        "shapes": {p.name: list(p.shape) for p in params},
        "ranks": [
            {"at": at, "holds": {p.name: boxes(plan, p, at) for p in params}}
            | {"samples": samples(plan, at)}
            for at in coordinates(plan.sizes)
        ],
    }


def data_parallel() -> Data:
    """Which rows of one matrix four ranks keep, by kind."""
    kinds = {}
    for kind in ("ddp", "zero1", "fsdp"):
        plan = nemo2.plan(GPT(CONFIG), "dp=4", data_parallel=kind)
        whole = plan.options.data_parallel.keeps(plan.sizes, plan.options.pipeline)
        ranks = []
        for at in coordinates(plan.sizes):
            (rows,) = boxes(plan, plan.param("layers.0.up.weight"), at)
            ranks.append({"shard": rows[0], "samples": samples(plan, at)})
        size = plan.param("layers.0.up.weight").shape[0]
        kinds[kind] = {"rows": size, "whole during a step": whole, "ranks": ranks}
    return {"kinds": kinds}


def tensor_parallel() -> Data:
    """A block's matrices on two ranks, and which layer each belongs to."""
    plan = nemo2.plan(GPT(CONFIG), "tp=2")
    params = matrices(plan, "layers.0.")
    return {
        "shapes": {p.name.removeprefix("layers.0."): list(p.shape) for p in params},
        "ranks": [
            {p.name.removeprefix("layers.0."): boxes(plan, p, at) for p in params}
            for at in coordinates(plan.sizes)
        ],
    }


def _calls(activation: Activation) -> list[tuple[str, Event]]:
    found: list[tuple[str, Event]] = []
    for item in activation.items:
        if isinstance(item, Event):
            found.append((activation.module, item))
        else:
            found += _calls(item)
    return found


def sequence_parallel() -> Data:
    """The calls of a block in order, whether split, with local shapes; and its collectives."""

    def facts(event: Event) -> list[Any]:
        split = any(not tp.replicated for _, tp in event.operand_layouts)
        return [event.name, split, list(event.results[0])]

    lanes = {}
    names = {"layer_norm", "linear", "scaled_dot_product_attention", "add", "gelu"}
    ids = torch.randint(CONFIG.vocab, (2, LENGTH + 1))
    for on in (False, True):
        how: Data = {"step": loss_fn, "batch": ids, "sequence_parallel": on}
        plan = nemo2.plan(GPT(CONFIG), "tp=2", **how)
        assert plan.step is not None
        block = next(a for a in plan.step.trace.root.walk() if a.module == "layers.1")
        calls = [
            [module.removeprefix("layers.1").strip("."), *facts(event)]
            for module, event in _calls(block)
            if event.name in names
        ]
        moved = [
            [c.module.removeprefix("layers.1."), c.call, c.direction, c.kind, list(c.shape)]
            for c in collectives(plan.step.trace)
            if c.module.startswith("layers.1")
        ]
        lanes["with" if on else "without"] = {"calls": calls, "collectives": moved}
    return lanes


def context_parallel() -> Data:
    """Which of 16 positions four ranks hold, and how many causal scores each computes."""
    lanes: Data = {"length": 16}
    for balanced in (False, True):
        ranks = []
        for rank in range(4):
            axis = Axis("cp", None, rank, 4, balanced)
            positions = take(torch.arange(16), 0, axis).tolist()
            ranks.append({"positions": positions, "scores": sum(p + 1 for p in positions)})
        lanes["balanced" if balanced else "plain"] = ranks
    return lanes


def schedule(name: str) -> Data:
    """A recorded step: rows of rank, stage, direction, microbatch, start and end in ms."""
    recorded: Data = json.loads(RECORDED.read_text())[name]
    return recorded


PICTURES: dict[str, Callable[[], Data]] = {
    "mesh": mesh,
    "data_parallel": data_parallel,
    "tensor_parallel": tensor_parallel,
    "sequence_parallel": sequence_parallel,
    "context_parallel": context_parallel,
    "schedule_1f1b": lambda: schedule("1f1b"),
    "schedule_interleaved": lambda: schedule("interleaved"),
}


def problems(rows: list[list[Any]], ranks: int, stages: int, microbatches: int) -> list[str]:
    """Return what cannot be in a recorded step: overlaps, wrong order, missing work."""
    found = []
    done = {(stage, way, m): (start, end) for _, stage, way, m, start, end in rows}
    for stage in range(stages):
        for m in range(microbatches):
            for way in ("forward", "backward"):
                if (stage, way, m) not in done:
                    found.append(f"stage {stage} has no {way} of microbatch {m}")
    if found:
        return found
    for m in range(microbatches):
        order = [done[s, "forward", m] for s in range(stages)]
        order += [done[s, "backward", m] for s in reversed(range(stages))]
        found += [f"microbatch {m} is out of order" for a, b in pairwise(order) if a[1] > b[0] + 1]
    for rank in range(ranks):
        own = sorted((start, end) for r, *_, start, end in rows if r == rank)
        found += [f"rank {rank} does two at once" for a, b in pairwise(own) if a[1] > b[0] + 1]
    return found

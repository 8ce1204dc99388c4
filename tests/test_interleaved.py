"""Interleaved 1F1B on whole models: parity with one device, what is shared, frozen, recomputed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nemo2
from nemo2 import PipelineError, shard
from tests.matrix import Cell, check
from tests.models import GPT, VOCAB, WIDTH, Block, SkipBlock, counted, next_token, token_ids

ONE = nemo2.Pipeline(4)
TWO = nemo2.Pipeline(4, "interleaved", 2)


def differing(pool: Any, world: int, cells: list[Cell]) -> list[str]:
    results = pool.run(world, check, cells, torch.float64, pool.device, timeout=280)[0]
    return [f"{c}\n{text}" for c, (ok, text) in zip(cells, results, strict=True) if not ok]


# Rounds of microbatches, blocks that do not divide, three virtual stages, values that skip blocks.
ON_TWO = [
    Cell(m, 1, 2, 1, "ddp", n, "interleaved", v, layers)
    for m, n, v, layers in (
        ("example gpt", 2, 2, 4),
        ("gpt tied", 4, 2, 5),
        ("skip argument", 8, 2, 5),
        ("skip glue", 4, 3, 7),
        ("llama", 2, 3, 6),
    )
]
ON_FOUR = [
    Cell("gpt tied", 2, 2, 1, "fsdp", 4, "interleaved", 3, 6),
    Cell("skip glue", 2, 2, 1, "fsdp", 4, "interleaved", 2, 4),
    Cell("llama tied", 1, 2, 2, "ddp", 2, "interleaved", 2, 5),
    Cell("skip argument", 1, 4, 1, "ddp", 8, "interleaved", 2, 9),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "cells"), [(2, ON_TWO), (4, ON_FOUR)])
def test_equal_to_one_device(pool, world, cells):
    assert not differing(pool, world, cells)


class Shared(GPT):
    """Blocks that share: a weight (0 and 1), a whole module (1 and 2), a weight with the head."""

    def __init__(self, layers: int, *pairs: tuple[int, int], module: bool = False) -> None:
        super().__init__(layers, tied=True)
        for a, b in pairs:
            if module:
                self.layers[b].attention = self.layers[a].attention
            else:
                self.layers[b].up.weight = self.layers[a].up.weight


class Checkpointed(GPT):
    """The user's own activation checkpoint around each block, with dropout inside."""

    def __init__(self, layers: int = 5, p: float = 0.0) -> None:
        super().__init__(layers, tied=True)
        self.drop = nn.Dropout(p)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: self.drop(layer(y)), x, use_reentrant=False)
        return self.head(self.norm(x))


class Auxiliary(GPT):
    """A second loss in the middle, through the tied head: its weight is used on a third stage."""

    def __init__(self) -> None:
        super().__init__(4, tied=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        early = 0
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 1:
                early = torch.nn.functional.linear(x, self.embed.weight)
        return self.head(self.norm(x)) + early


class Frozen(GPT):
    """Fine-tuning: some blocks are frozen, and with the first ones the embeddings."""

    def __init__(self, *frozen: int, layers: int = 4) -> None:
        super().__init__(layers)
        for i in frozen:
            self.layers[i].requires_grad_(False)
        if 0 in frozen:
            self.embed.requires_grad_(False)
            self.place.requires_grad_(False)


def verified(jobs: list[tuple[Any, dict[str, int], str, Any]], device: str) -> list[str]:
    """Return what differs from one device."""
    bad = []
    for (build, args, how), mesh, kind, pipeline in jobs:
        report = nemo2.verify(
            lambda build=build, args=args, how=how: build(*args, **how),
            token_ids(8 * mesh.get("dp", 1)),
            counted,
            mesh,
            device=device,
            data_parallel=kind,
            pipeline=pipeline,
        )
        if not report.ok:
            bad.append(f"{build.__name__}{args} {mesh} {kind} {pipeline}\n{report}")
    return bad


SHARED = [
    (Shared, ((0, 1),), {"layers": 6}),  # in one stage of 1F1B
    (Shared, ((0, 2), (3, 5)), {"layers": 6}),
    (Shared, ((1, 3),), {"layers": 6, "module": True}),
]
FROZEN = [
    (Frozen, frozen, {}) for frozen in ((0,), (0, 1), (1,), (2,), (1, 2), (0, 1, 2), (0, 2), (3,))
]


def of_shared(case: Any) -> Any:
    build, pairs, how = case
    return build, (how["layers"], *pairs), {k: v for k, v in how.items() if k != "layers"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_shared_parameters(pool, kind):
    cases = [of_shared(c) for c in SHARED]
    jobs = [(c, {"pp": 2, "dp": 2}, kind, how) for c in cases for how in (ONE, TWO)]
    jobs += [(c, {"dp": 4}, kind, ONE) for c in cases]
    assert pool.run(4, verified, jobs, pool.device) == [[]] * 4


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_tied_weight_that_a_third_stage_uses(pool, kind):
    case = (Auxiliary, (), {})
    jobs = [(case, {"pp": 2, "dp": 2}, kind, how) for how in (ONE, TWO)]
    jobs += [(case, {"pp": 4}, kind, ONE)]
    assert pool.run(4, verified, jobs, pool.device) == [[]] * 4


@pytest.mark.parametrize("how", [ONE, TWO], ids=["1f1b", "interleaved"])
def test_frozen_stages(pool, how):
    jobs = [(c, {"pp": 2}, "ddp", how) for c in FROZEN]
    assert pool.run(2, verified, jobs, pool.device) == [[]] * 2
    jobs = [(c, {"pp": 2, "dp": 2}, "fsdp", how) for c in FROZEN]
    assert pool.run(4, verified, jobs, pool.device) == [[]] * 4


def test_the_users_activation_checkpoints(pool):
    case = (Checkpointed, (), {})
    jobs = [(case, {"pp": 2, "dp": 2}, kind, TWO) for kind in ("ddp", "fsdp")]
    assert pool.run(4, verified, jobs, pool.device) == [[]] * 4

"""Throughput: what it logs is the arithmetic of tokens, weights, schedule and clock."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import nemo2
from nemo2.lightning import Throughput, throughput
from nemo2.lightning.throughput import attention_flops, weight_flops
from nemo2.pipeline.balance import bubble_share
from tests.lightning_programs import LENGTH, VOCABULARY, WIDTH, Lit, data, trainer
from tests.pool import Pool
from tests.stage_programs import Setup

PEAK = 1e6
WEIGHTS = 4 * 2 * WIDTH * 4 * WIDTH + VOCABULARY * WIDTH  # four blocks, and the head


class Clock(L.Callback):
    """Time that passes in steps only: as long as a rank's number says; and long validations."""

    def __init__(self) -> None:
        self.now = 1.0
        self.shown: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        self.now += 0.5 + 0.25 * trainer.global_rank

    def on_validation_batch_start(self, *rest: Any) -> None:
        self.now += 100.0

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self.shown.append(dict(trainer.progress_bar_metrics))


def measure(folder: str, mesh: dict[str, Any], world: int, **options: Any) -> dict[str, Any]:
    clock, meter = Clock(), Throughput(available_flops=PEAK, every=2)
    real, throughput._now = throughput._now, lambda trainer: clock.now
    try:
        made = trainer(
            folder,
            strategy=nemo2.MegatronStrategy(**mesh),
            devices=world,
            callbacks=[clock, meter],
            logger=CSVLogger(folder, name="", version="log"),
            enable_progress_bar=False,
            **options,
        )
        torch.manual_seed(1)
        batch = 8 // mesh.get("dp", 1)
        made.fit(Lit(), data(batch, 80), data(batch, 16))
    finally:
        throughput._now = real
    return {"values": meter.values, "shown": clock.shown}


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [
        ({"dp": 2, "pp": 2, "pipeline": nemo2.Pipeline(microbatches=2)}, 1),
        ({"pp": 2, "tp": 2, "pipeline": nemo2.Pipeline(2, "interleaved", 2)}, 2),
    ],
)
def test_values_are_the_arithmetic_of_tokens_and_clock(
    pool: Pool, tmp_path: Path, mesh: dict[str, Any], accumulate: int
) -> None:
    got = pool.run(4, measure, str(tmp_path), mesh, 4, accumulate_grad_batches=accumulate)
    speed = 8 * LENGTH / (0.5 + 0.25 * 3)  # of the slowest rank; two validations came between
    values = got[0]["values"]
    assert values["tokens/s"] == pytest.approx(speed)
    assert values["mfu"] == pytest.approx(6 * WEIGHTS * speed / (4 * PEAK))
    assert values["bubble"] == (1 / 3 if accumulate == 1 else 1 / 5)
    assert 0.05 < values["peak_GiB"] < 20
    for rank in got:
        assert rank["values"] == values
        assert rank["shown"][-1]["tokens/s"] == pytest.approx(speed)
        assert set(values) <= set(rank["shown"][-1])
        first = next(i for i, shown in enumerate(rank["shown"]) if "tokens/s" in shown)
        assert first == 3 * accumulate  # the callback before saw the one after three steps
    with (tmp_path / "log" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["tokens/s"]]
    assert float(rows[-1]["mfu"]) == pytest.approx(values["mfu"], rel=1e-5)


@pytest.mark.parametrize("mesh", ["dp=2", "pp=2", "tp=2", "cp=2"])
def test_flops_of_a_decoder_on_any_mesh(mesh: str) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from gpt import GPT, GPTConfig

    cfg = GPTConfig(layers=3, width=32, heads=4, length=16, vocab=40)
    model = GPT(cfg)
    ids = torch.zeros(4, 16, dtype=torch.long)
    plan = nemo2.plan(
        model, mesh, step=lambda m, x: m(x).mean(), batch=ids, pipeline=nemo2.Pipeline(2)
    )
    assert weight_flops(plan, model) == 6 * (3 * 12 * 32**2 + 40 * 32)
    assert attention_flops(plan.step) == (2 * 16) * 12 * 3 * 16 * 32  # of 2 samples of 16 tokens
    model.layers[0].requires_grad_(False)
    assert weight_flops(nemo2.plan(model, mesh), model) == (
        6 * (2 * 12 * 32**2 + 40 * 32) + 4 * 12 * 32**2
    )


# --- the bubble, in the order in which Megatron runs a step


def order(microbatches: int, virtual_stages: int) -> list[tuple[str, int]]:
    """Return ("F" or "B", chunk) of this rank, in the order in which they ran."""
    setup = Setup("one", virtual_stages)
    events: list[tuple[str, int]] = []
    for chunk, stage in enumerate(setup.own):
        stage.register_forward_pre_hook(lambda *_, c=chunk: events.append(("F", c)))
        stage.a.weight.register_post_accumulate_grad_hook(
            lambda p, c=chunk: events.append(("B", c))
        )
    setup.run(microbatches)
    return events


def simulate(ranks: list[list[tuple[str, int]]], stages: int) -> float:
    """Return the share of the time in which the ranks wait, if a backward is two forwards."""
    done: dict[tuple[str, int, int], float] = {}
    free = [0.0] * len(ranks)
    left = [list(numbered(rank, events, len(ranks))) for rank, events in enumerate(ranks)]
    while any(left):
        before = len(done)
        for rank, todo in enumerate(left):
            while todo:
                kind, stage, m = todo[0]
                last = stage == stages - 1
                needs = [("F", stage - 1, m)] if kind == "F" and stage else []
                needs += [("F", stage, m)] if kind == "B" else []
                needs += [("B", stage + 1, m)] if kind == "B" and not last else []
                if not all(n in done for n in needs):
                    break
                start = max([free[rank], *(done[n] for n in needs)])
                free[rank] = done[todo.pop(0)] = start + (1 if kind == "F" else 2)
        assert len(done) > before, "the order is a deadlock"
    busy = sum(1 if kind == "F" else 2 for kind, *_ in done) / len(ranks)
    return 1 - busy / max(free)


def numbered(rank: int, events: list[tuple[str, int]], pp: int) -> Iterator[tuple[str, int, int]]:
    seen: dict[tuple[str, int], int] = {}
    for kind, chunk in events:
        m = seen[kind, chunk] = seen.get((kind, chunk), -1) + 1
        yield kind, chunk * pp + rank, m


@pytest.mark.parametrize(
    ("pp", "microbatches", "virtual_stages"),
    [(2, 1, 1), (2, 6, 1), (4, 4, 1), (4, 6, 1), (2, 4, 2), (3, 6, 2), (4, 4, 2), (2, 2, 3)],
)
def test_bubble_share_is_that_of_the_schedule(
    pool: Pool, pp: int, microbatches: int, virtual_stages: int
) -> None:
    ranks = pool.run(pp, order, microbatches, virtual_stages)
    schedule = "interleaved" if virtual_stages > 1 else "1f1b"
    pipeline = nemo2.Pipeline(microbatches, schedule, virtual_stages)
    share = bubble_share(pp, pipeline)
    assert simulate(ranks, pp * virtual_stages) == pytest.approx(share)
    assert bubble_share(1, pipeline) == 0


def test_more_microbatches_wait_less() -> None:
    shares = [bubble_share(4, nemo2.Pipeline(m)) for m in (1, 2, 4, 8, 16)]
    assert all(more > less for more, less in pairwise(shares))


# --- errors


def test_other_strategies_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, callbacks=[Throughput()])
    with pytest.raises(nemo2.Nemo2Error, match="the Trainer has SingleDeviceStrategy"):
        made.fit(Lit(), data(8, 16), data(8, 16))


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(nemo2.Nemo2Error, match="no integer tensor"):
        throughput.count_tokens({"x": torch.zeros(3), "mask": torch.ones(3, dtype=torch.bool)})
    assert throughput.count_tokens((torch.zeros(3), torch.zeros(2, 5, dtype=torch.long))) == 10
    with pytest.raises(nemo2.Nemo2Error, match="give an integer >= 1"):
        Throughput(every=0)

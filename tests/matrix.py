"""The parity matrix: every model on every mesh with every option of the engine.

``python -m tests.matrix`` runs the whole product and writes ``docs/matrix.md``; with
``--minutes n`` what fits, in an order that is spread over all options. The tests run a covering
design in which every pair of options occurs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import queue
import random
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import nemo2
from tests.models import ZOO, token_ids

MICROBATCHES = (1, 2, 5, 8)
KINDS = {
    "ddp": nemo2.DataParallel("ddp"),
    "zero1": nemo2.DataParallel("zero1"),
    "fsdp": nemo2.DataParallel("fsdp"),
    "resharding": nemo2.DataParallel("fsdp", reshard=True),
    "hsdp": nemo2.DataParallel("fsdp", replicate=2),  # on dp=4 only
}
# with virtual stages and blocks: what interleaves needs more blocks than the models have
SCHEDULES = {"1f1b": (1, None), "interleaved": (2, 5)}
REMAT = (None, "full", "selective")  # dealt out over the product
CACHING = ("llama", "llama tied", "gpt2")  # with a cache in their blocks, as they are by default
_COST = {1: 1.0, 2: 1.3, 4: 2.0, 8: 6.0}  # of a cell, by its processes, on two cores
METHODS = ("ring", "all_gather", "ulysses")


@dataclass(frozen=True)
class Cell:
    """One combination of options; an option that has no meaning on the mesh is ``None``."""

    model: str
    dp: int
    pp: int
    cp: int
    tp: int
    kind: str | None
    microbatches: int
    schedule: str | None
    method: str | None
    sequence: bool | None
    remat: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        return {"dp": self.dp, "pp": self.pp, "cp": self.cp, "tp": self.tp}

    @property
    def world(self) -> int:
        return self.dp * self.pp * self.cp * self.tp

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        return tuple(vars(self).items())

    def __str__(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.options if v is not None)

    @property
    def runs(self) -> bool:
        """Whether the model takes this ``tp``, and Megatron this count in this schedule."""
        rounds = self.schedule != "interleaved" or self.microbatches % self.pp == 0
        return rounds and self.tp <= ZOO[self.model].max_tp and self.world <= 8


def plain(model: str, microbatches: int, **sizes: int) -> Cell:
    """Return the cell of a mesh with every option at its default."""
    one = {"dp": 1, "pp": 1, "cp": 1, "tp": 1} | sizes
    return Cell(model, *one.values(), "fsdp", microbatches, "1f1b", "ring", None)


def product(models: Sequence[str] = tuple(ZOO), largest: int = 8) -> list[Cell]:
    return [c for c in _product(models) if c.runs and c.world <= largest]


def _product(models: Sequence[str]) -> Iterator[Cell]:
    for dp, pp, cp, tp in itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 2)):
        kinds = [k for k in KINDS if k != "hsdp"] if dp * cp > 1 else [None]
        for model, *options in itertools.product(
            models,
            ["hsdp"] if dp == 4 else kinds,
            MICROBATCHES,
            SCHEDULES if pp > 1 else [None],
            METHODS if cp > 1 else [None],
            (True, False) if tp > 1 else [None],
        ):
            cell = Cell(model, dp, pp, cp, tp, *options)
            remat = REMAT[zlib.crc32(str(cell).encode()) % len(REMAT)]
            yield replace(cell, remat=None if model in CACHING else remat)


def covering(cells: Sequence[Cell]) -> list[Cell]:
    """Choose cells, greedily, until every pair of options of ``cells`` occurs.

    Cells of few processes come first: they cost less.
    """
    bits: dict[Any, int] = {}
    pairs = [0] * len(cells)
    for i, cell in enumerate(cells):
        for pair in itertools.combinations(cell.options, 2):
            pairs[i] |= 1 << bits.setdefault(pair, len(bits))
    missing = (1 << len(bits)) - 1
    chosen: list[Cell] = []
    while missing:
        best = max(
            range(len(cells)),
            key=lambda i: (pairs[i] & missing).bit_count() / _COST[cells[i].world],
        )
        missing &= ~pairs[best]
        chosen.append(cells[best])
    return sorted(chosen, key=str)


def check(cells: Sequence[Cell], dtype: torch.dtype, device: str) -> list[tuple[bool, str]]:
    """Verify each cell in the running process group; the same answer on every rank."""
    return [check_one(cell, dtype, device) for cell in cells]


def check_one(cell: Cell, dtype: torch.dtype, device: str) -> tuple[bool, str]:
    stages, layers = SCHEDULES[cell.schedule or "1f1b"]
    case = ZOO[cell.model] if layers is None else ZOO[cell.model].with_layers(layers)
    report = nemo2.verify(
        case,
        token_ids(cell.dp * cell.microbatches * (2 if cell.microbatches == 1 else 1)),
        case.loss,
        cell.sizes,
        device=device,
        dtype=dtype,
        rules=case.rules,
        data_parallel=KINDS[cell.kind or "fsdp"],
        pipeline=nemo2.Pipeline(cell.microbatches, cell.schedule or "1f1b", stages),
        context_parallel=cell.method or "ring",
        sequence_parallel=cell.sequence,
        remat=cell.remat,
    )
    return report.ok, str(report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after")
    parser.add_argument("--pools", type=int, default=max(1, (os.cpu_count() or 1) // 8))
    asked = parser.parse_args()
    cells = product()
    cells += [plain(m, 2, dp=2, pp=2, cp=2, tp=2) for m in ZOO]  # all axes, 16 processes
    random.Random(0).shuffle(cells)
    started = time.time()
    jobs = [
        same[i : i + 8]
        for world in (16, 8, 4, 2, 1)
        for same in [[c for c in cells if c.world == world]]
        for i in range(0, len(same), 8)
    ]
    random.Random(1).shuffle(jobs)  # small and large worlds alike when time is short
    waiting = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    failed: list[tuple[Cell, str]] = []
    done: list[Cell] = []
    deadline = started + asked.minutes * 60
    with ThreadPoolExecutor(asked.pools) as threads:
        for one in [
            threads.submit(_drain, waiting, done, failed, len(jobs), deadline)
            for _ in range(asked.pools)
        ]:
            one.result()
    write(cells, done, [c for c, _ in failed], (time.time() - started) / 60)
    for cell, text in failed:
        print(cell, text, sep="\n")
    print(f"{len(cells)} cells: {len(done) - len(failed)} passed, {len(failed)} failed,", end=" ")
    print(f"{len(cells) - len(done)} not run")
    return 1 if failed else 0


def _drain(
    waiting: Any, done: list[Cell], failed: list[tuple[Cell, str]], jobs: int, deadline: float
) -> None:
    """Run jobs on a pool of its own until none is left, or no time."""
    from tests.pool import Pool

    pool = Pool()
    try:
        while time.time() < deadline:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results = pool.run(job[0].world, check, job, torch.float64, "cpu", timeout=600)[0]
            except RuntimeError as error:  # a rank raised, or hangs
                results = [(False, str(error))] * len(job)
            failed += [(c, text) for c, (ok, text) in zip(job, results, strict=True) if not ok]
            done += job
            print(f"{jobs - waiting.qsize()}/{jobs} jobs begun, {len(failed)} differ", flush=True)
    finally:
        pool.close()


def write(
    cells: Sequence[Cell], done: Sequence[Cell], failed: Sequence[Cell], minutes: float
) -> None:
    lines = [
        "# The parity matrix",
        "",
        "`make matrix`: every cell is one `nemo2.verify` in float64 at 1e-9 against the unsplit"
        " model on one",
        "device (loss, every gradient, gradient norm, weights after one AdamW step), on gloo"
        " processes.",
        "",
        f"torch {torch.__version__.split('+')[0]}, Python {sys.version.split()[0]},"
        f" {minutes:.0f} minutes on {os.cpu_count()} cores: {len(done)} of the {len(cells)} cells"
        " of the product were run,",
        f"{len(done) - len(failed)} of them equal one device.",
        "",
        "Each entry: cells equal / run / in the product, over the kinds of data parallelism (ddp,"
        " zero1, fsdp,",
        "fsdp that reshards; on dp=4 hybrid shard with 2 replicas), 1, 2, 5 and 8 microbatches,"
        " 1F1B and interleaved",
        "1F1B (2 virtual stages, 5 blocks), ring, all-gather and Ulysses attention, and sequence"
        " parallelism on and off;",
        "`remat` (none, full, selective) is dealt out over them. The model with dropout is compared"
        " with nemo2 on one device.",
        "",
        "| mesh | " + " | ".join(ZOO) + " |",
        "|---" * (len(ZOO) + 1) + "|",
    ]
    ran, bad = set(done), set(failed)
    for sizes in dict.fromkeys(tuple(c.sizes.items()) for c in sorted(cells, key=_order)):
        row = []
        for model in ZOO:
            own = [c for c in cells if c.model == model and tuple(c.sizes.items()) == sizes]
            here = [c for c in own if c in ran]
            good = sum(c not in bad for c in here)
            row.append(f"{good} / {len(here)} / {len(own)}" if own else "")
        mesh = " ".join(f"{axis}{n}" for axis, n in sizes if n > 1) or "one device"
        lines.append(f"| {mesh} | " + " | ".join(row) + " |")
    Path(__file__).parent.parent.joinpath("docs", "matrix.md").write_text("\n".join(lines) + "\n")


def _order(cell: Cell) -> tuple[int, ...]:
    return (cell.world, *cell.sizes.values())


if __name__ == "__main__":
    sys.exit(main())

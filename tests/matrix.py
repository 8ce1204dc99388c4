"""The parity matrix: every model on every mesh, data-parallel kind, schedule and microbatch count.

``python -m tests.matrix`` runs the whole product and writes ``docs/matrix.md``; the tests run
a covering design in which every pair of options occurs.
"""

from __future__ import annotations

import itertools
import os
import queue
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
SCHEDULES = (("1f1b", 1, None), ("interleaved", 2, 5))


@dataclass(frozen=True)
class Cell:
    """One combination of options."""

    model: str
    dp: int
    pp: int
    tp: int
    kind: str
    microbatches: int
    schedule: str = "1f1b"
    virtual_stages: int = 1
    layers: int | None = None

    @property
    def world(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        return tuple(vars(self).items())

    def __str__(self) -> str:
        return (
            f"{self.model}, dp={self.dp} pp={self.pp} tp={self.tp} {self.kind} x{self.microbatches}"
            f" {self.schedule}"
        )

    @property
    def runs(self) -> bool:
        """Whether the model takes this ``tp``, and Megatron this count in this schedule."""
        rounds = self.schedule == "1f1b" or (self.pp > 1 and self.microbatches % self.pp == 0)
        return rounds and self.tp <= ZOO[self.model].max_tp


def product(sizes: Sequence[int] = (1, 2)) -> list[Cell]:
    plain = [kind for kind in KINDS if kind != "hsdp"]
    cells = [
        *itertools.product(ZOO, sizes, sizes, sizes, plain, MICROBATCHES),
        *itertools.product(ZOO, [4], sizes, sizes, ["hsdp"], MICROBATCHES),
    ]
    found = [Cell(*cell, *how) for cell in cells for how in SCHEDULES]
    return [c for c in found if c.runs and c.world <= 8]


def covering(cells: Sequence[Cell]) -> list[Cell]:
    """Choose cells, greedily, until every pair of options of ``cells`` occurs."""
    pairs = {c: set(itertools.combinations(c.options, 2)) for c in cells}
    missing = set().union(*pairs.values())
    chosen: list[Cell] = []
    while missing:
        best = max(cells, key=lambda c: len(pairs[c] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return sorted(chosen, key=str)


def check(cells: Sequence[Cell], dtype: torch.dtype, device: str) -> list[tuple[bool, str]]:
    """Verify each cell in the running process group; the same answer on every rank."""
    return [check_one(cell, dtype, device) for cell in cells]


def check_one(cell: Cell, dtype: torch.dtype, device: str) -> tuple[bool, str]:
    case = ZOO[cell.model] if cell.layers is None else ZOO[cell.model].with_layers(cell.layers)
    report = nemo2.verify(
        case,
        token_ids(cell.dp * cell.microbatches * (2 if cell.microbatches == 1 else 1)),
        case.loss,
        {"dp": cell.dp, "pp": cell.pp, "tp": cell.tp},
        device=device,
        dtype=dtype,
        rules=case.rules,
        data_parallel=KINDS[cell.kind],
        pipeline=nemo2.Pipeline(cell.microbatches, cell.schedule, cell.virtual_stages),
    )
    return report.ok, str(report)


def main() -> int:
    cells = product()
    started = time.time()
    jobs = [
        same[i : i + 16]
        for world in (8, 4, 2, 1)
        for same in [[c for c in cells if c.world == world]]
        for i in range(0, len(same), 16)
    ]
    waiting = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    failed: list[tuple[Cell, str]] = []
    at_once = max(1, (os.cpu_count() or 1) // 10)
    with ThreadPoolExecutor(at_once) as threads:
        for done in [threads.submit(_drain, waiting, failed, len(jobs)) for _ in range(at_once)]:
            done.result()
    write(cells, [c for c, _ in failed], (time.time() - started) / 60)
    for cell, text in failed:
        print(cell, text, sep="\n")
    print(f"{len(cells) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def _drain(waiting: Any, failed: list[tuple[Cell, str]], jobs: int) -> None:
    """Run jobs on a pool of its own until none is left."""
    from tests.pool import Pool

    pool = Pool()
    try:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            results = pool.run(job[0].world, check, job, torch.float64, "cpu", timeout=600)[0]
            failed += [(c, text) for c, (ok, text) in zip(job, results, strict=True) if not ok]
            print(f"{jobs - waiting.qsize()}/{jobs} jobs begun, {len(failed)} differ", flush=True)
    finally:
        pool.close()


def write(cells: Sequence[Cell], failed: Sequence[Cell], minutes: float) -> None:
    lines = [
        "# The parity matrix",
        "",
        "`make matrix`: every cell is one `nemo2.verify` in float64 at 1e-9 against the unsplit"
        " model on one",
        "device (loss, every gradient, gradient norm, weights after one AdamW step), on gloo"
        " processes.",
        "",
        f"torch {torch.__version__.split('+')[0]}, Python {sys.version.split()[0]},"
        f" {minutes:.0f} minutes on {os.cpu_count()} cores: "
        f"{len(cells) - len(failed)} of {len(cells)} cells equal one device.",
        "",
        "Each entry: cells equal / cells, over the kinds of data parallelism (ddp, zero1, fsdp,"
        " fsdp",
        "that reshards; on dp=4 hybrid shard with 2 replicas) and 1, 2, 5 and 8 microbatches, and"
        " with pp2 over",
        "1F1B and, with 2 and 8 microbatches, interleaved 1F1B (2 virtual stages).",
        "",
    ]
    meshes = sorted({(c.dp, c.pp, c.tp) for c in cells})
    names = [f"dp{d} pp{p} tp{t}" for d, p, t in meshes]
    lines += ["| model | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for model in ZOO:
        row = []
        for mesh in meshes:
            own = [c for c in cells if c.model == model and (c.dp, c.pp, c.tp) == mesh]
            good = sum(c not in failed for c in own)
            row.append(f"{good} / {len(own)}" if own else "")
        lines.append(f"| {model} | " + " | ".join(row) + " |")
    Path(__file__).parent.parent.joinpath("docs", "matrix.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())

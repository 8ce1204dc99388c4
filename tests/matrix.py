"""The parity matrix: every model on every mesh with every option of the engine.

``python -m tests.matrix`` runs the product and writes ``docs/matrix.md`` and ``.json``; with
``--minutes n`` what fits, in an order that is spread over all options, and with ``--resume`` what
has not passed yet. The tests run a covering design in which every pair of options occurs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import random
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
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
SCHEDULES = {"1f1b": (1, None), "interleaved": (2, 5)}
REMAT = (None, "full", "selective")
CACHING = ("llama", "llama tied", "gpt2")  # with a cache in their blocks, as they are by default
_COST = {1: 1.0, 2: 1.3, 4: 2.0, 8: 6.0}  # of a cell, by its processes, on two cores
_SAVING = threading.Lock()
RESULTS = Path(__file__).parents[1] / "docs" / "matrix.json"
METHODS = ("ring", "all_gather", "ulysses")

Results = dict[str, str | bool]  # of a cell: the torch under which it was equal, or False


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

    def runs(self) -> bool:
        """Whether the model takes this ``tp``."""
        return self.tp <= ZOO[self.model].max_tp and self.world <= 8


def plain(model: str, microbatches: int, **sizes: int) -> Cell:
    """Return the cell of a mesh with every option at its default."""
    one = {"dp": 1, "pp": 1, "cp": 1, "tp": 1} | sizes
    return Cell(model, *one.values(), "fsdp", microbatches, "1f1b", "ring", None)


def product(
    models: Sequence[str] = tuple(ZOO), largest: int = 8, *, dealt: bool = False
) -> list[Cell]:
    """Return every combination; ``dealt`` deals out microbatches, sequence parallelism and remat.

    Dealt out means that each combination of the other options has one of theirs, by a hash.
    """
    return [c for c in _product(models, dealt) if c.runs and c.world <= largest]


def _product(models: Sequence[str], dealt: bool) -> Iterator[Cell]:
    for dp, pp, cp, tp in itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 2)):
        kinds = [k for k in KINDS if k != "hsdp"] if dp * cp > 1 else [None]
        for model, kind, schedule, method in itertools.product(
            models,
            ["hsdp"] if dp == 4 else kinds,
            SCHEDULES if pp > 1 else [None],
            METHODS if cp > 1 else [None],
        ):
            # Megatron interleaves counts that its stages divide.
            counts = [m for m in MICROBATCHES if schedule != "interleaved" or m % pp == 0]
            rest = itertools.product(
                counts,
                [True, False] if tp > 1 else [None],
                [None] if model in CACHING else REMAT,
            )
            every = [
                Cell(model, dp, pp, cp, tp, kind, m, schedule, method, sequence, remat)
                for m, sequence, remat in rest
            ]
            if dealt:
                every = [every[zlib.crc32(str(every[0]).encode()) % len(every)]]
            yield from every


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
    parser.add_argument("--resume", action="store_true", help=f"skip what passed in {RESULTS}")
    asked = parser.parse_args()
    cells = product(dealt=True)
    cells += [plain(m, 2, dp=2, pp=2, cp=2, tp=2) for m in ZOO]  # all axes, 16 processes
    resumed = asked.resume and RESULTS.exists()
    results: Results = json.loads(RESULTS.read_text()) if resumed else {}
    deadline = time.time() + asked.minutes * 60
    todo = [c for c in cells if not results.get(str(c))]
    random.Random(0).shuffle(todo)
    jobs = [
        same[i : i + 2]  # the threads of gloo groups go when a job ends
        for world in (8, 4, 2, 1)
        for same in [[c for c in todo if c.world == world]]
        for i in range(0, len(same), 2)
    ]
    random.Random(1).shuffle(jobs)  # small and large worlds alike when time is short
    for some, pools in (jobs, asked.pools), ([[c] for c in todo if c.world == 16], 1):
        waiting: Any = queue.SimpleQueue()
        for job in some:
            waiting.put(job)
        with ThreadPoolExecutor(pools) as threads:
            for one in [threads.submit(_drain, waiting, results, deadline) for _ in range(pools)]:
                one.result()
    save(results)
    write(cells, results)
    passed = sum(bool(results.get(str(c))) for c in cells)
    failed = sum(results.get(str(c)) is False for c in cells)
    print(f"{len(cells)} cells: {passed} passed, {failed} failed, others not run")
    return 1 if failed else 0


def _drain(waiting: Any, results: Results, deadline: float) -> None:
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
                answers = pool.run(job[0].world, check, job, torch.float64, "cpu", timeout=300)[0]
            except RuntimeError as error:  # a rank raised, or hangs
                answers = [(False, str(error))] * len(job)
            for cell, (ok, text) in zip(job, answers, strict=True):
                results[str(cell)] = ok and torch.__version__.split("+")[0]
                if not ok:
                    print(cell, text, sep="\n")
            save(results)  # a run that is cut off keeps what it has
            print(f"{len(results)} run, {waiting.qsize()} jobs wait", flush=True)
    finally:
        pool.close()


def write(cells: Sequence[Cell], results: Results) -> None:
    failed = sum(results.get(str(c)) is False for c in cells)
    passed = Counter(v for c in cells if (v := results.get(str(c))))
    versions = ", ".join(f"{n} under torch {version}" for version, n in sorted(passed.items()))
    lines = [
        "# The parity matrix",
        "",
        "`make matrix`: every cell is one `nemo2.verify` in float64 at 1e-9 against the unsplit"
        " model on one",
        "device (loss, every gradient, gradient norm, weights after one AdamW step), on gloo"
        " processes.",
        "",
        f"Of {len(cells)} cells {sum(passed.values())} equal one device ({versions}), {failed} do"
        " not, the others were not run.",
        "",
        "Each entry: cells equal / run / in the product, over the kinds of data parallelism (ddp,"
        " zero1, fsdp,",
        "fsdp that reshards; on dp=4 hybrid shard with 2 replicas), 1F1B and interleaved 1F1B (2"
        " virtual stages,",
        "5 blocks), ring, all-gather and Ulysses attention. Dealt out over them: 1, 2, 5 and 8"
        " microbatches,",
        "sequence parallelism on and off, and `remat` (none, full, selective). The model with"
        " dropout is compared",
        "with nemo2 on one device.",
        "",
        "| mesh | " + " | ".join(ZOO) + " |",
        "|---" * (len(ZOO) + 1) + "|",
    ]
    for sizes in dict.fromkeys(tuple(c.sizes.items()) for c in sorted(cells, key=_order)):
        row = []
        for model in ZOO:
            own = [c for c in cells if c.model == model and tuple(c.sizes.items()) == sizes]
            here = [bool(results[str(c)]) for c in own if str(c) in results]
            row.append(f"{sum(here)} / {len(here)} / {len(own)}" if own else "")
        mesh = " ".join(f"{axis}{n}" for axis, n in sizes if n > 1) or "one device"
        lines.append(f"| {mesh} | " + " | ".join(row) + " |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def save(results: Results) -> None:
    with _SAVING:
        RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")


def _order(cell: Cell) -> tuple[int, ...]:
    return (cell.world, *cell.sizes.values())


if __name__ == "__main__":
    sys.exit(main())

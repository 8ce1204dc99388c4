"""Tables of ``benchmarks.train``: all peers of a row in one go, row by row, resumable.

``python -m benchmarks.performance --rows all`` runs what ``docs/performance.json`` does not have
yet, writes each result at once, and at the end ``docs/performance.md`` with its plot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo2.mesh import MeshSizes

from .attribution import KINDS
from .train import PEERS

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "performance.json"


@dataclass(frozen=True)
class Row:
    """One line of the table: what all of its peers run, in one go."""

    shape: str
    mesh: str
    attention: str = "flash"
    virtual_stages: int = 1
    context: str = "ring"
    async_tp: bool = False
    eager: bool = False
    reshard: bool = False
    alone: bool = False

    @property
    def name(self) -> str:
        parts = [self.shape, self.mesh.replace(",", " x "), self.attention]
        parts += [f"{self.virtual_stages} chunks"] if self.virtual_stages > 1 else []
        parts += [self.context] if "cp=" in self.mesh else []
        parts += ["async tp"] if self.async_tp else []
        parts += ["eager"] if self.eager else []
        parts += ["reshard"] if self.reshard else []
        parts += ["rank 0 alone"] if self.alone else []
        return ", ".join(parts)

    def command(self, peer: str, steps: int) -> list[str]:
        world = 1 if self.alone else MeshSizes.of(self.mesh).world
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
        given = {
            "shape": self.shape,
            "mesh": self.mesh,
            "attention": self.attention,
            "virtual-stages": self.virtual_stages,
            "context": self.context,
            "peer": peer,
            "steps": steps,
        }
        flags = [f"--{name}={value}" for name, value in given.items()]
        switches = ("async_tp", "eager", "reshard", "alone")
        flags += [f"--{name.replace('_', '-')}" for name in switches if getattr(self, name)]
        flags += ["--profile"] if torch.cuda.device_count() >= world else []
        return [*run, "-m", "benchmarks.train", *flags]


FOUR = [
    Row("8b16l", "dp=4", "cudnn"),
    Row("8b16l", "tp=4"),
    Row("8b16l", "tp=4", async_tp=True),
    Row("8b16l", "dp=2,tp=2"),
    Row("8b16l", "tp=2,pp=2"),
    Row("8b16l", "pp=4", virtual_stages=2),
    Row("1b", "dp=4"),
    Row("8b16l long", "cp=4"),
    Row("8b16l long", "cp=4", context="all_gather"),
]
TWO = [
    Row("8b8l", "tp=2"),
    Row("8b8l", "tp=2", async_tp=True),
    Row("8b8l", "dp=2", "cudnn"),
    Row("1b", "dp=2"),
    Row("8b8l", "pp=2"),
    Row("8b8l", "pp=2", virtual_stages=2),
    Row("8b8l long", "cp=2"),
    Row("8b8l long", "cp=2", context="all_gather"),
]
ONE = [
    Row("8b4l", "dp=1", "cudnn"),
    Row("8b4l", "dp=1", eager=True),
]
ALONE = [  # what one rank of four computes, where four are not at hand
    Row("8b16l", "dp=4", "cudnn", alone=True),
    Row("1b", "dp=4", alone=True),
    Row("8b16l", "dp=2,tp=2", alone=True),
    Row("8b16l", "tp=4", alone=True),
    Row("8b16l long", "cp=4", context="all_gather", alone=True),
]
TABLES = {
    "one": ONE,
    "alone": ALONE,
    "four": FOUR,
    "two": TWO,
    "cpu": [Row("tiny", "tp=2", "any", eager=True), Row("tiny", "pp=2", "any", eager=True)],
}


def run_row(row: Row, peers: Sequence[str], steps: int, timeout: float) -> list[dict[str, Any]]:
    """Run all peers of a row one after the other; a peer that fails says why."""
    results = []
    for peer in peers:
        # A cache of compiled code must not be shared between attention kernels.
        cache = Path("/tmp") / f"nemo2-inductor-{row.attention}"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        try:
            done = subprocess.run(
                row.command(peer, steps),
                env=env,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
            lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
            said = done.stderr.strip().splitlines()
            named = (x for x in reversed(said) if "Error" in x and "ChildFailedError" not in x)
            error = next(named, (said or ["no output"])[-1])
        except subprocess.TimeoutExpired:
            lines, error = [], f"it ran longer than {timeout:.0f} s"
        made = json.loads(lines[-1]) if lines else {"peer": peer, "error": error[-300:]}
        results.append({"row": row.name, **made})
        print(_line(results[-1]), flush=True)
    return results


def _line(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{result['row']:34} {result['peer']:9} failed: {result['error']}"
    return (
        f"{result['row']:34} {result['peer']:9} {result['ms']:9.1f} ms"
        f" {result['tokens_per_second_per_device']:9.0f} tokens/s/device"
        f" {100 * result['mfu']:5.1f} % MFU {result['peak_gib']:6.1f} GiB"
    )


def page(results: Sequence[dict[str, Any]], before: str, picture: str) -> str:
    """Return the page, with what was written by hand after the table kept."""
    measured = f"# Performance\n\n{report(results)}\n![speed]({picture})\n"
    _, heading, after = before.partition(_BY_HAND)
    return measured + heading + after


_BY_HAND = "\n## What was measured"


def report(results: Sequence[dict[str, Any]]) -> str:
    """Return the tables: for each row the peers, and nemo2's speed over the best of the others."""
    lines = [
        "Written by `python -m benchmarks.performance`. All peers of a row ran in one go on one"
        " machine; MFU counts the operations of forward and backward (causal attention half, no"
        " recomputation) against the matrix product that this machine reached in the same run."
        " Losses are those of the first steps from the same weights. *Rank 0 alone* has no"
        " communication: collectives return at once, so it tells what one rank computes, no speed.",
        "",
        "| shape, mesh | peer | ms a step | tokens/s/device | MFU | peak GiB | first step s"
        " | losses | on |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        if "error" in result:
            lines.append(f"| {result['row']} | {result['peer']} | {result['error']} | | | | | | |")
            continue
        losses = " ".join(f"{x:.3f}" for x in result["losses"][:3])
        lines.append(
            f"| {result['row']} | {result['peer']} | {result['ms']:.1f} |"
            f" {result['tokens_per_second_per_device']:.0f} | {100 * result['mfu']:.1f} % |"
            f" {result['peak_gib']:.1f} | {result['first_step_s']:.0f} | {losses} |"
            f" {result['device']} |"
        )
    lines += ["", *ratios(results), "", *attributions(results)]
    versions = sorted({r["torch"] for r in results if "torch" in r})
    return "\n".join([*lines, f"torch {', '.join(versions)}.", ""])


def attributions(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of where the time of one more step went, in milliseconds, by rank."""
    columns = [*KINDS, "idle"]
    rows = []
    for result in results:
        if "milliseconds" in result:
            cells = [_span([rank[c] for rank in result["milliseconds"]]) for c in columns]
            rows.append(f"| {result['row']} | {result['peer']} | " + " | ".join(cells) + " |")
    if not rows:
        return []
    return [
        "## Where the time goes",
        "",
        "One more step of each peer, traced: milliseconds of each kind of kernel, lowest to highest"
        " of the ranks. `communication` is what no computation hides, `idle` when nothing runs.",
        "",
        "| shape, mesh | peer | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 2) + "|",
        *rows,
        "",
    ]


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def ratios(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return for each row how nemo2's speed compares with the best peer's."""
    lines = []
    for row in dict.fromkeys(r["row"] for r in results):
        speed = {
            r["peer"]: r["tokens_per_second_per_device"]
            for r in results
            if r["row"] == row and "ms" in r
        }
        others = {peer: s for peer, s in speed.items() if peer != "nemo2"}
        if "nemo2" in speed and others:
            best = max(others, key=lambda peer: others[peer])
            ratio = speed["nemo2"] / others[best]
            lines.append(f"- {row}: nemo2 runs at {ratio:.2f} x the speed of {best}.")
    return lines


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the speed of each peer in each row as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [r for r in results if "ms" in r and not r.get("alone")]
    rows = list(dict.fromkeys(r["row"] for r in done))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.6 * len(rows)))
    for i, peer in enumerate(PEERS):
        own = {r["row"]: 100 * r["mfu"] for r in done if r["peer"] == peer}
        places = [n + 0.8 * i / len(PEERS) for n, row in enumerate(rows) if row in own]
        axes.barh(places, [own[row] for row in rows if row in own], 0.36, label=peer)
    axes.set_yticks([n + 0.2 for n in range(len(rows))], rows)
    axes.set_xlabel("MFU, % of the measured matrix product")
    axes.invert_yaxis()
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(PEERS))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", choices=tuple(TABLES), default="four")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one peer")
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(given)
    results: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else []
    for row in TABLES[args.rows]:
        there = [r for r in results if r["row"] == row.name and "ms" in r]
        if there and not args.again:
            continue
        made = run_row(row, args.peers.split(","), args.steps, args.timeout)
        results = [r for r in results if r["row"] != row.name] + made
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    written, picture = args.out.with_suffix(".md"), args.out.with_suffix(".png")
    before = written.read_text() if written.exists() else ""
    written.write_text(page(results, before, picture.name))
    plot(results, picture)


if __name__ == "__main__":
    main()

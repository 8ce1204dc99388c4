"""Draws the pictures with matplotlib; what they show comes from ``data.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrow, PathPatch, Rectangle
from matplotlib.path import Path as MplPath

from .data import Data

GREEN, ORANGE, BLUE, GREY, LIGHT = "#1b8a6b", "#e08a1e", "#3d6fb6", "#9aa3ad", "#eef1f4"
PALE = "#a9d8c8"
Box = tuple[float, float, float, float]  # left, top, width, height
RANKS = ("#1b8a6b", "#e08a1e", "#3d6fb6", "#a04a9c")
STYLE = {
    "svg.hashsalt": "nemo2",  # names inside the file do not change from run to run
    "svg.fonttype": "none",  # text stays text: small files
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9,
    "figure.facecolor": "white",
}


def draw(name: str, data: Data, folder: Path, kind: str = "svg") -> Path:
    """Draw one picture into ``folder``; an SVG gets the data as its description."""
    with matplotlib.rc_context(STYLE):
        figure = DRAWERS[name](data)
        path = folder / f"{name}.{kind}"
        about = {"Date": None, "Description": json.dumps(data)} if kind == "svg" else None
        figure.savefig(path, metadata=about, bbox_inches="tight", dpi=110)
        pyplot.close(figure)
    return path


def shown(path: Path) -> Any:
    """Return the data that a picture was drawn from."""
    tag = "{http://purl.org/dc/elements/1.1/}description"
    found = ElementTree.parse(path).getroot().iter(tag)
    return json.loads("".join(next(found).itertext()))


def _empty(axes: Axes, width: float, height: float) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")


def _box(axes: Axes, x: float, y: float, w: float, h: float, color: str, **how: Any) -> None:
    how = {"edgecolor": "white", "linewidth": 0.4} | how
    axes.add_patch(Rectangle((x, y), w, h, facecolor=color, **how))


def _boxes(axes: Axes, boxes: Iterable[Box], color: str) -> None:
    """Draw many boxes as one path, which keeps files small."""
    corners = [((x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y)) for x, y, w, h in boxes]
    code = (MplPath.MOVETO, *[MplPath.LINETO] * 3, MplPath.CLOSEPOLY)
    path = MplPath([at for box in corners for at in box], code * len(corners))
    axes.add_patch(PathPatch(path, facecolor=color, edgecolor="white", linewidth=0.4))


def mesh(data: Data) -> Figure:
    figure, grid = pyplot.subplots(2, 4, figsize=(9.4, 5.4))
    for number, (axes, rank) in enumerate(zip(grid.flat, data["ranks"], strict=True)):
        at = rank["at"]
        where = "  ".join(f"{axis}={at[axis]}" for axis in ("pp", "dp", "tp"))
        axes.set_title(f"rank {number}:  {where}", fontsize=9)
        _empty(axes, 9.0, 11.4)
        groups: dict[str, list[str]] = {}
        for name in data["shapes"]:
            parts = name.split(".")
            group = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
            groups.setdefault(group, []).append(name)
        whole, held = [], []
        for row, (group, names) in enumerate(groups.items()):
            y = 0.4 + row * 1.3
            axes.text(2.9, y + 0.75, group, ha="right", fontsize=8)
            width = 5.8 / len(names)
            for column, name in enumerate(names):
                place = 3.2 + column * width, y, width - 0.15, 1.1
                whole.append(place)
                held += _part(place, data["shapes"][name], rank["holds"][name])
        _boxes(axes, whole, LIGHT)
        if held:
            _boxes(axes, held, GREEN)
        axes.text(2.9, 10.6, "samples", ha="right", fontsize=8)
        row_of = {i: (3.2 + 0.72 * i, 10.1, 0.6, 0.6) for i in range(8)}
        own = [row_of.pop(i) for i in rank["samples"]]
        _boxes(axes, row_of.values(), LIGHT)
        _boxes(axes, own, ORANGE)
    figure.tight_layout(w_pad=0.2, h_pad=0.8)
    return figure


def _part(place: Box, shape: list[int], holds: list[list[list[int]]]) -> list[Box]:
    """Return what a rank holds of a parameter drawn at ``place``, its dim 0 downwards."""
    (x, y, w, h), (rows, columns) = place, shape
    return [
        (
            x + w * left / columns,
            y + h * top / rows,
            w * (right - left) / columns,
            h * (bottom - top) / rows,
        )
        for (top, bottom), (left, right) in holds
    ]


def data_parallel(data: Data) -> Figure:
    figure, grid = pyplot.subplots(3, 4, figsize=(9.4, 5.6))
    for (kind, what), line in zip(data["kinds"].items(), grid, strict=True):
        for number, (axes, rank) in enumerate(zip(line, what["ranks"], strict=True)):
            _empty(axes, 9.6, 5.2)
            axes.set_title(f"{kind}, rank {number}", fontsize=9)
            start, stop = (edge / what["rows"] for edge in rank["shard"])
            for column, name in enumerate(("parameters", "gradients", "optimizer")):
                x = 0.2 + column * 2.5
                axes.text(x + 1, 4.5, name, ha="center", fontsize=6.5)
                whole = what["whole during a step"] and name != "optimizer" and kind != "ddp"
                _box(axes, x, 0.2, 2, 3.6, PALE if whole else LIGHT)
                _box(axes, x, 0.2 + 3.6 * start, 2, 3.6 * (stop - start), GREEN)
            axes.text(8.5, 4.5, "samples", ha="center", fontsize=7)
            for i in range(8):
                own = ORANGE if i in rank["samples"] else LIGHT
                _box(axes, 8.1, 0.2 + i * 0.45, 0.8, 0.4, own)
    _legend(figure, {"kept": GREEN, "whole for the time of a step": PALE, "computed": ORANGE})
    return figure


def _legend(figure: Figure, entries: dict[str, str]) -> None:
    marks = [Rectangle((0, 0), 1, 1, color=color) for color in entries.values()]
    figure.legend(marks, list(entries), loc="lower center", ncols=len(entries), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1), w_pad=0.3, h_pad=0.6)


def tensor_parallel(data: Data) -> Figure:
    figure, axes = pyplot.subplots(figsize=(9.4, 3.6))
    _empty(axes, 60, 22)
    x, first = 1.0, True
    for name, (rows, columns) in data["shapes"].items():
        w, h = columns / 5, rows / 5
        for rank, holds in enumerate(data["ranks"]):
            for (top, bottom), (left, right) in holds[name]:
                corner = x + left / 5, 4 + top / 5
                _box(axes, *corner, (right - left) / 5, (bottom - top) / 5, RANKS[rank])
        label = name.removesuffix(".weight").replace("attention.", "attention\n")
        axes.text(x + w / 2, 3.4, label, ha="center", va="bottom", fontsize=8)
        split = "by output" if data["ranks"][0][name][0][0][1] < rows else "by input"
        axes.text(x + w / 2, 5 + h, f"({rows}, {columns})\n{split}", ha="center", va="top")
        if first:
            axes.text(x - 0.3, 4 + h / 2, "output", rotation=90, ha="right", va="center")
            first = False
        x += w + 4.2
    for rank, color in enumerate(RANKS[: len(data["ranks"])]):
        _box(axes, 1 + 9 * rank, 17.4, 1.4, 1.4, color)
        axes.text(3 + 9 * rank, 18.6, f"tp rank {rank}")
    return figure


def sequence_parallel(data: Data) -> Figure:
    figure, grid = pyplot.subplots(2, 1, figsize=(9.4, 5.6))
    titles = {"without": "sequence_parallel=False", "with": "sequence parallelism (default)"}
    for axes, (lane, title) in zip(grid, titles.items(), strict=True):
        _lane(axes, title, **data[lane])
    _legend(figure, {"each rank a part of the work": PALE, "all ranks the same": LIGHT})
    return figure


def _lane(axes: Axes, title: str, calls: list[Any], collectives: list[Any]) -> None:
    """Draw a block's calls in order; a call's collectives above (forward) and below (backward)."""
    _empty(axes, len(calls) * 10, 32)
    axes.set_title(title, fontsize=10, loc="left")
    short = {"layer_norm": "norm", "scaled_dot_product_attention": "attention", "add": "+"}
    for i, (module, name, split, shape) in enumerate(calls):
        x = 10 * i + 0.5
        label = module.rpartition(".")[2] if name == "linear" else short.get(name, name)
        _box(axes, x, 13, 9, 6, PALE if split else LIGHT, edgecolor=GREY, linewidth=0.6)
        axes.text(x + 4.5, 16, label, ha="center", va="center", fontsize=8)
        text = "x".join(map(str, shape))
        axes.text(x + 4.5, 21.2, text, ha="center", va="center", fontsize=6.5, color="#555")
    for module, _, direction, kind, _ in collectives:
        at, side = _place(calls, module)
        x = 10 * at + (0 if side == "before" else 10)
        up = direction == "forward"
        y = 10.2 if up else 23.6
        color = {"all-reduce": ORANGE, "all-gather": BLUE, "reduce-scatter": "#a04a9c"}[kind]
        step = 2.6 if up else -2.6
        axes.add_patch(
            FancyArrow(x, y, 0, step, width=0.7, head_width=2.2, head_length=1.2, color=color, lw=0)
        )
        place = y - 0.8 if up else y + 1.2
        axes.text(
            x, place, kind, ha="center", va="bottom" if up else "top", fontsize=7.5, color=color
        )
    axes.text(0, 2.5, "forward: left to right", fontsize=7.5, color=GREY)
    axes.text(0, 31, "backward: right to left", fontsize=7.5, color=GREY)


def _place(calls: list[Any], module: str) -> tuple[int, str]:
    """Return at which call a collective is, and on which side of it the value crosses."""
    inside = [i for i, (m, *_) in enumerate(calls) if m == module or m.startswith(f"{module}.")]
    if module.endswith((".out", "down")):  # the sum of a row-split product
        return inside[-1], "after"
    return inside[0], "before"


def context_parallel(data: Data) -> Figure:
    figure, grid = pyplot.subplots(1, 2, figsize=(9.4, 4.9))
    n = data["length"]
    titles = {"plain": "ContextParallel(balance=False)", "balanced": "balanced (default)"}
    for axes, (lane, title) in zip(grid, titles.items(), strict=True):
        _empty(axes, n + 0.2, n + 6.2)
        axes.set_aspect("equal")
        axes.set_title(title, fontsize=10)
        _boxes(axes, [(k, q, 1, 1) for q in range(n) for k in range(q + 1, n)], LIGHT)
        for rank, held in enumerate(data[lane]):
            cells = [(k, q, 1, 1) for q in held["positions"] for k in range(q + 1)]
            _boxes(axes, cells, RANKS[rank])
            y = n + 1.3 + rank * 1.2
            scale = (n - 6) / max(r["scores"] for r in data["plain"])
            _box(axes, 3.3, y, held["scores"] * scale, 0.95, RANKS[rank])
            axes.text(3.0, y + 0.8, f"rank {rank}", ha="right", fontsize=8)
            axes.text(3.6 + held["scores"] * scale, y + 0.8, f"{held['scores']} scores", fontsize=8)
        axes.text(n / 2, n + 0.9, "keys", ha="center", fontsize=8, color=GREY)
        axes.text(-0.3, n / 2, "queries", rotation=90, ha="right", va="center", color=GREY)
    figure.tight_layout(w_pad=1)
    return figure


def schedule(data: Data) -> Figure:
    figure, axes = pyplot.subplots(figsize=(9.4, 2.7))
    end = max(row[-1] for row in data["rows"])
    for rank in range(data["ranks"]):
        _box(axes, 0, rank + 0.08, end, 0.84, LIGHT)
    dark = {"forward": (BLUE, "#9db9dd"), "backward": (GREEN, "#8cc9b5")}
    for rank, stage, way, microbatch, start, stop in data["rows"]:
        color = dark[way][stage // data["ranks"]]
        _box(axes, start, rank + 0.08, stop - start, 0.84, color, linewidth=0.5)
        middle = (start + stop) / 2, rank + 0.5
        ink = "white" if color in (BLUE, GREEN) else "black"
        axes.text(*middle, str(microbatch + 1), ha="center", va="center", fontsize=7, color=ink)
    axes.set_xlim(0, end)
    axes.set_ylim(data["ranks"], 0)
    axes.set_yticks([r + 0.5 for r in range(data["ranks"])])
    axes.set_yticklabels([f"rank {r}" for r in range(data["ranks"])])
    axes.tick_params(left=False)
    axes.set_xlabel("ms")
    axes.spines[:].set_visible(False)
    busy = sum(row[-1] - row[-2] for row in data["rows"]) / (end * data["ranks"])
    marks = {"forward": BLUE, "backward": GREEN, f"waiting ({1 - busy:.0%})": LIGHT}
    patches = [Rectangle((0, 0), 1, 1, color=color) for color in marks.values()]
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "frameon": False}
    axes.legend(patches, list(marks), fontsize=8, **above)
    return figure


DRAWERS: dict[str, Callable[[Data], Figure]] = {
    "mesh": mesh,
    "data_parallel": data_parallel,
    "tensor_parallel": tensor_parallel,
    "sequence_parallel": sequence_parallel,
    "context_parallel": context_parallel,
    "schedule_1f1b": schedule,
    "schedule_interleaved": schedule,
}

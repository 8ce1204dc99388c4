"""Bytes of text files as training windows, and the loss curve."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset


def default_files() -> list[Path]:
    """The source of Python's standard library."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def read_bytes(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Return the bytes to train on, and those of every 20th file (or the end) held out."""
    texts = [
        torch.frombuffer(bytearray(f.read_bytes()), dtype=torch.uint8)
        for f in files
        if f.stat().st_size
    ]
    if len(texts) < 20:
        whole = torch.cat(texts)
        return whole[: len(whole) * 19 // 20], whole[len(whole) * 19 // 20 :]
    return torch.cat([t for i, t in enumerate(texts) if i % 20]), torch.cat(texts[::20])


class Windows(Dataset[Tensor]):
    """``count`` windows of ``length + 1`` bytes at places that depend only on the seed."""

    def __init__(self, text: Tensor, length: int, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.text, self.length = text, length
        self.starts = torch.randint(len(text) - length, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.text[start : start + self.length + 1].long()


def save_curve(losses: Sequence[float], held_out: float, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(losses, label="training")
    axes.axhline(
        held_out, linestyle="--", color="grey", label=f"held-out at the end: {held_out:.2f}"
    )
    axes.set(xlabel="step", ylabel="nats per byte")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path

"""What a checkpoint costs a training: saving in the foreground, in the background, loading.

``python -m benchmarks.checkpoint_time`` trains a GPT with AdamW in one process, on a GPU if there
is one. Times are medians of five, in seconds; a save in the background is what ``nemo2.save`` keeps
the training from going on, and the steps beside it are those that run while it writes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemo2

VOCABULARY = 512


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss_of(module: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(module(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    model = nemo2.parallelize(Net(args.width, args.layers), nemo2.make_mesh())
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(VOCABULARY, (args.tokens // 128, 129))

    def step() -> None:
        model.backward(loss_of, ids)
        optimizer.step()
        optimizer.zero_grad()

    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint")
        step()
        for _ in range(5):
            found.setdefault("step", []).append(timed(step))
        for _ in range(5):
            save = lambda: nemo2.save(path, model, optimizer=optimizer)  # noqa: E731
            found.setdefault("save in the foreground", []).append(timed(save))
        for _ in range(5):
            made: list[Any] = []
            late = lambda made=made: made.append(  # noqa: E731
                nemo2.save(path, model, optimizer=optimizer, asynchronous=True)
            )
            found.setdefault("save in the background", []).append(timed(late))
            found.setdefault("a step beside it", []).append(timed(step))
            made[0].wait()
        for _ in range(5):
            load = lambda: nemo2.load(path, model, optimizer=optimizer)  # noqa: E731
            found.setdefault("load", []).append(timed(load))
        size = sum(file.stat().st_size for file in path.iterdir())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{device}, torch {torch.__version__}, {size / 1e6:.0f} MB")
    for what, times in found.items():
        print(f"{what}: {statistics.median(times):.3f} s")


if __name__ == "__main__":
    main()

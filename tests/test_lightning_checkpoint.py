"""The Trainer goes on with the next sample, on the same mesh and on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import nemo2
from tests.lightning_programs import Lit, Record, data, ignore_upstream_warnings, trainer

STEPS, HALF, GLOBAL = 10, 5, 8


class Trained(Lit):
    """With dropout, late construction, hyperparameters, and a state of its own."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2, late=True)
        self.save_hyperparameters({"width": 3, "sizes": (1, 2)})
        self.register_buffer("count", torch.zeros(()))
        self.told: dict[int, Any] = {}

    def on_train_batch_start(self, *rest: Any) -> None:
        self.count += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["told"] = {5: (torch.ones(2), float("inf")), "path": Path("a")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.told = checkpoint["told"]


def run(
    folder: str,
    strategy: dict[str, Any],
    devices: int,
    *,
    ckpt_path: str | None = None,
    samples: int = 64,
    workers: int = 0,
    total: int = GLOBAL,
    **options: Any,
) -> dict[str, Any]:
    """Train; the epoch has 8 steps. Saves at the end of each fifth step, and after each epoch."""
    ignore_upstream_warnings()
    torch.manual_seed(1)
    record = Record()
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=HALF, save_top_k=-1)
    ends = ModelCheckpoint(
        folder, "{epoch}-end", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1
    )
    stop = EarlyStopping("val_loss", patience=9, check_finite=True)
    callbacks = [record, saves, ends, stop]
    options = {"max_steps": STEPS, "max_epochs": 3, "val_check_interval": 1.0} | options
    strategy = nemo2.MegatronStrategy(**strategy)
    made = trainer(
        folder,
        callbacks=callbacks,
        strategy=strategy,
        devices=devices,
        enable_checkpointing=True,
        **options,
    )
    module = Trained()
    loader = data(total // strategy.asked["dp"], samples, True, workers)
    made.fit(module, loader, data(4, 16), ckpt_path=ckpt_path)
    return {
        "losses": record.losses,
        "dp": made.strategy.mesh.get_local_rank("dp"),
        "samples": record.samples,
        "count": float(module.count),
        "rate": made.optimizers[0].param_groups[0]["lr"],
        "stop": stop.state_dict(),
        "told": module.told,
        "drawn": torch.rand(2).tolist(),
    }


def order_of(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """Return the samples of each step in global order: ranks of ``dp`` have them in turns."""
    readers = {rank["dp"]: rank["samples"] for rank in ranks}
    for rank in ranks:
        assert rank["samples"] == readers[rank["dp"]]
    steps = zip(*(readers[r] for r in sorted(readers)), strict=True)
    return [[x for same in zip(*own, strict=True) for x in same] for own in steps]


TWO = nemo2.Pipeline(microbatches=2)
SAVED: list[tuple[dict[str, Any], str]] = [
    ({"dp": 2, "tp": 2}, "dp2tp2"),
    ({"dp": 1, "pp": 2, "tp": 2, "pipeline": TWO}, "pp2tp2"),
]
ELSEWHERE = [
    {"dp": 4},
    {"dp": 1, "pp": 4, "pipeline": nemo2.Pipeline(4)},
    {"dp": 1, "tp": 4},
    {"dp": 2, "cp": 2, "context_parallel": nemo2.ContextParallel(balance=False)},
]


def several(folder: str, meshes: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    return [run(f"{folder}/{i}", mesh, 4, ckpt_path=path) for i, mesh in enumerate(meshes)]


@pytest.mark.parametrize("at", [0, 1])
def test_goes_on_with_the_next_sample_on_any_mesh(pool, tmp_path, at):
    mesh, name = SAVED[at]
    folder = str(tmp_path / name)
    whole = pool.run(4, run, folder, mesh, 4)
    path = f"{folder}/step=5.ckpt"
    order = order_of(whole)
    assert len(order) == STEPS
    assert len({x for step in order[:8] for x in step}) == 64  # each one once in an epoch
    again = pool.run(4, run, f"{folder}-again", mesh, 4, ckpt_path=path)
    for rank, first in zip(again, whole, strict=True):
        for key in ("losses", "samples"):
            assert rank[key] == first[key][HALF:], key
        for key in ("count", "rate", "stop", "drawn"):
            assert str(rank[key]) == str(first[key]), key
        assert rank["told"]["path"] == Path("a")
        assert rank["told"][5][1] == float("inf")
        assert torch.equal(rank["told"][5][0], torch.ones(2))
    there = ELSEWHERE[2 * at : 2 * at + 2]
    found = list(zip(*pool.run(4, several, str(tmp_path / "there"), there, path), strict=True))
    if at:
        found.append(tuple(pool.run(1, run, str(tmp_path / "one"), {"dp": 1}, 1, ckpt_path=path)))
    for ranks in found:
        assert order_of(list(ranks)) == order[HALF:]
        for rank in ranks:
            assert rank["losses"] == pytest.approx(whole[0]["losses"][HALF:], rel=1e-9)
            assert rank["count"] == STEPS

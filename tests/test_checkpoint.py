"""Checkpoints of training: any mesh to any mesh, always a whole one, what is wrong with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nemo2
from nemo2 import DataParallel, Pipeline
from nemo2.sharding.storage import local_of
from tests.models import Dropout, DropoutBlock, FusedBlock, next_token, token_ids

STEPS, HALF, BATCH = 10, 5, 8


class Trained(Dropout):
    """Tied, with dropout, fused projections, a parameter without dims and a buffer."""

    def __init__(self) -> None:
        super().__init__(layers=0)
        self.layers.extend([DropoutBlock(), FusedBlock(), DropoutBlock(), FusedBlock()])
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


def fresh(seed: int) -> Trained:
    torch.manual_seed(seed)
    return Trained().double()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, one without weight decay."""
    params = dict(model.named_parameters())
    plain = [p for p in params.values() if p.ndim < 2]
    rest = [p for p in params.values() if p.ndim >= 2]
    groups = [{"params": rest}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-6)


class Run:
    """A training on some mesh, in the torch way."""

    def __init__(self, mesh: dict[str, int], seed: int, **options: Any) -> None:
        self.model = nemo2.parallelize(fresh(seed), nemo2.make_mesh(**mesh), **options)
        self.optimizer = optimizer_of(self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1 / (1 + n))
        self.at = 0

    def train(self, until: int) -> list[float]:
        losses = []
        groups = self.model.groups
        for step in range(self.at, until):
            batch = token_ids(BATCH * STEPS)[step * BATCH : (step + 1) * BATCH]
            own = batch.chunk(groups.sizes.dp)[groups.dp_rank]
            losses.append(float(self.model.backward(next_token, own)))
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.model.module.seen += step
        self.at = until
        return losses

    def save(self, path: str, **options: Any) -> Any:
        extra = {"schedule": self.schedule.state_dict(), "step": self.at}
        return nemo2.save(path, self.model, optimizer=self.optimizer, extra=extra, **options)

    def load(self, path: str) -> None:
        extra = nemo2.load(path, self.model, optimizer=self.optimizer).extra
        self.schedule.load_state_dict(extra["schedule"])
        self.at = extra["step"]


CELLS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp2 tp2": ({"dp": 2, "tp": 2}, {}),
    "pp2 tp2": ({"pp": 2, "tp": 2}, {"pipeline": Pipeline(2)}),
    "dp2 pp2": ({"dp": 2, "pp": 2}, {"pipeline": Pipeline(2), "data_parallel": "ddp"}),
    "tp4": ({"tp": 4}, {}),
    "pp4": ({"pp": 4}, {"pipeline": Pipeline(4)}),
    "virtual": ({"pp": 2, "dp": 2}, {"pipeline": Pipeline(2, "interleaved", 2)}),
    "fsdp": ({"dp": 4}, {}),
    "hybrid": ({"dp": 4}, {"data_parallel": DataParallel("zero1", replicate=2)}),
    "ddp": ({"dp": 4}, {"data_parallel": "ddp"}),
    "dp2 cp2": ({"dp": 2, "cp": 2}, {}),
}


def begin(folder: str, cell: str) -> dict[str, Any]:
    """Train without interruption, saving at half time; then go on from there on the same mesh."""
    mesh, options = CELLS[cell]
    path = f"{folder}/{cell}"
    whole = Run(mesh, 1, **options)
    losses = whole.train(HALF)
    whole.save(path)
    after = torch.rand(3)
    losses += whole.train(STEPS)
    again = Run(mesh, 2, **options)
    again.load(path)
    same = torch.equal(after, torch.rand(3))
    resumed = again.train(STEPS)
    pairs = zip(whole.model.params.values(), again.model.params.values(), strict=True)
    equal = all(torch.equal(local_of(a), local_of(b)) for a, b in pairs)
    return {"losses": losses, "resumed": resumed, "same": same and equal}


def resume(path: str, cells: list[str]) -> dict[str, Any]:
    """Go on from a checkpoint on other meshes."""
    found = {}
    for cell in cells:
        mesh, options = CELLS.get(cell, ({}, {}))
        run = Run(mesh, 3, **options)
        run.load(path)
        found[cell] = run.train(STEPS), run.model.module.seen.tolist()
    return found


@pytest.mark.parametrize("cell", ["dp2 tp2", "pp2 tp2", "dp2 pp2"])
def test_any_mesh_to_any_mesh(pool, tmp_path, cell):
    """Bit-exact on the same mesh; equal within rounding (of sums in another order) elsewhere."""
    others = {
        "dp2 tp2": ["pp4", "dp2 cp2", "virtual"],
        "pp2 tp2": ["tp4", "fsdp", "hybrid"],
        "dp2 pp2": ["ddp", "pp2 tp2"],
    }[cell]
    for first in (results := pool.run(4, begin, str(tmp_path), cell)):
        assert first["resumed"] == first["losses"][HALF:]
        assert first["same"]
    want = pytest.approx(results[0]["losses"][HALF:], rel=1e-9)
    path = str(tmp_path / cell)
    for rank in (*pool.run(4, resume, path, others), *pool.run(1, resume, path, ["one device"])):
        for losses, seen in rank.values():
            assert losses == want
            assert seen == [sum(range(STEPS))] * 3

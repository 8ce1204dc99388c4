"""What a training step does beside its loss, on the last stage only, or while it is planned."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import CatMetric

import nemo2
from nemo2 import Pipeline, shard
from tests.lightning_programs import Lit, data, trainer
from tests.pool import Pool

TWO = {"pp": 2, "pipeline": Pipeline(2)}
INTERLEAVED = {"pp": 2, "pipeline": Pipeline(2, "interleaved", 2)}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Same(nn.Module):
    """Returns what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scale() for _ in range(4))
        shard(self.layers, "pp")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Noise(Lit):
    """Draws what goes into the model and into the loss: torch's numbers, or factors of the host."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = Same(), kind
        self.drawn: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].double()
        if self.kind == "torch":
            x = torch.randn_like(x)
        elif self.kind == "numpy":
            x = x * np.random.rand()
        else:
            x = x * random.random()
        self.drawn.append(float(x.flatten()[0]) if x.device.type == "cpu" else 0.0)
        return F.mse_loss(self.net(x), x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def drawn(folder: str, mesh: dict[str, Any] | None, kind: str) -> tuple[list[float], list[float]]:
    """Return the losses, and of what each step first drew what the module keeps."""
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    options: dict[str, Any] = {"limit_val_batches": 0, "gradient_clip_val": None}
    if mesh is not None:
        options |= {"strategy": nemo2.MegatronStrategy(**mesh), "devices": mesh["pp"]}
    losses: list[float] = []

    class Note(L.Callback):
        def on_train_batch_end(self, t: Any, m: Any, outputs: Any, *rest: Any) -> None:
            losses.append(float(outputs["loss"]))

    made, module = trainer(folder, max_steps=4, callbacks=[Note()], **options), Noise(kind)
    made.fit(module, data(8, 40), data(8, 16))
    return losses, module.drawn


@pytest.mark.parametrize("kind", ["torch", "numpy", "random"])
@pytest.mark.parametrize("mesh", [{"pp": 2}, TWO, INTERLEAVED], ids=["one", "two", "interleaved"])
def test_stages_draw_the_same_numbers(
    pool: Pool, tmp_path: Any, mesh: dict[str, Any], kind: str
) -> None:
    got = pool.run(2, drawn, str(tmp_path), mesh, kind)
    for losses, _ in got:
        assert losses == [0.0] * 4
    if kind != "torch" and mesh == {"pp": 2}:  # the numbers of one device
        want = drawn(str(tmp_path), None, kind)[1]
        assert got[0][1] == got[1][1] == want


class Draws(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.rand_like(x)


def draws_both(device: str) -> None:
    model = Same()
    model.layers = nn.ModuleList(Draws() for _ in range(4))
    shard(model.layers, "pp")
    parallel = nemo2.parallelize(model, nemo2.make_mesh(pp=2, device=device))

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(torch.randn_like(x)).mean()

    with pytest.warns(UserWarning, match=r"outside of blocks \(randn_like\), and stages draw"):
        parallel.backward(loss_fn, torch.ones(4, 2))


def test_stages_that_draw_different_numbers_are_told(pool: Pool) -> None:
    pool.run(2, draws_both, pool.device)


class Stops(Lit):
    """Ends the training, sets options of the optimizer, and empties a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.cat = CatMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for group in self.optimizers().param_groups:
            group["weight_decay"] = group["weight_decay"] + 1.0
        loss, _ = self.loss(batch)
        self.log("loss", loss)
        self.log("narrow", np.float32(1.5))
        for group in self.optimizers().param_groups:
            group["eps"] = 0.1 * (1 + batch_idx)
        if batch_idx == 2:
            self.cat.reset()
        self.cat.update(torch.tensor(float(batch_idx)))
        if loss.item() < 0 or batch_idx == 3:  # planned with any value
            self.trainer.should_stop = True
        return loss


def stops(folder: str, mesh: dict[str, Any] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if mesh is not None:
        options = {"strategy": nemo2.MegatronStrategy(**mesh), "devices": mesh["pp"]}
    made = trainer(folder, limit_val_batches=0, **options)
    torch.manual_seed(1)
    module = Stops()
    made.fit(module, data(8, 80), data(8, 16))
    (group,) = made.optimizers[0].param_groups
    return {
        "step": made.global_step,
        "decay": group["weight_decay"],
        "eps": group["eps"],
        "cat": module.cat.compute().tolist(),
        "narrow": float(made.callback_metrics["narrow"]),
        "loss": pytest.approx(float(made.callback_metrics["loss"]), abs=1e-9),
    }


def test_what_a_step_sets_is_set_on_all_stages(pool: Pool, tmp_path: Any) -> None:
    want = stops(str(tmp_path), None)
    assert want["step"] == 4
    for got in pool.run(2, stops, str(tmp_path), {"pp": 2}):
        assert got == want


class LogsEarly(nn.Module):
    def __init__(self, lit: Any, net: nn.Module) -> None:
        super().__init__()
        self.__dict__["lit"] = lit
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        x = self.net.embed(ids)
        self.lit.log("size", x.square().mean())
        for layer in self.net.layers:
            x = layer(x)
        return self.net.head(self.net.norm(x))


class Early(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.net = LogsEarly(self, self.net)


class Late(Lit):
    """Asks from the second batch on for a parameter of the first stage."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        return loss + self.net.embed.weight.square().sum() if batch_idx else loss


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Early, "self.log('size', ...): an earlier stage has computed the value"),
        (Late, "the loss needs a parameter or value of an earlier stage, and did not when"),
    ],
)
def test_what_only_the_last_stage_sees_is_said(kind: type[Lit], said: str, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.test_lightning_steps", kind.__name__, str(tmp_path)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else None
    ended = subprocess.run(
        program, capture_output=True, text=True, env=environment, timeout=200, check=False
    )
    assert ended.returncode
    assert said in ended.stderr


if __name__ == "__main__":
    given: dict[str, Any] = {"strategy": nemo2.MegatronStrategy(pp=2), "devices": 2}
    made = trainer(sys.argv[2], val_check_interval=1, **given)
    made.fit({"Early": Early, "Late": Late}[sys.argv[1]](), data(8, 16), data(8, 16))

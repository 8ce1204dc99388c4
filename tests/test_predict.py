"""``Trainer.predict`` fills the pipeline, and hooks of a training may generate."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import nemo2
from nemo2 import generate
from tests.generation import PROMPTS, build, continued, lists
from tests.lightning_programs import Lit, data, trainer
from tests.pool import Pool

TWO = nemo2.Pipeline(microbatches=2)
KINDS = ("tensor", "dict", "mean", "pairs", "list")
JOINED = ("tensor", "dict")  # results of microbatches that are those of the batch when joined


class Predicts(Lit):
    """Returns predictions of different kinds, and notes how many samples each call was given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.sizes = kind, []

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.sizes = [*self.sizes, len(batch[0])]
        logits = self(batch[0])
        match self.kind:
            case "tensor":
                return logits
            case "dict":
                return {"best": logits.argmax(-1), "of": (batch[0], logits.amax(-1))}
            case "mean":
                return logits.mean()
            case "list":
                return logits.argmax(-1)[:, -1].tolist()
            case _:
                flat = logits.flatten(1)
                return flat @ flat.T


def predicted(folder: str, mesh: dict[str, Any], batch: int) -> dict[str, Any]:
    found = {}
    for kind in kinds(mesh):
        made = trainer(folder, strategy=nemo2.MegatronStrategy(**mesh), devices=4)
        torch.manual_seed(1)
        module = Predicts(kind)
        found[kind] = made.predict(module, data(batch, 16)), module.sizes
    return found


def kinds(mesh: dict[str, Any]) -> tuple[str, ...]:
    """Return the kinds that run on the mesh: over tp no step may read values."""
    return KINDS[:-1] if "tp" in mesh else KINDS


MESHES = [
    {"pp": 2, "tp": 2, "pipeline": TWO},
    {"pp": 2, "dp": 2, "pipeline": nemo2.Pipeline(2, "interleaved", 2)},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_predict(pool: Pool, tmp_path: Any, mesh: dict[str, Any]) -> None:
    dp = mesh.get("dp", 1)
    got = pool.run(4, predicted, str(tmp_path), mesh, 8 // dp)
    for rank, found in enumerate(got):
        coordinate = rank % 2 if dp == 2 else 0
        for kind in kinds(mesh):
            torch.manual_seed(1)
            module = Predicts(kind).double()
            with torch.no_grad():  # samples are dealt out one by one
                batches = [[x[coordinate::dp] for x in batch] for batch in data(8, 16)]
                want = [module.predict_step(batch, i) for i, batch in enumerate(batches)]
            torch.testing.assert_close(found[kind][0], want)
            half = 4 // dp
            sizes = [half] * 4 if kind in JOINED else [2 * half] * 2
            assert found[kind][1] == sizes, (rank, kind)  # of several chunks the last one counts


# --- in training


class Trains(L.LightningModule):
    """Generates on the live weights in hooks of its training, or does not."""

    def __init__(self, generates: bool) -> None:
        super().__init__()
        self.model, self.generates, self.said = build("gpt"), generates, []
        self.drop = nn.Dropout(0.1)

    def training_step(self, batch: Any, index: int) -> Tensor:
        logits = self.drop(self.model(batch[0][:, :-1]))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("held-out", self.training_step(batch, index))

    def on_train_batch_end(self, *rest: Any) -> None:
        self.say()

    def on_before_optimizer_step(self, *rest: Any) -> None:
        self.say()

    def on_validation_epoch_end(self) -> None:
        self.say()

    def say(self) -> None:
        if self.generates:
            self.said.append(lists(generate(self.model, PROMPTS[:3], max_new_tokens=4)))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-6)


def train(folder: str, mesh: dict[str, int], generates: bool) -> Any:
    ours = nemo2.MegatronStrategy(**mesh)
    made = trainer(folder, strategy=ours, devices=4, max_steps=2, val_check_interval=1)
    torch.manual_seed(2)
    ids = torch.randint(96, (12, 9), generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=4)
    module = Trains(generates)
    made.fit(module, data, data)
    state = made.strategy.parallel_model.full_state_dict()
    return state, module.said, float(torch.rand(())), made.callback_metrics["held-out"]


@pytest.mark.parametrize("mesh", [{"pp": 2, "tp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_hooks_of_a_training(pool: Pool, tmp_path: Any, mesh: dict[str, int]) -> None:
    silent = pool.run(4, train, str(tmp_path), mesh, False)
    spoken = pool.run(4, train, str(tmp_path), mesh, True)
    for without, with_tokens in zip(silent, spoken, strict=True):
        assert all(torch.equal(with_tokens[0][n], x) for n, x in without[0].items())
        assert with_tokens[2:] == without[2:]  # what the generators give next, and the metric
        assert with_tokens[1] == spoken[0][1]
    model = build("gpt")
    state = {n.removeprefix("model."): x for n, x in spoken[0][0].items()}
    model.load_state_dict(state)
    want = [continued(model, prompt, 4) for prompt in PROMPTS[:3]]
    assert spoken[0][1][-1] == want  # of the weights after the last step
    assert spoken[0][1][0] != want

"""Modules that users hold inside of what was split: their weights in and out, under own names."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn

import nemo2
from nemo2 import CheckpointError
from nemo2.checkpoint.target import target_of
from nemo2.inside import model_around
from tests.zoo import causal, token_ids

transformers = pytest.importorskip("transformers")


def language_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return causal("Llama", tie_word_embeddings=True).double()


class Holder(nn.Module):
    """A model of transformers and a head of one's own that is tied to it, as in a Trainer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 1.5, dtype=torch.float64))
        self.model = nemo2.annotate(language_model(seed))
        self.table = self.model.model.embed_tokens

    def forward(self, ids: Tensor) -> Tensor:
        return self.scale * self.model(ids).logits


def in_and_out(folder, mesh, out):
    holder = Holder(2)
    parallel = nemo2.parallelize(holder, nemo2.make_mesh(**mesh), inplace=True)
    report = nemo2.load(folder, holder.model)
    assert (report.missing, report.unexpected) == ((), ())
    nemo2.save(out, holder.model, format="safetensors")
    # A part of the part, whose file has a head more; copies are not in it.
    assert nemo2.load(folder, holder.model.model, strict=False).missing == ()
    assert model_around(holder.model.model) == (parallel, "model.model")
    assert model_around(holder) == (parallel, "")
    assert model_around(copy.copy(holder.model)) is None
    with pytest.raises(CheckpointError, match=r"of: nemo2.load\(path, model.model\)"):
        nemo2.load(folder, parallel)
    return {n: t.cpu() for n, t in parallel.full_state_dict().items()}


@pytest.mark.parametrize("mesh", [{"tp": 2, "pp": 2}, {"dp": 2}, {}], ids=str)
def test_the_weights_of_a_part(pool, tmp_path, mesh):
    plain, out = language_model(1), tmp_path / "out"
    plain.save_pretrained(tmp_path / "in")
    wanted = {f"model.{n}": t for n, t in plain.state_dict().items()}
    wanted["table.weight"] = plain.model.embed_tokens.weight
    wanted["scale"] = torch.tensor(1.5, dtype=torch.float64)
    world = torch.Size(mesh.values()).numel()
    for state in pool.run(world, in_and_out, tmp_path / "in", mesh, out):
        assert set(state) == set(wanted)
        assert all(torch.equal(state[n], wanted[n]) for n in wanted)
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(opened) is type(plain)
    assert all(torch.equal(t, wanted[f"model.{n}"]) for n, t in opened.state_dict().items())
    ids = token_ids(2)
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, plain(ids).logits)


def who_is_inside():
    holder = Holder(1)
    parallel = nemo2.parallelize(holder, nemo2.make_mesh())
    inner = parallel.module.model
    assert model_around(holder.model) is None  # the caller's own was copied
    assert model_around(inner) == (parallel, "model")
    assert target_of(inner).groups is parallel.groups
    assert model_around(copy.deepcopy(holder)) is None
    assert len(pickle.dumps(holder)) > 0
    del parallel
    gc.collect()
    return model_around(inner)


def test_only_modules_of_a_living_parallel_model_are_inside(pool):
    assert model_around(nn.Linear(2, 2)) is None
    assert pool.run(1, who_is_inside) == [None]

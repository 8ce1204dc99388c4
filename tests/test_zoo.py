"""Unmodified models with annotations derived from them equal one device on every mesh."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nemo2
from nemo2 import shard
from tests import zoo
from tests.zoo import MESHES, ZOO, check


def world(mesh):
    return nemo2.mesh.MeshSizes.of(mesh).world


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("mesh", ["tp=2,pp=2", "dp=2", "cp=2"])
def test_equals_one_device_or_is_refused(pool, mesh, name):
    (found,) = set(pool.run(world(mesh), check, name, mesh, pool.device))
    refusal = ZOO[name].refused.get(mesh)
    if refusal is None:
        assert found == "equal"
    else:
        assert found.startswith("refused: ")
        assert refusal in found


def derived(model, mesh="tp=2"):
    plan = nemo2.plan(nemo2.annotate(model), mesh)
    return plan, {name: (what, why) for name, what, why in plan.derived}


def test_projections_pair_up():
    plan, found = derived(zoo.causal("Llama"))
    block = "model.layers.1."
    assert plan.blocks == ("model.layers.0", "model.layers.1")
    assert found["model.layers"] == ('"pp"', "the model's own plan")
    assert plan.param(block + "self_attn.q_proj.weight").tp_dim == 0
    assert plan.param(block + "self_attn.o_proj.weight").tp_dim == 1
    assert plan.param(block + "mlp.up_proj.weight").tp_dim == 0
    assert plan.param(block + "mlp.down_proj.weight").tp_dim == 1
    assert plan.param("model.embed_tokens.weight").tp_dim == 0
    assert plan.param("lm_head.weight").tp_dim == 0
    assert plan.param(block + "input_layernorm.weight").tp_dim is None
    text = str(plan)
    assert "derived annotations" in text
    assert 'model.layers.*.self_attn.q_proj.weight x2  ("tp", dim=0)  query of attention' in text


@pytest.mark.parametrize(
    ("build", "name", "dim", "parts"),
    [
        (zoo.gpt2, "transformer.h.0.attn.c_attn.weight", 1, (32, 32, 32)),
        (zoo.gpt2, "transformer.h.0.attn.c_attn.bias", 0, (32, 32, 32)),
        (zoo.TimmViT, "blocks.0.attn.qkv.weight", 0, (32, 32, 32)),
        (lambda: zoo.causal("Phi3"), "model.layers.0.self_attn.qkv_proj.weight", 0, (32, 16, 16)),
        (lambda: zoo.causal("Phi3"), "model.layers.0.mlp.gate_up_proj.weight", 0, (64, 64)),
        (
            lambda: zoo.causal("Mixtral", num_local_experts=4),
            "model.layers.0.mlp.experts.gate_up_proj",
            1,
            (64, 64),
        ),
    ],
)
def test_fused_projections_are_recognised(build, name, dim, parts):
    param = derived(build())[0].param(name)
    assert (param.tp_dim, param.parts) == (dim, parts)


def test_interleaved_heads_are_no_parts():
    plan, found = derived(zoo.causal("GPTNeoX"))
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert (plan.param(name).tp_dim, plan.param(name).parts) == (0, None)
    assert found[name][1] == "the model's own plan (colwise)"


def test_what_the_mesh_does_not_fit_stays_whole():
    plan, found = derived(zoo.causal("Llama", vocab_size=97), "tp=4")
    assert plan.param("lm_head.weight").tp_dim is None
    assert found["lm_head.weight"] == ("replicated", "head over the vocabulary: 97 % 4 = 1")
    keys = "model.layers.0.self_attn.k_proj.weight"  # 2 heads of keys
    assert plan.param(keys).tp_dim is None
    assert found[keys] == ("replicated", "key and value of attention: 2 % 4 = 2")
    assert plan.param("model.layers.0.self_attn.q_proj.weight").tp_dim == 0


def test_the_users_own_annotations_win():
    for late in (True, False):
        model = zoo.causal("Llama")
        if late:
            nemo2.annotate(model)
        shard(model.lm_head.weight, None)
        shard(model.model.layers[0].mlp.up_proj.weight, "tp", dim=1)
        plan, found = derived(model)
        assert plan.param("lm_head.weight").tp_dim is None
        assert plan.param("model.layers.0.mlp.up_proj.weight").tp_dim == 1
        assert plan.param("model.layers.1.mlp.up_proj.weight").tp_dim == 0
        assert "lm_head.weight" not in found


@pytest.mark.parametrize("late", [True, False])
def test_a_users_annotation_that_says_the_same_is_the_users(late):
    model = zoo.causal("Llama", vocab_size=97)
    if late:
        nemo2.annotate(model)
    shard(model.lm_head.weight, "tp", dim=0)
    with pytest.raises(nemo2.ShardingError, match="97 % 4 = 1"):
        nemo2.plan(nemo2.annotate(model), "tp=4")


def test_the_users_own_list_of_blocks_wins():
    model = zoo.t5()
    shard(model.encoder.block, "pp")
    plan, _ = derived(model)
    assert plan.blocks == ("encoder.block.0", "encoder.block.1")


def test_t5_is_split_in_its_decoder():
    plan, found = derived(zoo.t5())
    assert plan.blocks == ("decoder.block.0", "decoder.block.1")
    assert "encoder.block" in found["decoder.block"][1]


class Unknown(nn.Module):
    """A fused projection of a name that says nothing, and a linear layer with no partner."""

    def __init__(self):
        super().__init__()
        self.mixer, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.gate = nn.Linear(8, 1)


def test_what_cannot_be_told_is_left_alone_and_said():
    plan, found = derived(nn.ModuleList([Unknown(), Unknown()]))
    assert all(p.tp_dim is None for p in plan.params)
    assert found["0.mixer"][0] == "replicated"
    assert "cannot tell how query, key and value lie" in found["0.mixer"][1]
    assert "no other linear layer" in found["0.gate"][1]


def test_a_part_of_a_model_can_be_annotated_alone():
    holder = nn.ModuleDict({"model": nemo2.annotate(zoo.gpt2()), "head": nn.Linear(4, 4)})
    plan = nemo2.plan(holder, "tp=2")
    found = {name: why for name, _, why in plan.derived}
    assert plan.param("model.transformer.h.0.mlp.c_fc.weight").tp_dim == 1
    assert plan.blocks == ("model.transformer.h.0", "model.transformer.h.1")
    assert "not taken for a vocabulary" in found["model.transformer.wpe"]


def test_deriving_twice_changes_nothing():
    model = nemo2.annotate(zoo.gpt2())
    once = nemo2.plan(model, "tp=2")
    assert nemo2.plan(nemo2.annotate(model), "tp=2") == once


def test_annotating_changes_no_number():
    torch.manual_seed(0)
    model, batch = zoo.causal("Llama"), zoo.lm(2)
    before = model(**batch).loss
    assert torch.equal(nemo2.annotate(model)(**batch).loss, before)


def test_the_table_has_every_mesh():
    assert {"tp=2,pp=2", "dp=2", "cp=2"} <= set(MESHES)
    unknown = {mesh for model in ZOO.values() for mesh in model.refused} - set(MESHES)
    assert not unknown

"""Annotations: what they survive, and errors that list all problems at once."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from nemo2.errors import ShardingError
from nemo2.plan import plan
from nemo2.sharding.annotate import Mark, annotate, collect, shard


class Block(nn.Module):
    def __init__(self, d: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        shard(self.up.weight, "tp", dim=0)
        shard(self.up.bias, "tp", dim=-1)
        shard(self.down.weight, "tp", dim=1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 6)
        shard(self.layers, "pp")
        shard(shard(self.head.weight, "tp", dim=0), "dp", dim=1)
        shard(self.head.bias, None)


EXPECTED = {
    "up.weight": (Mark("tp", 0),),
    "up.bias": (Mark("tp", 0),),
    "down.weight": (Mark("tp", 1),),
    "down.bias": (),
}


def check(model: nn.Module) -> None:
    notes = collect(model)
    for i in range(2):
        for name, marks in EXPECTED.items():
            assert notes.marks[f"layers.{i}.{name}"] == marks
    assert notes.marks["head.weight"] == (Mark("tp", 0), Mark("dp", 1))
    assert notes.marks["head.bias"] == (Mark(None),)
    assert notes.blocks == ("layers",)


def test_marks_are_collected() -> None:
    check(Net())


def test_survive_deepcopy() -> None:
    check(copy.deepcopy(copy.deepcopy(Net())))


def test_survive_conversions() -> None:
    check(Net().to(torch.float64).to("meta"))
    check(Net().half().requires_grad_(False).train(False))


def test_survive_meta_and_to_empty() -> None:
    with torch.device("meta"):
        model = Net()
    check(model.to_empty(device="cpu"))


def test_survive_assigned_state() -> None:
    with torch.device("meta"):
        model = Net()
    model.load_state_dict(Net().state_dict(), assign=True)
    check(model)
    check(copy.deepcopy(model))


def test_survive_saving_of_the_module() -> None:
    file = io.BytesIO()
    torch.save(Net(), file)
    file.seek(0)
    check(torch.load(file, weights_only=False))


def test_shard_returns_its_target_and_changes_nothing() -> None:
    linear, layers = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
    before = linear.weight.clone()
    assert shard(linear.weight, "tp", dim=1) is linear.weight
    assert shard(layers, "pp") is layers
    assert torch.equal(linear.weight, before)
    assert list(linear.state_dict()) == ["weight", "bias"]
    assert not any("nemo2" in name for name in vars(linear.weight))


def test_activations_outside_a_run() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert shard(x, "tp", dim=-1) is x
    assert shard(x * 1, None) is not None
    with pytest.raises(ShardingError, match='over "tp" or None'):
        shard(x, "dp", dim=0)
    with pytest.raises(ShardingError, match=r"shape \(3, 4\) on \"tp\" along dim 2: it has 2 dims"):
        shard(x, "tp", dim=2)


def test_annotated_before_registration() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = shard(nn.Parameter(torch.zeros(4, 4)), "tp", dim=1)

    assert collect(copy.deepcopy(Late())).marks["weight"] == (Mark("tp", 1),)


def test_a_shared_weight_brings_its_marks() -> None:
    linear = nn.Linear(4, 4)
    shard(linear.weight, "tp", dim=0)
    linear.weight = nn.Parameter(torch.zeros(3, 4))
    other = nn.Linear(4, 4)
    shard(other.weight, "tp", dim=1)
    linear.weight = other.weight
    assert collect(linear).marks["weight"] == (Mark("tp", 1),)


def test_tied_parameters() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    shard(model["head"].weight, "tp", dim=0)
    for tied in (model, copy.deepcopy(model)):
        notes = collect(tied)
        assert notes.marks == {"embed.weight": (Mark("tp", 0),)}
        assert notes.aliases == {"embed.weight": ("head.weight",)}
    assert plan(model, "tp=2").param("embed.weight").local_shape == (3, 4)


def test_tied_parameters_that_disagree() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    shard(model["embed"].weight, "tp", dim=1)
    shard(model["head"].weight, "tp", dim=0)
    with pytest.raises(ShardingError, match=r"annotations of 'embed\.weight' disagree"):
        plan(model, "tp=2")


def test_models_built_before_nemo2_was_imported() -> None:
    code = """
import copy, torch
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
model[1].weight.data.zero_()
from nemo2.sharding.annotate import annotate, collect, shard
shard(model[0].weight, "tp", dim=0)
assert collect(model).marks["0.weight"][0].dim == 0
annotate(model, {"1.weight": ("tp", 1)})
later = copy.deepcopy(model)
assert collect(model).marks["0.weight"][0].dim == 0
assert collect(later).marks["1.weight"][0].dim == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- annotate ---


def plain() -> nn.Module:
    return nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Linear(4, 8) for _ in range(2)), "head": nn.Linear(4, 6)}
    )


def test_rules() -> None:
    model = plain()
    same = annotate(
        model,
        {
            "layers.*.weight": ("tp", -2),
            "**.bias": None,
            "head.weight": [("tp", 0), ("dp", 1)],
            "layers": "pp",
        },
    )
    assert same is model
    for notes in (collect(model), collect(copy.deepcopy(model))):
        assert notes.marks["layers.1.weight"] == (Mark("tp", 0),)
        assert notes.marks["layers.0.bias"] == notes.marks["head.bias"] == (Mark(None),)
        assert notes.marks["head.weight"] == (Mark("tp", 0), Mark("dp", 1))
        assert notes.blocks == ("layers",)


def test_parts() -> None:
    model = annotate(plain(), {"layers.0.weight": ("tp", 0, (4, 2, 2))})
    assert collect(model).marks["layers.0.weight"] == (Mark("tp", 0, (4, 2, 2)),)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"layer.*.weight": ("tp", 0)}, r"'layer\.\*\.weight' matches no parameter; did you mean"),
    ({"blocks": "pp"}, "rule 'blocks' matches no module"),
    (
        {"head.weight": ("tp", 2)},
        r"'head.weight' of shape \(6, 4\) on \"tp\" along dim 2: it has 2",
    ),
    ({"head.weight": ("tq", 0)}, "unknown mesh axis 'tq'; axes: pp, dp, cp, tp"),
    ({"head.weight": ("cp", 0)}, "never split over the context axis"),
    ({"head.weight": "tp"}, "give the tensor dim, for example dim=0"),
    ({"head.weight": ("tp", 0, (1, 2))}, r"parts \(1, 2\) sum to 3, dim 0 has 6"),
    ({"head": "pp"}, "on a Linear: it takes a ModuleList or Sequential"),
    (
        {"head.*": ("tp", 0), "**.weight": ("tp", 1)},
        r"rules 'head.\*' and '\*\*.weight' disagree on 'head.weight'",
    ),
]


@pytest.mark.parametrize(("rules", "message"), ERRORS)
def test_errors(rules: dict[str, Any], message: str) -> None:
    model = plain()
    with pytest.raises(ShardingError, match=message):
        annotate(model, rules)
    assert not any(collect(model).marks.values())  # all or nothing


def test_all_problems_at_once() -> None:
    rules = {"layers.*.weight": ("tp", 5), "nothing": ("tp", 0), "head.weight": ("xx", 0)}
    with pytest.raises(ShardingError) as error:
        annotate(plain(), rules)
    text = str(error.value)
    assert all(s in text for s in ("layers.0.weight", "layers.1.weight", "'nothing'", "'xx'"))


def test_without_rules() -> None:
    model = annotate(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    assert annotate(model) is model  # again: nothing changes
    marks = collect(model).marks
    assert marks["0.weight"] == marks["0.bias"] == (Mark("tp", 0),)
    assert marks["2.weight"] == (Mark("tp", 1),)
    assert marks["2.bias"] == ()
    assert all(mark.why for own in marks.values() for mark in own)


def test_shard_errors() -> None:
    linear = nn.Linear(4, 6)
    with pytest.raises(
        ShardingError, match=r"'Linear.weight' of shape \(6, 4\) on unknown mesh axis"
    ):
        shard(linear.weight, "model", dim=0)
    with pytest.raises(ShardingError, match=r"Linear.bias.*it has 1 dims"):
        shard(linear.bias, "tp", dim=1)
    with pytest.raises(ShardingError, match="takes no dim"):
        shard(linear.weight, None, dim=1)
    with pytest.raises(ShardingError, match='only be split over "pp"'):
        shard(linear, "tp")
    with pytest.raises(ShardingError, match="takes a ModuleList or Sequential"):
        shard(linear, "pp")
    with pytest.raises(ShardingError, match="cannot shard a list"):
        shard([1], "tp", dim=0)  # type: ignore[type-var]
    with pytest.raises(ShardingError, match="shard the ModuleList"):
        shard(linear.weight, "pp", dim=0)


def test_sizes_that_do_not_divide() -> None:
    model = annotate(plain(), {"head.*": ("tp", 0), "layers.*.weight": ("tp", 1)})
    with pytest.raises(ShardingError) as error:
        plan(model, "tp=4")
    text = str(error.value)
    assert "cannot shard 'head.weight' on mesh axis 'tp' along dim 0" in text
    assert "'head.bias'" in text
    assert "tp in {1, 2, 3, 6} | dim=1 (4 divides) | pad dim 0 to 8" in text
    assert plan(model, "tp=2").param("head.bias").local_shape == (3,)
    assert plan(model, "dp=4").param("head.bias").local_shape == (6,)


def test_annotations_that_disagree() -> None:
    linear = nn.Linear(4, 6)
    shard(linear.weight, "tp", dim=0)
    shard(linear.weight, "tp", dim=1)
    shard(linear.bias, "tp", dim=0)
    shard(linear.bias, None)
    with pytest.raises(ShardingError, match=r"'weight' disagree(.|\n)*'bias' disagree"):
        plan(linear, "tp=2")

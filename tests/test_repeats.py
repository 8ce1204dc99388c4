"""Blocks that are alike are planned once, and every plan is the one in which all of them run."""

from __future__ import annotations

import dataclasses
import random
import warnings
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nemo2
from nemo2 import Pipeline
from nemo2.pytree import tree_map
from nemo2.repeats import Repeats
from tests import models, zoo

WIDTH = 8


def planned(build, batch, loss, mesh, dtype, *, repeats, **options) -> Any:
    """Return the plan of a step, or the text of the refusal; and which blocks were repeated."""
    given = {"pipeline": Pipeline(microbatches=2), **options}
    run = Repeats.call if repeats else lambda *args: None
    with mock.patch.object(Repeats, "call", run), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build().to(dtype)
            plan = nemo2.plan(model, mesh, step=loss, batch=batch(4), **given)
        except nemo2.Nemo2Error as error:
            return str(error), {}
    assert plan.step is not None
    return str(plan), plan.step


def same(build, batch, loss, mesh, dtype=torch.float64, **options) -> set[str]:
    """Plan with and without repeats, compare everything, and return the blocks repeated."""
    told, step = planned(build, batch, loss, mesh, dtype, repeats=True, **options)
    wanted, whole = planned(build, batch, loss, mesh, dtype, repeats=False, **options)
    assert told == wanted
    if not step:
        return set()
    assert not whole.trace.repeated
    for field in dataclasses.fields(step):
        if field.name != "trace":
            assert plain(getattr(step, field.name)) == plain(getattr(whole, field.name)), field.name
    for field in dataclasses.fields(step.trace):
        if field.name not in ("repeated", "values", "output"):
            one, other = (getattr(s.trace, field.name) for s in (step, whole))
            assert plain(one) == plain(other), field.name
    made = {v.key: facts(v) for v in whole.trace.values}
    assert {v.key: facts(v) for v in step.trace.values}.items() <= made.items()
    return set(step.trace.repeated)


def facts(value):
    x = value.absent
    where = value.born, frozenset(value.uses), value.block
    return *where, x.layouts, x.needs_grad, x.entered, x.meta.shape, x.meta.stride(), x.meta.dtype


def plain(x: Any) -> Any:
    """Return a value in which tensors and objects without an equality are told by what they say."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return type(x), [(f.name, plain(getattr(x, f.name))) for f in dataclasses.fields(x)]
    if isinstance(x, dict):
        return {plain_key(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, Tensor):
        return type(x), tuple(x.shape), x.dtype
    return x if type(x).__eq__ is not object.__eq__ else type(x)


def plain_key(x: Any) -> Any:
    return x if not isinstance(x, type) else x.__name__


@pytest.mark.parametrize("mesh", ["tp=2,pp=2", "cp=2,tp=2"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_models_of_the_field(name, mesh):
    model = zoo.ZOO[name]

    def batch(count):
        cast = partial(torch.Tensor.to, dtype=model.dtype)
        return tree_map(lambda x: cast(x) if x.is_floating_point() else x, model.batch(count))

    same(model, batch, model.loss, mesh, model.dtype)


@pytest.mark.parametrize("mesh", ["tp=2", "pp=2", "cp=2,tp=2"])
def test_numbers_of_layers_that_nobody_reads(mesh):
    """Transformers' layers know their number, for a cache that training has no use for."""
    build = partial(zoo.causal, "Llama", num_hidden_layers=5, use_cache=False)
    repeated = same(lambda: nemo2.annotate(build()), zoo.lm, zoo.own_loss, mesh)
    assert len(repeated) >= 3


@pytest.mark.parametrize("mesh", ["tp=2", "cp=2,tp=2"])
@pytest.mark.parametrize("name", models.ZOO)
def test_own_models(name, mesh):
    case = models.ZOO[name].with_layers(4)

    def build():
        model = case()
        if case.rules is not None:
            nemo2.annotate(model, case.rules)
        return model

    repeated = same(build, models.token_ids, case.loss, mesh)
    # The first block's input is not split yet, or the last one's output is joined; and the
    # models of transformers make a cache here, which their blocks could change.
    assert len(repeated) >= 2 or name in ("llama", "llama tied", "gpt2")
    same(build, models.token_ids, case.loss, mesh, remat="full")


class Layer(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        nemo2.shard(self.up.weight, "tp", dim=0)
        nemo2.shard(self.up.bias, "tp", dim=0)
        nemo2.shard(self.down.weight, "tp", dim=1)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self, layer=Layer, change=None):
        super().__init__()
        self.inlet = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(layer(i) for i in range(4))
        nemo2.shard(self.layers, "pp")
        if change is not None:
            change(self.layers)

    def forward(self, x):
        x = self.inlet(x)
        for layer in self.layers:
            x = layer(x)
        return x


def mean(model, x):
    return model(x).square().mean()


def inputs(batch):
    return torch.ones(batch, 6, WIDTH, dtype=torch.float64)


class Numbered(Layer):
    def forward(self, x):
        return super().forward(x) if self.number < 2 else x * self.number


class Remembers(Layer):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Collects(Layer):
    def __init__(self, number):
        super().__init__(number)
        self.found = []

    def forward(self, x):
        self.found.append(1)
        return super().forward(x)


class Drawn(Layer):
    def forward(self, x):
        return super().forward(x) if torch.rand(()) < 2 else x


class InPlace(Layer):
    def forward(self, x):
        return x.add_(self.down(self.up(x).relu()))


class Reused(Layer):
    def forward(self, x):
        return super().forward(super().forward(x))


class Checkpointed(Layer):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Scaled(Layer):
    def __init__(self, number):
        super().__init__(number)
        self.register_buffer("scale", torch.tensor(float(number // 2)))

    def forward(self, x):
        return super().forward(x) if self.scale else x


def tied(layers):
    layers[2].up.weight = layers[0].up.weight


def frozen(layers):
    layers[1].down.weight.requires_grad_(False)


def hooked(layers):
    layers[1].down.register_forward_hook(lambda *args: None)


def replaced(layers):
    layers[2].forward = partial(Layer.forward, layers[2])


def evaluated(layers):
    layers[3].eval()


ALL = {f"layers.{i}" for i in (1, 2, 3)}


@pytest.mark.parametrize(
    ("layer", "change", "expected"),
    [
        (Layer, None, ALL),
        (Numbered, None, set()),
        (Remembers, None, set()),
        (Collects, None, set()),
        (Drawn, None, set()),
        (InPlace, None, ALL),
        (Reused, None, ALL),
        (Checkpointed, None, ALL),
        (Scaled, None, {"layers.1", "layers.3"}),
        (Layer, tied, {"layers.1", "layers.3"}),
        (Layer, frozen, {"layers.2", "layers.3"}),
        (Layer, hooked, {"layers.2", "layers.3"}),
        (Layer, replaced, {"layers.1", "layers.3"}),
        (Layer, evaluated, {"layers.1", "layers.2"}),
    ],
)
@pytest.mark.parametrize("mesh", ["tp=2", "pp=2"])
def test_what_may_differ_runs(layer, change, expected, mesh):
    random.seed(0)
    options = {"sequence_parallel": False} if mesh == "tp=2" else {}
    assert same(partial(Net, layer, change), inputs, mean, mesh, **options) == expected


class Glue(Net):
    """Glue around the blocks that makes calls differ though the blocks do not."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.mixed = kind, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x, mask = self.inlet(x), torch.ones(())
        for i, layer in enumerate(self.layers):
            if self.kind == "no_grad" and i == 1:
                with torch.no_grad():
                    x = x + layer(x)
            elif self.kind == "autocast" and i == 2:
                with torch.autocast("cpu", torch.bfloat16):
                    x = layer(x).double()
            elif self.kind == "checkpoint" and i == 3:
                x = checkpoint(layer, x, use_reentrant=False)
            elif self.kind == "length" and i == 2:
                x = layer(x[:, :4])
            elif self.kind == "side":
                x = layer(x) * mask
                mask = self.mixed(x).mean()
            else:
                x = layer(x)
        return x


@pytest.mark.parametrize("kind", ["no_grad", "autocast", "checkpoint", "length", "side"])
def test_calls_of_another_kind_run(kind):
    repeated = same(partial(Glue, kind), inputs, mean, "tp=2", sequence_parallel=False)
    odd = {"no_grad": 1, "autocast": 2, "checkpoint": 3, "length": 2}.get(kind)
    assert repeated
    assert f"layers.{odd}" not in repeated


def test_the_step_is_that_of_one_device():
    """On four layers of which three are not run when the step is planned."""
    report = nemo2.verify(Net, inputs(4), mean, "tp=2,pp=2", pipeline=Pipeline(microbatches=2))
    assert report.ok, report

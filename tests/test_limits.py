"""What is refused when a step is planned, with the user's line and what to do instead."""

from __future__ import annotations

import random
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nemo2
from tests import zoo
from tests.models import GPT, next_token, token_ids


class Glue(GPT):
    """A GPT whose glue does one thing that some meshes do not allow."""

    def __init__(self, odd):
        super().__init__(4)
        self.odd, self.kept = odd, []

    def forward(self, ids):
        x = self.embed(ids)
        if self.odd == "reads" and x.abs().max() > 1e9:
            x = x * 2
        buffer = torch.zeros(*x.shape, dtype=x.dtype, device=x.device)
        for i, layer in enumerate(self.layers):
            if self.odd == "random" and random.random() < 0.5:
                continue
            if self.odd == "drawn" and torch.rand(()) < 0.5:
                continue
            x = checkpoint(layer, x, use_reentrant=True) if self.odd == "reentrant" else layer(x)
            if self.odd == "in place" and i == 0:
                buffer[:] = x
        if self.odd == "twice":
            x = self.layers[0](x)
        return self.head(self.norm(x + buffer))


class Collects(GPT):
    """A hook in each block keeps a value that the block does not return."""

    def __init__(self):
        super().__init__(4)
        self.collect()

    def collect(self):
        kept = []
        for layer in self.layers:
            layer.up.register_forward_hook(lambda m, given, out: kept.append(out.square().mean()))
        self.kept = lambda: kept

    def forward(self, ids):
        kept = self.kept()
        kept.clear()
        out = super().forward(ids)
        return out + sum(kept)


def tried(build, loss, batch, mesh, device, microbatches=1):
    """Return whether the step equals one device, or the refusal."""
    random.seed(0)
    pipeline = nemo2.Pipeline(microbatches)
    try:
        report = nemo2.verify(build, batch, loss, mesh, device=device, pipeline=pipeline)
    except nemo2.Nemo2Error as error:
        return str(error)
    return "equal" if report.ok else str(report)


def outcome(pool, build, mesh, loss=next_token, batch=None, microbatches=1):
    batch = token_ids(8) if batch is None else batch
    return set(pool.run(2, tried, build, loss, batch, mesh, pool.device, microbatches))


@pytest.mark.parametrize(
    ("odd", "mesh", "message"),
    [
        ("reads", "pp=2", r"'__bool__' reads the value(?s:.*)test_limits.py:\d+: if self.odd"),
        ("reads", "tp=2", r"'__bool__' reads the value(?s:.*)options: compute it from the batch"),
        ("reads", "dp=2", "equal"),
        ("in place", "pp=2", r"'__setitem__' writes a value(?s:.*)buffer\[:\] = x"),
        ("twice", "pp=2", r"'layers.0' is called twice(?s:.*)options: call the model once"),
        ("twice", "tp=2", "equal"),
        ("twice", "dp=2", "equal"),
        ("reentrant", "pp=2", r"'layers.2', is called in a reentrant activation checkpoint"),
        ("reentrant", "tp=2", "equal"),
        ("random", "pp=2", "no random skipping"),
        ("random", "tp=2", "no random skipping"),
        ("drawn", "pp=2", "options: order the list as it is called"),
    ],
)
def test_glue(pool, odd, mesh, message):
    (found,) = outcome(pool, partial(Glue, odd), mesh)
    assert re.search(message, found), found


def drawn_later(device):
    """Skip no block while the step is planned, and one when it runs."""
    model = Glue("drawn").double()
    parallel = nemo2.parallelize(model, nemo2.make_mesh(tp=2, device=device))
    for seed in range(40):
        torch.manual_seed(seed)
        try:
            parallel.backward(next_token, token_ids(4))
        except nemo2.Nemo2Error as error:
            return str(error)
    return "never noticed"


def test_a_block_that_is_skipped_in_a_run_is_named(pool):
    (found,) = set(pool.run(2, drawn_later, pool.device))
    assert "was planned: which blocks a step calls must depend only on shapes" in found


def test_a_value_that_a_hook_keeps_is_refused_across_stages(pool):
    assert outcome(pool, Collects, "tp=2") == {"equal"}
    (found,) = outcome(pool, Collects, "pp=2")
    assert "a value made inside block 'layers.0' is used on another stage" in found
    assert "test_limits.py" in found


def router(aux):
    model = zoo.causal(
        "Mixtral",
        "batched_mm",
        num_local_experts=4,
        output_router_logits=aux,
        router_aux_loss_coef=1.0,
    )
    return nemo2.annotate(model)


@pytest.mark.parametrize(
    ("mesh", "microbatches", "message"),
    [
        ("tp=2", 1, "equal"),
        ("tp=2", 2, "the mean of 2 parts (dp=1, cp=1, microbatches=2)"),
        ("dp=2", 1, "the mean of 2 parts (dp=2, cp=1, microbatches=1)"),
        ("pp=2", 1, "a value made inside block 'model.layers.0' is used on another stage"),
    ],
)
def test_auxiliary_losses_are_right_or_refused(pool, mesh, microbatches, message):
    (found,) = outcome(pool, partial(router, True), mesh, zoo.own_loss, zoo.lm(8), microbatches)
    assert message in found


def checkpointing():
    model = zoo.causal("Llama")
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()
    return nemo2.annotate(model)


@pytest.mark.parametrize("mesh", ["tp=2", "pp=2", "cp=2", "dp=2"])
def test_checkpointing_switched_on_by_the_models_own_method(pool, mesh):
    assert outcome(pool, checkpointing, mesh, zoo.own_loss, zoo.lm(8), 2) == {"equal"}


class Chooses(nn.Module):
    """A mixture whose code reads which expert each token takes."""

    def __init__(self, tuple_out=False):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.tuple_out, self.gain = tuple_out, nn.Parameter(torch.ones(32))

    def forward(self, x):
        out = torch.zeros_like(x)
        choice = x.detach().sum(-1).mul(1e3).long() % 3
        for i, expert in enumerate(self.experts):
            rows = (choice == i).nonzero(as_tuple=True)
            out[rows] = expert(x[rows]) * self.gain
        return (out, choice) if self.tuple_out else out


class Mixture(GPT):
    def __init__(self, tuple_out=False):
        super().__init__(4)
        for layer in self.layers:
            layer.up, layer.down = nn.Identity(), Chooses(tuple_out)
            layer.norm2.weight = layer.down.gain  # also used on tokens that are split
            if tuple_out:
                layer.down = nn.Sequential(layer.down, First())


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


def test_a_module_that_reads_values_runs_whole(pool):
    assert outcome(pool, Mixture, "tp=2", microbatches=2) == {"equal"}
    assert outcome(pool, Mixture, "pp=2", microbatches=2) == {"equal"}


def test_a_module_that_reads_values_and_returns_more_is_refused(pool):
    (found,) = outcome(pool, partial(Mixture, True), "tp=2")
    assert "Chooses reads values" in found
    assert "it returns tuple" in found


def attaching(device):
    """Register a hook while the step is planned; it must still be there in the run."""
    model = zoo.causal("Llama").double()
    parallel = nemo2.parallelize(nemo2.annotate(model), nemo2.make_mesh(dp=2, device=device))
    loss = parallel.backward(zoo.hidden_loss, zoo.lm(2))
    return float(loss), zoo.hidden_loss(model, zoo.lm(2)).item()


def test_hooks_that_the_step_registers_stay(pool):
    for found, expected in pool.run(2, attaching, pool.device):
        assert found == pytest.approx(expected, rel=1e-6)


class Containers(nn.Module):
    """Blocks that are dictionaries of modules: nobody calls them."""

    def __init__(self):
        super().__init__()
        parts = ({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8)},) * 2
        self.layers = nn.ModuleList(nn.ModuleDict(p) for p in parts)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down"](layer["up"](layer["norm"](x)).relu())
        return x


def square(model, x):
    return model(x).square().mean()


def test_containers_are_no_blocks(pool):
    batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert nemo2.plan(nemo2.annotate(Containers()), "dp=2").blocks == ()
    for mesh in ("dp=2", "tp=2"):
        found = outcome(pool, annotated_containers, mesh, square, batch)
        assert found == {"equal"}
    marked = Containers()
    nemo2.shard(marked.layers, "pp")
    with pytest.raises(nemo2.PipelineError, match="its blocks are ModuleDict containers"):
        nemo2.plan(marked, "dp=2")
    nemo2.shard(marked.layers, None)
    assert nemo2.plan(marked, "dp=2").blocks == ()


def annotated_containers():
    return nemo2.annotate(Containers())


def test_several_lists_of_blocks_where_no_axis_needs_one(pool):
    assert outcome(pool, two_lists, "tp=2", zoo.own_loss, zoo.lm(8)) == {"equal"}
    assert outcome(pool, two_lists, "dp=2", zoo.own_loss, zoo.lm(8)) == {"equal"}
    assert len(nemo2.plan(two_lists(), "dp=2").blocks) == 4
    for mesh in ("pp=2", "cp=2"):
        with pytest.raises(nemo2.PipelineError, match="several lists of blocks"):
            nemo2.plan(two_lists(), mesh)


def two_lists():
    model = zoo.t5()
    nemo2.shard(model.encoder.block, "pp")
    nemo2.shard(model.decoder.block, "pp")
    return nemo2.annotate(model)


def penalty(model, x):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return slope.square().mean()


def test_gradients_inside_of_a_step_are_refused(pool):
    batch = torch.ones(4, 8)
    (found,) = outcome(pool, annotated_containers, "tp=2", penalty, batch)
    assert "torch.autograd inside of the step" in found
    assert "test_limits.py" in found


class Turns(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2))
        self.register_buffer("turn", torch.tensor([1j, 2j]))

    def forward(self, x):
        return (x * self.weight * self.turn).abs()


def test_verify_keeps_complex_buffers():
    report = nemo2.verify(Turns, torch.ones(4, 2), lambda m, x: m(x).mean(), "dp=1")
    assert report.ok
    assert report.loss.size > 0.1
    assert all(row.size > 0.01 for row in report.gradients)


class Scaled(Chooses):
    """Uses a parameter before it reads a value, and after."""

    def __init__(self):
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.full((32,), 1.5)), nn.LayerNorm(32)

    def forward(self, x):
        return super().forward(self.norm(x) * self.scale) * self.scale


class Drops(Chooses):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(super().forward(x))


class Keeps(Chooses):
    def forward(self, x):
        out = super().forward(x)
        self.loss = out.square().mean()
        return out


class Widens(Chooses):
    def forward(self, x):
        return super().forward(x).to(torch.complex128)


class Mixed(GPT):
    def __init__(self, kind):
        super().__init__(4)
        for layer in self.layers:
            layer.up, layer.down = nn.Identity(), kind()


def test_what_code_does_before_it_reads_is_forgotten(pool):
    for mesh in ("tp=2", "pp=2"):
        assert outcome(pool, partial(Mixed, Scaled), mesh, microbatches=2) == {"equal"}


def test_dropout_in_code_that_reads_values_is_listed():
    model = Mixed(Drops)
    for mesh in ("tp=2", "pp=2"):
        plan = nemo2.plan(model, mesh, step=next_token, batch=token_ids(4))
        assert "its code reads values, and is not planned" in str(plan)
    model.eval()
    plan = nemo2.plan(model, "tp=2", step=next_token, batch=token_ids(4))
    assert plan.step.randomness.own == ()


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Keeps, "keeps one with a gradient in its attribute 'loss'"), (Widens, "it returns")],
)
def test_what_such_code_may_not_do(pool, kind, message):
    (found,) = outcome(pool, partial(Mixed, kind), "tp=2")
    assert message in found


class Sparse(nn.Module):
    """Two experts, each run on the tokens that chose it: how many is a value."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Linear(width, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width)) for _ in range(2)
        )

    def forward(self, x):
        flat = x.flatten(0, -2)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == number)
            out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, None])
        return out.view_as(x)


class SparseMixture(GPT):
    def __init__(self, split):
        super().__init__(4)
        width = self.embed.weight.shape[1]
        for layer in self.layers:
            layer.up, layer.down = nn.Identity(), Sparse(width)
        rule = {"layers.*.down.experts.*.2.weight": ("tp", 1)}
        nemo2.annotate(self, rule if split else {"layers.*.down.**": None})


def test_split_code_that_reads_values_is_told_how_to_run(pool):
    with pytest.raises(nemo2.Nemo2Error) as caught:
        nemo2.plan(SparseMixture(True), "tp=2", step=next_token, batch=token_ids(4))
    said = str(caught.value)
    assert "(rows,) = torch.where(chosen == number)" in said
    assert said.count("options:") == 1
    assert "whole over tp: the rule {'layers.*.down.**': None}" in said
    assert outcome(pool, partial(SparseMixture, False), "tp=2", microbatches=2) == {"equal"}

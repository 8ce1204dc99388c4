"""Context and sequence parallelism: what users make inside blocks, losses, masks, refusals."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nemo2
from nemo2 import ContextParallel, Pipeline, PipelineError, ShardingError, shard
from nemo2.communication import collectives
from tests import context_models as models
from tests.context_models import VOCAB, Model, shift_inside, shift_of_inputs
from tests.models import token_ids

METHODS = ("ring", "all_gather", "ulysses")


def verified(cases, sizes):
    """Verify (name, build, loss, options) one by one; return the texts of those that differ."""
    bad = []
    for name, build, loss, options in cases:
        report = nemo2.verify(build, token_ids(4, 8), loss, sizes, **options)
        if not report.ok:
            bad.append(f"{name} {options}\n{report}")
    return bad


@pytest.mark.parametrize("kind", ["rotary", "learned", "alibi", "window", "both ways"])
def test_positions_and_masks_made_inside_blocks(pool, kind):
    build = functools.partial(Model, kind)
    cases = [(m, build, shift_inside, {"context_parallel": m}) for m in METHODS]
    assert not pool.run(2, verified, cases, {"cp": 2})[0]


@pytest.mark.parametrize("method", METHODS)
def test_masks_made_of_the_batch(pool, method):
    """Packed documents do not attend to each other, and padding to nothing but itself."""
    cases = [
        (o, functools.partial(Model, "rotary", o), models.ignored, {"context_parallel": method})
        for o in ("documents", "padding")
    ]
    assert not pool.run(2, verified, cases, {"cp": 2})[0]


class Mixer(nn.Module):
    """Sums over the sequence by a product with a weight, as an MLP-Mixer does."""

    def __init__(self, how, bias):
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(8, 8) / 4)
        self.bias = nn.Parameter(torch.randn(8)) if bias else None

    def forward(self, x):
        size = x.shape[1]
        weight = self.weight[:size, :size].tril()
        bias = None if self.bias is None else self.bias[:size]
        mixed = x.transpose(1, 2)
        if self.how == "linear":
            mixed = F.linear(mixed, weight, bias)
        else:
            bias = torch.zeros((), dtype=x.dtype) if bias is None else bias
            flat = torch.addmm(bias, mixed.flatten(0, 1), weight.T, beta=0.5, alpha=2.0)
            mixed = flat.unflatten(0, mixed.shape[:2])
        return x + mixed.transpose(1, 2)


class Pooled(nn.Module):
    """Attention whose queries or keys are half as many."""

    def __init__(self, pooled, masked):
        super().__init__()
        self.pooled, self.masked, self.qkv = pooled, masked, nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.pooled == "queries":
            q = q.unflatten(2, (-1, 2)).mean(3)
        else:
            k, v = (y.unflatten(2, (-1, 2)).mean(3) for y in (k, v))
        mask, causal = None, self.masked == "causal"
        if self.masked == "mask":
            rows = torch.arange(q.shape[2])[:, None] * k.shape[2]
            mask = rows >= torch.arange(k.shape[2]) * q.shape[2]
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        out = out.transpose(1, 2).flatten(2)
        return x + (out.repeat_interleave(2, dim=1) if self.pooled == "queries" else out)


class Stack(nn.Module):
    def __init__(self, block, *how):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        self.layers = nn.ModuleList(block(*how) for _ in range(2))
        shard(self.layers, "pp")

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("sizes", [{"cp": 2}, {"tp": 2}, {"cp": 2, "tp": 2}], ids=str)
def test_sums_over_the_sequence_by_products_with_a_weight(pool, sizes):
    cases = [
        (f"{how} {bias}", functools.partial(Stack, Mixer, how, bias), shift_inside, options)
        for how in ("linear", "addmm")
        for bias in (True, False)
        for options in ({}, {"remat": "selective"})
    ]
    world = sizes.get("cp", 1) * sizes.get("tp", 1)
    assert not pool.run(world, verified, cases, sizes)[0]


@pytest.mark.parametrize("pooled", ["queries", "keys"])
def test_queries_and_keys_of_two_lengths(pool, pooled):
    cases = [
        (masked, functools.partial(Stack, Pooled, pooled, masked), shift_inside, options)
        for masked in ("", "causal", "mask")
        for options in [{"context_parallel": m} for m in METHODS]
    ]
    cases += [(m, b, loss, {**how, "compile": "aot_eager"}) for m, b, loss, how in cases[1::3]]
    assert not pool.run(2, verified, cases, {"cp": 2})[0]


def test_documents_and_padding_over_stages(pool):
    how = {"pipeline": Pipeline(microbatches=2)}
    cases = [
        (o, functools.partial(Model, "alibi" if o == "" else "rotary", o), models.ignored, how)
        for o in ("documents", "padding", "")
    ]
    assert not pool.run(4, verified, cases, {"cp": 2, "pp": 2})[0]
    assert not pool.run(4, verified, cases, {"cp": 2, "tp": 2})[0]


LOSSES = ("shift_inside", "shift_of_inputs", "transposed", "each_token", "ignored")
LOSSES = (*LOSSES, "own_loss", "mean_square")


@pytest.mark.parametrize("sizes", [{"cp": 2}, {"tp": 2}, {"cp": 2, "tp": 2}], ids=str)
def test_losses_written_for_one_device(pool, sizes):
    cases = [(n, Model, getattr(models, n), {}) for n in LOSSES if n != "shift_of_inputs"]
    world = sizes.get("cp", 1) * sizes.get("tp", 1)
    assert not pool.run(world, verified, cases, sizes)[0]
    shorter = [("shift_of_inputs", Model, shift_of_inputs, {})]
    assert not pool.run(world, verified_nine, shorter, sizes)[0]


def verified_nine(cases, sizes):
    return [
        str(report)
        for _, build, loss, options in cases
        if not (report := nemo2.verify(build, token_ids(4, 9), loss, sizes, **options)).ok
    ]


def test_four_ranks_unbalanced_and_balanced(pool):
    cases = [
        (f"{m} {b}", Model, shift_inside, {"context_parallel": ContextParallel(m, balance=b)})
        for m in METHODS
        for b in (True, False)
    ]
    assert not pool.run(4, verified, cases, {"cp": 4})[0]


# --- what the plan says


def planned(sizes, loss=shift_inside, build=Model, length=8, **options):
    return nemo2.plan(build(), sizes, step=loss, batch=token_ids(4, length), **options)


def moved(plan):
    return [c for c in collectives(plan.step.trace) if not c.small]


def test_logits_are_not_gathered():
    for sizes in ("cp=2", "cp=2,tp=2", "tp=2"):
        for loss in (shift_inside, models.each_token, models.transposed):
            assert all(models.VOCAB not in c.shape[-2:] for c in moved(planned(sizes, loss)))


def test_hidden_states_are_gathered_before_the_head_for_other_losses():
    plan = planned("cp=2", models.own_loss)
    assert [(c.module, c.kind, c.shape) for c in moved(plan) if c.kind != "exchange"] == [
        ("layers.1", "all-gather", (4, 8, 32)),
        ("layers.1", "reduce-scatter", (4, 8, 32)),
    ]
    assert "layers.1" in str(plan)


def test_sequence_parallel_false_keeps_activations_whole():
    kinds = {c.kind for c in moved(planned("tp=2", sequence_parallel=False))}
    assert kinds == {"all-reduce"}
    kinds = {c.kind for c in moved(planned("tp=2"))}
    assert kinds == {"all-gather", "reduce-scatter"}


def test_models_without_a_sequence_run_whole():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    shard(net[0].weight, "tp", dim=0)
    shard(net[0].bias, "tp", dim=0)
    shard(net[2].weight, "tp", dim=1)
    how = {"step": lambda m, x: m(x).square().mean(), "batch": torch.randn(4, 8)}
    plan = nemo2.plan(net, "tp=2", **how)
    assert {c.kind for c in moved(plan)} == {"all-reduce"}
    with pytest.raises(ShardingError, match="sequence_parallel=True: the step was run on a"):
        nemo2.plan(net, "tp=2", sequence_parallel=True, **how)


# --- what is refused


class Mixing(Model):
    """A block that mixes the sequence outside of attention."""

    def __init__(self, how):
        super().__init__()
        self.layers[1].attend = functools.partial(self.mix, how=how)

    @staticmethod
    def mix(x, mask, how):
        if how == "cumsum":
            return x.cumsum(1)
        if how == "shift":
            return F.pad(x, (0, 0, 1, 0))[:, :-1]
        if how == "by hand":
            return (x @ x.transpose(1, 2)).softmax(-1) @ x
        return F.conv1d(x.transpose(1, 2), x.new_ones(32, 32, 3), padding=1).transpose(1, 2)


@pytest.mark.parametrize("how", ["cumsum", "shift", "by hand", "convolution"])
def test_mixing_the_sequence_in_a_block_is_refused(how):
    with pytest.raises(ShardingError, match=r"(?s)inside a block needs the whole sequence.*cp=2"):
        planned("cp=2", build=functools.partial(Mixing, how))


def test_what_does_not_fit_says_what_does():
    with pytest.raises(ShardingError, match=r"(?s)sequence of 6 does not divide.*sequence of 8"):
        planned("cp=2", length=6)
    with pytest.raises(ShardingError, match=r"'ulysses' splits heads: 4 do not divide by cp=8"):
        planned("cp=8", length=16, context_parallel="ulysses")
    with pytest.raises(ShardingError, match=r"2 \(of 4 over tp=2\) do not divide by cp=4"):
        planned("cp=4,tp=2", length=16, context_parallel="ulysses")
    with pytest.raises(PipelineError, match=r"cp=2: the sequence is split inside a list of blocks"):
        nemo2.plan(nn.Linear(4, 4), "cp=2", step=lambda m, x: m(x).sum(), batch=torch.ones(2, 4))


class NoisyBlock(models.Block):
    def attend(self, x, mask):
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)[:, 0]


def test_dropout_inside_attention_is_refused():
    model = Model()
    model.layers[1].__class__ = NoisyBlock
    with pytest.raises(ShardingError, match=r"attention with dropout_p=0.1 over cp=2"):
        nemo2.plan(model, "cp=2", step=shift_inside, batch=token_ids(4, 8))

"""Activation checkpointing of blocks: parity, what is kept, what is communicated again."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from math import prod
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import nemo2
from nemo2 import Nemo2Error, Pipeline, shard
from nemo2.communication import collectives
from nemo2.sharding import collectives as moves
from tests.models import GPT, ZOO, Block, Skip, llama, next_token, token_ids
from tests.test_communication import counts

KINDS = ("full", "selective")
INTERLEAVED = Pipeline(4, "interleaved", 2)


def without_cache(build, layers):
    """A Hugging Face model as it is trained with checkpoints."""
    model = build(layers)
    model.config.use_cache = False
    return model


def verified(cells, kind, device):
    """Verify (model, mesh, options); return the texts of those that differ."""
    bad = []
    for model, mesh, options in cells:
        case = ZOO[model]
        if model in ("llama", "gpt2"):
            case = replace(case, build=functools.partial(without_cache, case.build), how={})
        if mesh.get("pp", 1) > 1 or model in ("llama", "gpt2"):
            case = case.with_layers(5 if options.get("pipeline") == INTERLEAVED else 2)
        report = nemo2.verify(
            case,
            token_ids(8),
            case.loss,
            mesh,
            device=device,
            rules=case.rules,
            remat=kind,
            **options,
        )
        if not report.ok:
            bad.append(f"{model} {mesh} {options}\n{report}")
    return bad


TWO = [
    ("example gpt", {"tp": 2}, {}),
    ("llama", {"tp": 2}, {"pipeline": Pipeline(2)}),
    ("gpt tied", {"tp": 2}, {"sequence_parallel": False}),
    ("gpt2", {"tp": 2}, {}),
    ("gpt tied", {"pp": 2}, {"pipeline": Pipeline(4)}),
    ("example gpt", {"pp": 2}, {"pipeline": INTERLEAVED}),
    ("llama", {"dp": 2}, {"data_parallel": "fsdp", "pipeline": Pipeline(2)}),
    ("gpt tied", {"dp": 2}, {"data_parallel": nemo2.DataParallel("fsdp", reshard=True)}),
    ("skip argument", {"dp": 2}, {"data_parallel": "ddp", "pipeline": Pipeline(2)}),
    ("example gpt", {"dp": 2}, {"data_parallel": "zero1", "pipeline": Pipeline(2)}),
    ("example gpt", {"cp": 2}, {"context_parallel": "ring"}),
    ("example gpt", {"cp": 2}, {"context_parallel": "ulysses"}),
    ("example gpt", {"cp": 2}, {"context_parallel": "all_gather"}),
]


@pytest.mark.parametrize("kind", KINDS)
def test_parity(pool, kind):
    assert pool.run(2, verified, TWO, kind, pool.device)[0] == []


@pytest.mark.parametrize("kind", KINDS)
def test_parity_on_all_axes(pool, kind):
    four = [("example gpt", {"cp": 2, "pp": 2}, {"pipeline": INTERLEAVED})]
    assert pool.run(4, verified, four, kind, pool.device)[0] == []
    eight = [("gpt tied", {"dp": 2, "pp": 2, "tp": 2}, {"pipeline": Pipeline(2)})]
    assert pool.run(8, verified, eight, kind, pool.device)[0] == []


# --- what is kept, and what runs again


class Counted(Block):
    """A block that counts how often its forward runs."""

    runs = 0

    def forward(self, x):
        type(self).runs += 1
        return super().forward(x)


def counted_runs(kind, device):
    """Return the runs of blocks in a step and in a forward, and hooks called in a step."""
    model = GPT(layers=3)
    model.layers = nn.ModuleList(Counted() for _ in range(3))
    shard(model.layers, "pp")
    parallel = nemo2.parallelize(model, nemo2.make_mesh(tp=2, device=device), remat=kind)
    ids, hooked = token_ids(4), []
    for block in parallel.module.layers:
        block.register_forward_pre_hook(lambda *_: hooked.append(1))
    parallel.backward(next_token, ids)
    parallel(ids[:, :-1])  # plans, which runs blocks, too
    Counted.runs = 0
    hooked.clear()
    parallel.backward(next_token, ids)
    step, hooks = Counted.runs, len(hooked)
    Counted.runs = 0
    parallel(ids[:, :-1])
    return step, hooks, Counted.runs


@pytest.mark.parametrize(("kind", "runs"), [(None, 3), ("full", 6), ("selective", 6)])
def test_blocks_run_again_and_their_hooks_do_not(pool, kind, runs):
    assert pool.run(2, counted_runs, kind, pool.device) == [(runs, 3, 3)] * 2


def kept(kind, how, device):
    """Return the bytes of activations that are alive between forward and backward, in a block."""
    parallel = nemo2.parallelize(
        GPT(layers=3), nemo2.make_mesh(**how, device=device), remat=kind, data_parallel="ddp"
    )
    storages = {}

    def pack(x):
        if x.numel() > 64:  # not parameters of a norm
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    own = {p.to_local().untyped_storage().data_ptr() for p in parallel.params.values()}

    def loss(model, ids):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return next_token(model, ids)

    parallel.backward(loss, token_ids(8))
    storages.clear()
    parallel.backward(loss, token_ids(8))
    return sum(n for at, n in storages.items() if at not in own)


def test_what_is_saved_for_backward_shrinks(pool):
    """Outer hooks see all that no checkpoint takes: with remat what is outside, and inputs."""
    sizes = {kind: pool.run(1, kept, kind, {}, pool.device)[0] for kind in (None, *KINDS)}
    assert sizes["full"] < sizes[None] / 3, sizes


def products_again(kind, device):
    """Return the matrix products, and attentions, of the forward that a backward repeats."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            self.seen["attention" if "scaled_dot_product" in name else name] += 1
            return func(*args, **(kwargs or {}))

    model = GPT(layers=3)
    mesh = nemo2.make_mesh(tp=2, device=device)
    parallel = nemo2.parallelize(model, mesh, remat=kind)
    parallel.backward(next_token, token_ids(4))
    with Count() as count:
        parallel.backward(next_token, token_ids(4))
    return {n: count.seen[n] for n in ("mm", "addmm", "attention")}


def test_selective_repeats_attention_and_no_product(pool):
    plain, full, selective = (
        pool.run(2, products_again, kind, pool.device)[0] for kind in (None, *KINDS)
    )

    def products(count):
        return count["mm"] + count["addmm"]

    assert products(full) > products(plain)
    assert products(selective) == products(plain)
    assert full["attention"] == selective["attention"] > plain["attention"]


class Changing(nn.Module):
    """Results of products that are changed in place, as ``nn.ReLU(inplace=True)`` does."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.relu = nn.ReLU(inplace=True)
        shard(self.up.weight, "tp", dim=0)
        shard(self.up.bias, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x):
        y = self.down(self.relu(self.up(x)))
        y += x
        return y.tanh()


class Dropping(Changing):
    def forward(self, x):
        return x + F.dropout(self.down(self.up(x).tanh()), 0.5, self.training)


class Inner(Changing):
    """The user's own checkpoint, inside the block."""

    reentrant = False

    def forward(self, x):
        return x + checkpoint(self.part, x, use_reentrant=self.reentrant)

    def part(self, x):
        return self.down(self.up(x).tanh())


class Reentrant(Inner):
    reentrant = True


class Stack(nn.Module):
    """Blocks, some called under the user's own checkpoint."""

    def __init__(self, block, outer=None):
        super().__init__()
        self.first, self.outer = nn.Linear(8, 8), outer
        self.layers = nn.ModuleList(block() for _ in range(3))
        shard(self.layers, "pp")

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            again = self.outer is not None and self.training
            x = checkpoint(layer, x, use_reentrant=self.outer) if again else layer(x)
        return x


def squares(model, x):
    return model(x).square().mean()


def stacks(cells, mesh, device):
    bad = []
    for kind, block, outer in cells:
        report = nemo2.verify(
            functools.partial(Stack, block, outer),
            torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),
            squares,
            mesh,
            device=device,
            remat=kind,
        )
        if not report.ok:
            bad.append(f"{kind} {block.__name__} {outer}\n{report}")
    return bad


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"dp": 2}], ids=str)
def test_changes_in_place_and_own_checkpoints(pool, mesh):
    cells = [(k, b, None) for k in KINDS for b in (Changing, Inner, Reentrant)]
    cells += [(k, Changing, outer) for k in KINDS for outer in (True, False)]
    assert pool.run(2, stacks, cells, mesh, pool.device)[0] == []


class Moving(nn.Module):
    """Reads buffers, and writes into them afterwards."""

    def __init__(self, assigns):
        super().__init__()
        self.lin, self.assigns = nn.Linear(8, 8), assigns
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("fixed", torch.ones(8))

    def forward(self, x):
        out = torch.tanh(self.lin(x + self.mean * self.fixed))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(out.flatten(0, -2).mean(0))
            if self.assigns:
                self.seen = self.seen + 1
            else:
                self.seen += 1
        return x + out


class MovingNet(nn.Module):
    def __init__(self, assigns):
        super().__init__()
        self.layers = nn.ModuleList(Moving(assigns) for _ in range(2))
        shard(self.layers, "pp")

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def moved(kind, compiled, microbatches):
    """Return losses, gradients and buffers of three steps."""
    torch.manual_seed(0)
    pipeline = Pipeline(microbatches=microbatches)
    mesh = nemo2.make_mesh(device="cpu")
    net = nemo2.parallelize(
        MovingNet(not compiled), mesh, remat=kind, compile=compiled, pipeline=pipeline
    )
    found = []
    for _ in range(3):
        found.append(net.backward(squares, torch.ones(4, 3, 8).cumsum(0)))
    found += [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()
    ]
    return [x.detach() for x in (*found, *net.module.buffers())]


def all_moved():
    ways = [(k, c) for k in (None, "full", "selective") for c in (False, "aot_eager")]
    return {(*way, mb): moved(*way, mb) for way in ways for mb in (1, 2)}


def test_a_block_runs_again_with_the_buffers_that_it_had(pool):
    (found,) = pool.run(1, all_moved)
    for (kind, compiled, mb), values in found.items():
        for got, want in zip(values, found[None, False, mb], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6, msg=f"{kind} {compiled} {mb}")
    *_, mean, seen, fixed = found[None, False, 2]
    assert mean.any()
    assert seen == 6
    assert torch.equal(fixed, torch.ones(8))


def dropped(mesh, kind, device):
    torch.manual_seed(0)
    model = Stack(Dropping).double()
    x = torch.randn(8, 8, dtype=torch.float64)
    parallel = nemo2.parallelize(
        model,
        nemo2.make_mesh(**mesh, device=device),
        remat=kind,
        pipeline=Pipeline(2),
    )
    loss, grads = nemo2.value_and_grad(squares, parallel)(parallel.params, x)
    return loss.item(), {n: g.full_tensor() for n, g in grads.items()}


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=str)
def test_dropout_is_the_same_in_the_recomputation(pool, mesh):
    plain = pool.run(2, dropped, mesh, None, pool.device)
    for kind in KINDS:
        for (loss, grads), (wanted, reference) in zip(
            pool.run(2, dropped, mesh, kind, pool.device), plain, strict=True
        ):
            assert loss == wanted
            assert all(torch.equal(g, reference[n]) for n, g in grads.items())


# --- what is communicated


def skip():
    return Skip(glue=False)


def communicated(build, options, device):
    torch.manual_seed(0)
    parallel = nemo2.parallelize(build(), nemo2.make_mesh(tp=2, device=device), **options)
    ids = token_ids(4)
    parallel.backward(next_token, ids)
    large, found = 4 * 8 * 32, Counter()  # an activation

    def counting(kind, original, whole):
        def call(*tensors, **options):
            found[kind] += tensors[whole].numel() == large
            return original(*tensors, **options)

        return call

    with (
        mock.patch.object(dist, "all_reduce", counting("all-reduce", dist.all_reduce, 0)),
        mock.patch.object(moves, "gather_single", counting("all-gather", moves.gather_single, 0)),
        mock.patch.object(
            moves, "scatter_single", counting("reduce-scatter", moves.scatter_single, 1)
        ),
    ):
        parallel.backward(next_token, ids)
    plan = replace(parallel.plan, step=parallel.runner.step_plan)
    planned = collectives(plan.step.trace, plan.blocks, plan.options.remat)
    wanted = Counter(c.kind for c in planned if prod(c.shape) == large)
    again = Counter(c.kind for c in planned if c.direction == "recomputation")
    return {k: n for k, n in found.items() if n}, dict(wanted), dict(again), str(plan)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("build", [GPT, skip])
@pytest.mark.parametrize("sequence", [None, False])
def test_planned_collectives_are_performed(pool, kind, build, sequence):
    """Sums are kept by "selective"; "full" repeats all but the last of a block.

    A block of ``GPT`` enters split regions twice, one of ``Skip`` once; the first of ``Skip``
    gets whole tensors.
    """
    entered = 6 if build is GPT else 4
    options = {"remat": kind, "sequence_parallel": sequence}
    for found, wanted, again, text in pool.run(2, communicated, build, options, pool.device):
        assert found == wanted
        assert ("recomputation" in text) == bool(again)
        assert f"remat={kind}" in text or kind is None
        if kind == "selective":
            assert again == ({} if sequence is False else {"all-gather": entered})
        if kind == "full":
            sums = "all-reduce" if sequence is False else "reduce-scatter"
            assert again.get(sums, 0) == (3 if build is GPT else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_planned_collectives_over_the_sequence_are_performed(pool, kind, method):
    options = {"remat": kind, "context_parallel": method}
    for sizes, world in (({"cp": 2}, 2), ({"cp": 2, "tp": 2}, 4)):
        for seen, planned in pool.run(world, counts, sizes, options, pool.device):
            assert seen == planned


# --- what is refused


def cached(device):
    parallel = nemo2.parallelize(
        nemo2.annotate(llama(2), {"model.layers": "pp"}),
        nemo2.make_mesh(device=device),
        remat="full",
    )
    with pytest.raises(Nemo2Error, match=r"use_cache = False for training"):
        parallel.backward(next_token, token_ids(4))


def test_what_cannot_run_again_is_refused(pool):
    pool.run(1, cached, pool.device)
    with pytest.raises(Nemo2Error, match=r"(?s)remat='full'.*none are annotated.*shard\(self.la"):
        nemo2.plan(nn.Linear(4, 4), "tp=1", remat="full")

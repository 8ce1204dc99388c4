"""The kinds of data parallelism: parity, what is split, what is communicated, unused parameters."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import nemo2
from nemo2 import DataParallel, Nemo2Error, shard
from nemo2.communication import data_parallel
from nemo2.sharding.buckets import pack
from tests.models import GPT, ZOO, Skip, counted, next_token, token_ids
from tests.test_communication import Watch
from tests.test_functional import own_part, purity, sgd, torch_way

DDP, ZERO1 = DataParallel("ddp"), DataParallel("zero1")
FSDP, KEPT = DataParallel("fsdp"), DataParallel("fsdp", reshard=False)
RESHARDING = DataParallel("fsdp", reshard=True)
HYBRID, HYBRID_ZERO1 = DataParallel("fsdp", replicate=2), DataParallel("zero1", replicate=2)
HYBRID_RESHARDING = DataParallel("fsdp", replicate=2, reshard=True)
ALL = (DDP, ZERO1, FSDP, KEPT, RESHARDING)


def name(x):
    return f"{x.kind}-{x.replicate}-{x.reshard}" if isinstance(x, DataParallel) else str(x)


# --- parity with one device


def verified(cells, device):
    bad = []
    for model, mesh, kind, microbatches in cells:
        case = ZOO[model]
        report = nemo2.verify(
            case,
            token_ids(mesh["dp"] * microbatches * 2),
            case.loss,
            mesh,
            device=device,
            data_parallel=kind,
            pipeline=nemo2.Pipeline(microbatches=microbatches),
        )
        if not report.ok:
            bad.append(f"{model} {mesh} {kind} x{microbatches}\n{report}")
    return bad


@pytest.mark.parametrize("kind", [k for k in ALL if k != FSDP], ids=name)
def test_parity(pool, kind):
    """Tied, lent and zero-dimensional parameters among them."""
    cells = [("gpt tied", {"dp": 2, "tp": 2}, kind, n) for n in (1, 2)]
    cells += [("gpt tied", {"dp": 2, "pp": 2}, kind, n) for n in (2, 5)]
    cells += [("skip glue", {"dp": 2, "pp": 2}, kind, n) for n in (1, 5)]
    cells += [("skip glue", {"dp": 2, "tp": 2}, kind, 5)]
    assert pool.run(4, verified, cells, pool.device) == [[]] * 4


def test_parity_of_hybrid_shard(pool):
    """Beside tp, pp and cp it is in the covering design."""
    kinds = (HYBRID, HYBRID_ZERO1, HYBRID_RESHARDING, DataParallel("fsdp", replicate=4))
    cells = list(itertools.product(["skip glue"], [{"dp": 4}], kinds, (1, 2)))
    assert pool.run(4, verified, cells, pool.device) == [[]] * 4


@pytest.mark.parametrize("kind", [KEPT, RESHARDING, HYBRID, HYBRID_ZERO1], ids=name)
def test_pure_and_the_torch_way(pool, kind):
    mesh = {"dp": 4} if kind.replicate > 1 else {"dp": 2, "pp": 2}
    for result in pool.run(4, purity, mesh, kind, pool.device):
        assert all(result.values()), result
    assert max(pool.run(4, sgd, mesh, kind, pool.device)) < 1e-12
    for error, names in pool.run(4, torch_way, mesh, kind, pool.device):
        assert error < 1e-9
        assert names


# --- what a rank holds


def build(model, mesh, kind, device, microbatches=1):
    torch.manual_seed(0)
    return nemo2.parallelize(
        model,
        nemo2.make_mesh(**mesh, device=device),
        data_parallel=kind,
        pipeline=nemo2.Pipeline(microbatches=microbatches),
    )


def state_sizes(kind, device):
    parallel = build(GPT(), {"dp": 4}, kind, device)
    optimizer = torch.optim.AdamW(parallel.parameters())
    parallel.backward(next_token, token_ids(2))
    optimizer.step()
    states = [s["exp_avg"] for s in optimizer.state.values()]
    whole = parallel.full_state_dict()
    view = parallel.params["head.weight"]
    return (
        sum(s.to_local().numel() for s in states),
        sum(s.numel() for s in states),
        tuple(str(p) for p in view.placements),
        tuple(view.device_mesh.shape),
        torch.equal(whole["head.weight"], view.full_tensor()),
    )


@pytest.mark.parametrize(
    ("kind", "shards"), [(DDP, 1), (ZERO1, 4), (FSDP, 4), (HYBRID, 2), (HYBRID_ZERO1, 2)], ids=name
)
def test_optimizer_state_is_split(pool, kind, shards):
    for own, whole, placements, mesh, same in pool.run(4, state_sizes, kind, pool.device):
        assert own == whole // shards
        last = "R" if shards == 1 else "S(0)"
        assert placements == (("R", last) if kind.replicate == 1 else ("R", "R", last))
        assert mesh == ((1, 4) if kind.replicate == 1 else (1, 2, 2))
        assert same


# --- what is communicated


def communicated(model, mesh, kind, microbatches, device):
    parallel = build(model, mesh, kind, device, microbatches)
    run = nemo2.value_and_grad(next_token, parallel)
    ids = token_ids(2 * microbatches)
    run(parallel.params, ids)
    with Watch() as seen:
        run(parallel.params, ids)
    found = Counter()
    for (call, elements), count in seen.items():
        if call.startswith("all_gather"):
            found["all-gather", elements] += count
        elif call.startswith("reduce_scatter"):
            found["reduce-scatter", elements] += count
        elif elements > 512:  # smaller: losses, flags, the zero-dimensional scale
            found["all-reduce", elements] += count
    wanted = Counter()
    planned = [
        c
        for c in data_parallel(parallel.plan, parallel.groups.pp_rank)
        if not (c.unit.startswith("bucket") and c.elements <= 512)
    ]
    shards = kind.shards(parallel.plan.sizes)
    for c in planned:  # what is counted of a reduce-scatter is its result
        elements = c.elements // shards if c.kind == "reduce-scatter" else c.elements
        wanted[c.kind, elements] += c.count
    gathers = {c.unit: c.count for c in planned if c.kind == "all-gather"}
    scatters = {c.unit: c.count for c in planned if c.kind == "reduce-scatter"}
    return dict(found), dict(wanted), gathers, scatters


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("kind", ALL, ids=name)
def test_planned_collectives_are_performed(pool, kind, pp, microbatches):
    mesh = {"dp": 2, "pp": pp}
    results = pool.run(2 * pp, communicated, GPT(layers=4), mesh, kind, microbatches, pool.device)
    keeps = kind in (ZERO1, KEPT) or (kind == FSDP and (pp > 1 or microbatches > 1))
    for found, wanted, gathers, scatters in results:
        assert found == wanted
        for unit, count in gathers.items():
            assert scatters[unit] == (1 if keeps else microbatches)
            if keeps:
                assert count == 1
            else:
                assert count == microbatches * (1 if pp == 1 and not unit else 2)
        assert bool(gathers) == (kind != DDP)


def test_planned_collectives_of_hybrid_shard(pool):
    for kind in (HYBRID, HYBRID_RESHARDING):
        for found, wanted, gathers, _ in pool.run(
            4, communicated, GPT(), {"dp": 4}, kind, 2, pool.device
        ):
            assert found == wanted
            assert len(gathers) == 4


def test_plan_lists_them():
    def text(kind, microbatches):
        pipeline = nemo2.Pipeline(microbatches, layers_per_stage=(3, 2))
        plan = nemo2.plan(Skip(glue=True), "dp=4,pp=2", data_parallel=kind, pipeline=pipeline)
        return " ".join(str(plan).split())

    shown = text(HYBRID_RESHARDING, 3)
    assert "data_parallel=fsdp replicate=2 reshard=True" in shown
    assert "0 layers.* x3 before use all-gather of parameters 18 4224" in shown
    assert "0 layers.* x3 during backward reduce-scatter of gradients 9 4224" in shown
    assert "0 layers.* x3 during backward all-reduce of gradients 9 2112" in shown
    assert "replicate: Replicate(), dp: Shard(0)" in shown
    assert "1 bucket 0 during backward all-reduce of gradients 1 8448 33,792" in text(DDP, 3)
    assert "0 (outside blocks) before use all-gather of parameters 1 4160" in text(ZERO1, 3)


# --- buckets


def test_buckets():
    mib, wide, narrow = 2**20, torch.float64, torch.float32
    assert pack([]) == []
    assert pack([(wide, 30 * mib), (wide, 1), (narrow, 1), (wide, 25 * mib), (wide, 1)]) == [
        [0],
        [1, 3],
        [2],
        [4],
    ]


def overlapping(pp, microbatches, device):
    """Return how many buckets there were, and were launched before the end of the backward."""
    with mock.patch("nemo2.sharding.buckets.BUCKET_BYTES", 20_000):
        parallel = build(GPT(layers=4), {"dp": 2, "pp": pp}, DDP, device, microbatches)
        buckets = parallel._data_parallel._buckets
        counts, finish = [], buckets.finish

        def counting():
            counts.append((len(buckets._buckets), buckets._launched))
            finish()

        buckets.finish = counting
        ids = own_part(parallel, token_ids(4 * microbatches))
        for _ in range(3):
            parallel.backward(next_token, ids)
    return counts


@pytest.mark.parametrize(("pp", "microbatches"), [(1, 1), (1, 3), (2, 3)])
def test_buckets_are_launched_during_the_backward(pool, pp, microbatches):
    for counts in pool.run(2 * pp, overlapping, pp, microbatches, pool.device):
        for planned, launched in counts:
            assert planned > 3
            assert launched == planned


class Shared(nn.Module):
    """One layer used by each block, under reentrant checkpoints: its gradient comes often."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.shared = nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = checkpoint(self.part, x, use_reentrant=self.reentrant)
        return self.last(x)

    def part(self, x):
        return self.shared(x).tanh()


def squares(model, x):
    return model(x).square().mean()


def checkpointed(kind, reentrant, microbatches, device):
    with mock.patch("nemo2.sharding.buckets.BUCKET_BYTES", 64):
        model = Shared(reentrant).double()
        parallel = build(model, {"dp": 2}, kind, device, microbatches)
        x = torch.randn(12, 8, dtype=torch.float64)
        alone = copy.deepcopy(model)
        squares(alone, x).backward()
        errors, counts = [], []
        for _ in range(3):
            parallel.zero_grad()
            with Watch() as seen:
                parallel.backward(squares, own_part(parallel, x))
            counts.append(sum(c for (call, _), c in seen.items() if call == "all_reduce"))
            errors += [
                (p.grad.full_tensor().cpu() - alone.get_parameter(n).grad).abs().max().item()
                for n, p in parallel.named_parameters()
            ]
    return max(errors), counts


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_gradient_that_comes_in_parts(pool, reentrant, microbatches):
    """The first step sums what came late apart; the others wait for all parts."""
    results = pool.run(2, checkpointed, DDP, reentrant, microbatches, pool.device)
    for error, counts in results:
        assert error < 1e-15
        assert counts == [9 if reentrant else 8, 8, 8]  # 6 buckets, flags, loss; what came late


@pytest.mark.parametrize("kind", [ZERO1, RESHARDING], ids=name)
def test_checkpoints_under_fsdp(pool, kind):
    for reentrant in (True, False):
        for error, _ in pool.run(2, checkpointed, kind, reentrant, 3, pool.device):
            assert error < 1e-15


# --- parameters that not all ranks use


class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return x * self.factor


class Choosing(nn.Module):
    """Uses layers, and skips blocks, by the values of the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.never, self.frozen = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.sometimes, self.idle = nn.Linear(8, 8), Times()
        shard(self.layers, "pp")

    def forward(self, x):
        y = self.frozen(self.first(x)) * self.scale
        for i, layer in enumerate(self.layers):
            if x[0, i] > 0:
                y = layer(y).tanh()
        return self.idle(self.sometimes(y)) if x[0, 3] > 0 else y


class Outside(Choosing):
    """Reads values after the blocks only."""

    def forward(self, x):
        y = self.frozen(self.first(x)) * self.scale
        for layer in self.layers:
            y = layer(y).tanh()
        return self.idle(self.sometimes(y)) if x[0, 3] > 0 else y


def signs(rows):
    """Return two samples for each row of signs: the first four columns choose."""
    x = torch.randn(2 * len(rows), 8, dtype=torch.float64)
    for i, row in enumerate(rows):
        x[2 * i : 2 * i + 2, :4] = torch.tensor(row, dtype=torch.float64)
    return x


ROWS = {
    "differ": [(1, -1, 1, 1), (-1, 1, 1, -1), (1, 1, 1, -1), (-1, -1, 1, -1)],
    "one rank": [(1, 1, 1, 1), (1, 1, 1, 1), (1, -1, 1, -1), (1, -1, 1, -1)],
    "nobody": [(1, -1, 1, -1)] * 4,
}


def choosing(build_model, rows, mesh, kind, microbatches, device):
    torch.manual_seed(0)
    model, x = build_model().double(), signs(ROWS[rows])
    parallel = build(model, mesh, kind, device, microbatches)
    parts = x.chunk(mesh["dp"] * microbatches) if mesh["dp"] == 2 else x.chunk(4)
    alone = copy.deepcopy(model)
    sum(squares(alone, part) for part in parts).div(len(parts)).backward()
    errors = {}
    for again in range(2):
        parallel.zero_grad()
        parallel.backward(squares, own_part(parallel, x))
        for n, p in alone.named_parameters():
            own = parallel.params[n].grad if n in parallel.params else p.grad
            if (own is None) != (p.grad is None):
                errors[n, again] = f"{own is None=}, {p.grad is None=}"
            elif own is not None and own is not p.grad:
                close = torch.allclose(own.full_tensor().cpu(), p.grad, rtol=1e-10, atol=1e-13)
                errors |= {} if close else {(n, again): "differs"}
    parallel.eval()
    out = parallel(own_part(parallel, x), broadcast_output=True)
    own = own_part(parallel, x)
    errors |= {} if torch.allclose(out.cpu(), alone(own), atol=1e-12) else {"forward": "differs"}
    return errors


@pytest.mark.parametrize("kind", ALL, ids=name)
def test_parameters_that_some_ranks_do_not_use(pool, kind):
    """No hang, right sums; none where no rank used one, as on one device."""
    models = (Outside,) if kind == RESHARDING else (Choosing, Outside)
    for model, rows, microbatches in itertools.product(models, ROWS, (1, 2)):
        mesh = {"dp": 2}
        got = pool.run(2, choosing, model, rows, mesh, kind, microbatches, pool.device)
        assert got == [{}, {}], (model, rows, microbatches, got)


@pytest.mark.parametrize("kind", [ZERO1, RESHARDING, DDP], ids=name)
def test_parameters_that_some_ranks_of_a_stage_do_not_use(pool, kind):
    got = pool.run(4, choosing, Outside, "one rank", {"dp": 2, "pp": 2}, kind, 2, pool.device)
    assert got == [{}] * 4


def test_parameters_that_some_ranks_of_a_replica_do_not_use(pool):
    for kind, rows in itertools.product((HYBRID, HYBRID_ZERO1), ROWS):
        got = pool.run(4, choosing, Choosing, rows, {"dp": 4}, kind, 1, pool.device)
        assert got == [{}] * 4, (kind, rows, got)


def lengths(device):
    """Gradients also come right when a count differs between ranks and some have none."""
    parallel = build(GPT(tied=True).double(), {"dp": 4}, HYBRID, device)
    ids = own_part(parallel, token_ids(8))
    _, grads = nemo2.value_and_grad(counted, parallel)(parallel.params, ids)
    norm = nemo2.global_norm(grads, parallel)
    whole = torch.stack([g.full_tensor().norm() for g in grads.values()]).norm()
    return abs(norm.item() - whole.item()), dist.get_rank()


def test_norm_counts_replicas_once(pool):
    assert max(error for error, _ in pool.run(4, lengths, pool.device)) < 1e-12


# --- blocks that write into what they are given


class Adding(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.shift = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        x += self.shift
        return x + self.lin(x).tanh()


class AddingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Adding() for _ in range(2))
        shard(self.layers, "pp")

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def added(device, options):
    """Return whether training equals one device, or the refusal."""

    def loss(model, x):
        return model(x).square().mean()

    x = torch.ones(4, 8).cumsum(0)
    try:
        return nemo2.verify(AddingNet, x, loss, {"dp": 2}, device=device, **options).ok
    except Nemo2Error as error:
        return str(error)


def test_blocks_that_write_into_what_they_are_given(pool):
    asked = [({}, "data_parallel='ddp'"), ({"data_parallel": "zero1"}, "data_parallel='ddp'")]
    asked.append(({"data_parallel": "ddp", "remat": "full"}, "remat=None"))
    for options, cure in asked:
        said = pool.run(2, added, pool.device, options)
        assert said[0] == said[1]
        assert "x = x + ..." in said[0]
        assert cure in said[0]
    assert pool.run(2, added, pool.device, {"data_parallel": "ddp"}) == [True, True]


# --- the end of a model


def freed(kind, device, options):
    """Return whether nothing keeps a model that was trained and is no longer used."""
    parallel = build(GPT(), {"dp": 2}, kind, device) if not options else lowered(kind, device)
    parallel.backward(next_token, token_ids(2))
    kept = weakref.ref(parallel.storage.entries["norm.weight"])
    del parallel
    gc.collect()
    return kept() is None


def lowered(kind, device):
    mesh = nemo2.make_mesh(dp=2, device=device)
    return nemo2.parallelize(GPT(), mesh, data_parallel=kind, precision="bf16")


@pytest.mark.parametrize("options", [False, True], ids=["", "bf16"])
@pytest.mark.parametrize("kind", [DDP, FSDP], ids=name)
def test_a_model_is_freed(pool, kind, options):
    """Hooks that keep what keeps their parameter are a cycle that Python does not see."""
    assert pool.run(2, freed, kind, pool.device, options) == [True, True]

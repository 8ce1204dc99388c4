"""Bugs that change numbers and raise nothing: one test for each, named after it.

Where a docstring says "Planted", the test runs the bug, too, and sees it.
"""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import nemo2
from nemo2 import DataParallel, Pipeline
from nemo2.sharding import reduce
from tests import context_models
from tests.models import GPT, VOCAB, Fused, counted, next_token, token_ids

TWO = Pipeline(microbatches=2)


def name(x):
    return getattr(x, "__name__", str(x))


def tied():
    return GPT(layers=2, tied=True)


def fused():
    return Fused(layers=2)


def split(build, mesh, device, **options):
    """Return a parallel model in float64, the same model alone, and this rank's part of a batch."""
    torch.manual_seed(0)
    model = build().double()
    parallel = nemo2.parallelize(model, nemo2.make_mesh(**mesh, device=device), **options)
    ids = token_ids(8)
    return parallel, model, ids.chunk(parallel.groups.sizes.dp)[parallel.groups.dp_rank], ids


# --- the gradient norm


def clipped(build, mesh, plant, device):
    """Return the norm before and after clipping to half of it; on the mesh and on one device."""
    parallel, alone, own, ids = split(build, mesh, device, pipeline=TWO)
    next_token(alone, ids).backward()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in alone.parameters()])
    with plant() if plant is not None else nullcontext():
        parallel.backward(next_token, own)
        norm = parallel.clip_grad_norm_(wanted.item() / 2)
        again = nemo2.global_norm({n: p.grad for n, p in parallel.params.items()}, parallel)
    worst = max(
        (p.grad.full_tensor().cpu() * 2 - reference).abs().max().item()
        for n, p in parallel.params.items()
        for reference in [_in_order(parallel, n, alone)]
    )
    return norm.item(), again.item(), wanted.item(), worst


def _in_order(parallel, name, alone):
    from nemo2.sharding.fused import in_rank_order

    plan = parallel.storage.entries[name].plan
    return in_rank_order(alone.get_parameter(name).grad, plan, parallel.groups.sizes.tp)


MESHES = [
    (tied, {"tp": 2}),
    (tied, {"cp": 2}),
    (tied, {"pp": 2}),
    (fused, {"tp": 2}),
    (fused, {"dp": 2}),
    (tied, {"cp": 2, "tp": 2}),
    (fused, {"pp": 2, "tp": 2}),
    (tied, {"dp": 2, "pp": 2}),
]


@pytest.mark.parametrize(("build", "mesh"), MESHES, ids=name)
def test_gradients_are_clipped_by_the_true_norm(pool, build, mesh):
    """Over every axis, with replicated, tied and fused parameters."""
    world = torch.tensor(list(mesh.values())).prod().item()
    for norm, again, wanted, worst in pool.run(world, clipped, build, mesh, None, pool.device):
        assert norm == pytest.approx(wanted, rel=1e-10)
        assert again == pytest.approx(wanted / 2, rel=1e-5)  # clipping adds 1e-6 to the norm
        assert worst < 1e-5


def every_copy_counts():
    return mock.patch.object(reduce, "counted_here", return_value=True)


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=str)
def test_norm_inflated_by_replicated_parameters(pool, mesh):
    """Planted: every rank counts its copy of a replicated or tied parameter."""
    for norm, _, wanted, _ in pool.run(2, clipped, tied, mesh, every_copy_counts, pool.device):
        assert norm > wanted * 1.01
    for norm, _, wanted, _ in pool.run(2, clipped, tied, mesh, None, pool.device):
        assert norm == pytest.approx(wanted, rel=1e-10)


def norm_of_a_stage():
    original = reduce.norm_of

    def alone(*args):
        with mock.patch.object(dist, "all_reduce"):
            return original(*args)

    return mock.patch("nemo2.model.norm_of", alone)


def test_norm_taken_per_stage(pool):
    """Planted: no sum over the ranks, so that each stage clips by its own norm."""
    norms = pool.run(2, clipped, GPT, {"pp": 2}, norm_of_a_stage, pool.device)
    assert norms[0][0] != pytest.approx(norms[1][0], rel=0.01)
    norms = pool.run(2, clipped, GPT, {"pp": 2}, None, pool.device)
    assert norms[0][0] == norms[1][0] == pytest.approx(norms[0][2], rel=1e-10)


# --- copies that must stay one


def no_sums_over_tp():
    original = reduce.reduce_gradients

    def without(storage, groups, partial, ties, used):
        original(storage, groups, frozenset(), ties, used)

    return mock.patch("nemo2.model.reduce_gradients", without)


def no_sums_over_dp():
    return mock.patch("nemo2.sharding.buckets.start_sum")


def no_sums_over_stages():
    original = reduce.reduce_gradients

    def without(storage, groups, partial, ties, used):
        original(storage, groups, partial, {}, used)

    return mock.patch("nemo2.model.reduce_gradients", without)


def trained(build, mesh, plant, steps, device, dtype=torch.float32):
    """Train; return this rank's parameters that another rank has, too."""
    torch.manual_seed(0)
    model = build().to(dtype)
    parallel = nemo2.parallelize(
        model, nemo2.make_mesh(**mesh, device=device), data_parallel="ddp", pipeline=TWO
    )
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
    ids = token_ids(8)
    with plant() if plant is not None else nullcontext():
        for step in range(steps):
            optimizer.zero_grad()
            parallel.backward(next_token, ids.roll(step, 0))
            parallel.clip_grad_norm_(1.0)
            optimizer.step()
    plan = parallel.plan
    return {
        e.name: e.local.cpu().clone()
        for e in parallel.storage
        if (e.plan.tp_dim is None or plan.sizes.tp == 1)
        and (plan.sizes.pp == 1 or len(e.plan.ranks) > 1)
    }


@pytest.mark.parametrize(
    ("mesh", "plant"), [({"tp": 2}, no_sums_over_tp), ({"cp": 2}, no_sums_over_dp)], ids=name
)
def test_replicated_parameters_drift_apart(pool, mesh, plant):
    """After 20 steps, bit for bit. Planted: gradients of replicas are not summed."""
    first, second = pool.run(2, trained, tied, mesh, None, 20, pool.device)
    assert len(first) > 10
    assert all(torch.equal(first[n], second[n]) for n in first)
    first, second = pool.run(2, trained, tied, mesh, plant, 3, pool.device)
    assert not all(torch.equal(first[n], second[n]) for n in first)


def test_tied_weight_updated_on_one_stage_only(pool):
    """Planted: the gradients of the tied weight's uses are not added over stages."""
    first, second = pool.run(2, trained, tied, {"pp": 2}, None, 20, pool.device)
    assert list(first) == list(second) == ["embed.weight"]
    assert torch.equal(first["embed.weight"], second["embed.weight"])
    first, second = pool.run(2, trained, tied, {"pp": 2}, no_sums_over_stages, 3, pool.device)
    assert not torch.equal(first["embed.weight"], second["embed.weight"])


# --- the loss and its scale


def losses(mesh, microbatches, loss_fn, device):
    parallel, alone, own, ids = split(tied, mesh, device, pipeline=Pipeline(microbatches))
    loss, grads = nemo2.value_and_grad(loss_fn, parallel)(parallel.params, own)
    result = loss_fn(alone, ids)
    wanted = result[0] / result[1] if isinstance(result, tuple) else result
    return loss.item(), nemo2.global_norm(grads, parallel).item(), wanted.item()


@pytest.mark.parametrize("mesh", [{"cp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_loss_scaled_by_the_number_of_microbatches_or_by_cp(pool, mesh):
    """Loss and gradients do not depend on the count. Megatron's default loss contract divides by
    the count and multiplies by cp: without ``calculate_per_token_loss`` this fails.
    """
    found = [pool.run(2, losses, mesh, n, next_token, pool.device)[0] for n in (1, 2, 4)]
    for loss, norm, wanted in found:
        assert loss == pytest.approx(wanted, rel=1e-12)
        assert norm == pytest.approx(found[0][1], rel=1e-10)


def unequal(model, ids):
    """A mean over what is not padding, whose count differs between samples."""
    total, count = counted(model, ids)
    return total / count


def noted(device):
    report = nemo2.verify(tied, token_ids(8), unequal, {"dp": 2}, device=device, pipeline=TWO)
    return report.ok, report.note


def test_means_of_means_with_unequal_counts(pool):
    """``(sum, count)`` is exact; a mean is the mean of the parts' means, and verify says so.
    Fails if sums are divided by each part's own count.
    """
    for mesh, world in (({"dp": 2}, 2), ({"cp": 2}, 2), ({"pp": 2}, 2), ({"dp": 2, "cp": 2}, 4)):
        for loss, _, wanted in pool.run(world, losses, mesh, 2, counted, pool.device):
            assert loss == pytest.approx(wanted, rel=1e-12)
    loss, _, wanted = pool.run(2, losses, {"dp": 2}, 2, unequal, pool.device)[0]
    assert loss != pytest.approx(wanted, rel=1e-6)
    for ok, note in pool.run(2, noted, pool.device):
        assert not ok
        assert "return (sum, count) from loss_fn" in note


# --- documents packed into one sequence


def each_loss(model, batch):
    """Each token's loss beside their mean."""
    ids = batch["ids"]
    logits = model(ids)[:, :-1]
    each = F.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1), reduction="none")
    return each.mean(), each.detach()


def documents(method, outside, device):
    """Return each token's loss before and after a change in the second of three documents."""
    torch.manual_seed(0)
    model = context_models.Model("rotary", outside).double()
    parallel = nemo2.parallelize(
        model, nemo2.make_mesh(cp=2, device=device), context_parallel=method
    )
    low, high = VOCAB // 4, VOCAB - 1  # a new document begins where an id is small
    ids = torch.randint(low, high, (1, 12), generator=torch.Generator().manual_seed(1))
    ids[0, [0, 4, 8]] = torch.tensor([1, 2, 3])
    other = ids.clone()
    other[0, 5:8] = (other[0, 5:8] - low + 7) % (high - low) + low
    run = nemo2.value_and_grad(each_loss, parallel, has_aux=True)
    return [run(parallel.params, {"ids": x})[0][1][0].cpu() for x in (ids, other)]


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
def test_packed_documents_attend_to_each_other(pool, method):
    """Losses in the other documents are the same to the last bit. Planted: no document mask."""
    for before, after in pool.run(2, documents, method, "documents", pool.device):
        # Token i predicts i + 1: 4, 5 and 6 predict changed tokens, 7 follows changed ones.
        same = before == after
        assert same[[0, 1, 2, 3, 8, 9, 10]].all()
        assert not same[[4, 5, 6, 7]].any()
    for before, after in pool.run(2, documents, method, "", pool.device):
        assert (before != after)[[8, 9, 10]].all()


# --- parameters that are not used


class Idle(nn.Module):
    """Parameters in and outside of blocks that no rank uses, and one that the first uses."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.never, self.sometimes = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers[1].spare = nn.Parameter(torch.ones(3))
        nemo2.shard(self.layers, "pp")

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.sometimes(x) if x.shape[0] == 2 else x


def idle(kind, device):
    torch.manual_seed(0)
    parallel = nemo2.parallelize(
        Idle().double(), nemo2.make_mesh(dp=2, device=device), data_parallel=kind
    )
    rows = 2 if parallel.groups.dp_rank == 0 else 3  # of a path that only shapes decide
    x = torch.ones(rows, 8, dtype=torch.float64)
    for _ in range(2):
        parallel.zero_grad()
        parallel.backward(lambda model, x: model(x).square().mean(), x)
    return {n: p.grad is not None for n, p in parallel.params.items()}


KINDS = ["ddp", "zero1", "fsdp", DataParallel("fsdp", reshard=True)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_unused_parameters_hang_the_reduction(pool, kind):
    """A hang fails by its timeout; so it is if ranks reduce only what they used themselves."""
    for grads in pool.run(2, idle, kind, pool.device):
        unused = {"never.weight", "never.bias", "layers.1.spare"}
        assert {n for n, has in grads.items() if not has} == unused

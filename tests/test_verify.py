"""``verify`` sees what it must: planted bugs are each reported, and its report says where."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

import nemo2
from nemo2.pipeline import losses
from nemo2.sharding import actions, collectives, materialise, reduce, ring
from tests.models import GPT, VOCAB, Skip, counted, next_token, token_ids


def tied():
    return GPT(tied=True)


def skip():
    return Skip(glue=True)


def run(mesh, build=tied, kind="ddp", microbatches=2, loss=next_token, device="cpu", **options):
    return nemo2.verify(
        build,
        token_ids(8),
        loss,
        mesh,
        device=device,
        data_parallel=kind,
        pipeline=nemo2.Pipeline(microbatches=microbatches),
        **options,
    )


def no_all_reduce(x, axis):
    return x.clone()


def all_reduce_twice(x, axis):
    return ALL_REDUCE(ALL_REDUCE(x, axis), axis)


def take_neighbour(x, dim, axis):
    size = x.shape[dim] // axis.degree
    return x.narrow(dim, (axis.rank + 1) % axis.degree * size, size)


def rounded(tensors, group):
    kept = list(tensors)
    SUM_TOGETHER(kept, group)
    for x in kept:
        x.copy_(x.float().double())


def swapped_shard(full, param, groups):
    if param.tp_dim is None:
        return full
    size = full.shape[param.tp_dim] // groups.sizes.tp
    return full.narrow(param.tp_dim, (1 - groups.tp_rank) * size, size).clone()


def swapped_for_one(full, param, groups):
    if param.name == "layers.1.up.weight":
        return swapped_shard(full, param, groups)
    return TP_PART(full, param, groups)


def scaled(storage, scale):
    SCALE(storage, scale * 2)


def nothing(*args, **kwargs):
    return None


def not_started(flat, group):
    return SimpleNamespace(wait=lambda: None)


def norm_without_axes(entry, storage, groups):
    return True


def bias_everywhere(x, weight, bias, action, axes):
    return actions.total(torch.nn.functional.linear(x, weight, bias), action, axes["tp"])


def no_backward(x, layout, axis):
    return x if layout is None else collectives.gather(x, layout, axis)


def all_pairs(what, axis, rank, other, size):
    yield ring._Pair(slice(0, size), slice(0, size), False, None)


def all_losses(loss_fn, has_aux, copies, divisor):
    return LOSSES(loss_fn, has_aux, divisor=divisor)


def of_one_rank(loss_fn, has_aux, copies, divisor):
    return LOSSES(loss_fn, has_aux, copies, divisor // 2)


def wrong_half(x, dim, axis):
    return TAKE(x, dim, dataclasses.replace(axis, rank=0))


LOSSES = losses.Losses
SUM_TOGETHER = reduce.all_reduce_together
ALL_REDUCE, TP_PART, SCALE = collectives.all_reduce, materialise._tp_part, reduce.scale_gradients
TAKE, WHOLE = collectives.take, {"sequence_parallel": False}

# name -> (what is patched, by what, mesh, model, and options if any)
BUGS = {
    "a missing all-reduce in backward": (
        "nemo2.sharding.collectives.all_reduce",
        no_all_reduce,
        {"tp": 2},
        tied,
        WHOLE,
    ),
    "one all-reduce too many": (
        "nemo2.sharding.collectives.all_reduce",
        all_reduce_twice,
        {"tp": 2},
        tied,
        WHOLE,
    ),
    "a wrong scale of means": ("nemo2.pipeline.losses.Losses", of_one_rank, {"dp": 2}, tied),
    "a wrong scale of sums": (
        "nemo2.model.scale_gradients",
        scaled,
        {"dp": 2},
        tied,
        {"loss": counted},
    ),
    "swapped shards": ("nemo2.sharding.materialise._tp_part", swapped_shard, {"tp": 2}, tied),
    "one swapped shard": ("nemo2.sharding.materialise._tp_part", swapped_for_one, {"tp": 2}, tied),
    "a tied gradient left out": (
        "nemo2.parallelize._tie_groups",
        lambda plan, groups: {},
        {"pp": 2},
        tied,
    ),
    "gradients not reduced over dp": (
        "nemo2.sharding.buckets.start_sum",
        not_started,
        {"dp": 2},
        tied,
    ),
    "a lent gradient not given back": ("nemo2.model.give_back", nothing, {"pp": 2}, skip),
    "replicas counted twice in the norm": (
        "nemo2.sharding.reduce.counted_here",
        norm_without_axes,
        {"tp": 2},
        tied,
    ),
    "a bias added on every rank": (
        "nemo2.pipeline.forwards.rowwise_linear",
        bias_everywhere,
        {"tp": 2},
        tied,
    ),
    "a region entered without its backward": (
        "nemo2.pipeline.forwards.enter_once",
        no_backward,
        {"tp": 2},
        tied,
        WHOLE,
    ),
    "a gather whose backward is a slice": (
        "nemo2.pipeline.forwards.enter_once",
        no_backward,
        {"tp": 2},
        tied,
    ),
    "norms of a split sequence not summed over tp": (
        "nemo2.sharding.reduce.all_reduce_together",
        nothing,
        {"tp": 2},
        tied,
    ),
    "queries that see keys after them": (
        "nemo2.sharding.ring._pairs",
        all_pairs,
        {"cp": 2},
        tied,
    ),
    "the same part of the sequence on both ranks": (
        "nemo2.sharding.collectives.take",
        wrong_half,
        {"cp": 2},
        tied,
    ),
    "gradients that nemo2 rounds to float32": (
        "nemo2.sharding.reduce.all_reduce_together",
        rounded,
        {"tp": 2},
        tied,
    ),
    "a loss that counts once for each part of the sequence": (
        "nemo2.pipeline.losses.Losses",
        all_losses,
        {"cp": 2},
        tied,
    ),
}


def planted(name, device):
    target, bug, mesh, build, *options = BUGS[name]
    with mock.patch(target, bug):
        report = run(mesh, build, device=device, **dict(*options))
    return report.ok, report.first, str(report)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_reported(pool, name):
    for ok, first, text in pool.run(2, planted, name, pool.device):
        assert not ok, text
        assert first is not None
        assert f"DIFFERS, first in {first}" in text


def test_swapped_shard_is_named(pool):
    ok, first, text = pool.run(2, planted, "one swapped shard", pool.device)[0]
    assert not ok
    assert first in text


def clean(device):
    return [
        run({"tp": 2}, device=device).ok,
        run({"pp": 2}, skip, device=device).ok,
        run({"dp": 2}, device=device).ok,
    ]


def test_without_a_bug_all_is_equal(pool):
    assert pool.run(2, clean, pool.device) == [[True, True, True]] * 2


def padded_mean(model, ids):
    """A mean over unequal counts: what one device computes is not the mean of parts' means."""
    total, count = counted(model, ids)
    return total / count


def unequal(device):
    report = run({"dp": 2}, loss=padded_mean, device=device)
    exact = run({"dp": 2}, loss=counted, device=device)
    return report.ok, report.note, exact.ok, exact.note


def test_a_mean_over_unequal_counts_is_explained(pool):
    for ok, note, exact, nothing_said in pool.run(2, unequal, pool.device):
        assert not ok
        assert "return (sum, count)" in note
        assert exact
        assert nothing_said == ""


def test_command_line(tmp_path):
    module = tmp_path / "mine.py"
    module.write_text(
        "import torch, nemo2\n"
        "from torch import nn\n"
        "def build():\n"
        "    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))\n"
        "    nemo2.shard(net[0].weight, 'tp', dim=0)\n"
        "    nemo2.shard(net[0].bias, 'tp', dim=0)\n"
        "    nemo2.shard(net[2].weight, 'tp', dim=1)\n"
        "    return net\n"
        "def batch():\n"
        "    return torch.randn(8, 8, generator=torch.Generator().manual_seed(0))\n"
        "def loss(model, x):\n"
        "    return model(x).square().mean()\n"
        "def rank_dependent(model, x):\n"
        "    return model(x).square().mean() * (1 + torch.distributed.get_rank())\n"
    )
    command = [
        sys.executable,
        "-m",
        "nemo2",
        "verify",
        "mine:build",
        "--batch",
        "mine:batch",
        "--mesh",
        "tp=2",
    ]
    good = subprocess.run(
        [*command, "--loss", "mine:loss"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert good.returncode == 0, good.stderr
    assert "equal to one device" in good.stdout
    missing = subprocess.run(
        [*command, "--loss", "mine:nothing"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert missing.returncode == 2
    assert "mine has no 'nothing'" in missing.stderr


def test_arguments_that_cannot_travel():
    with pytest.raises(nemo2.Nemo2Error, match="top level of a module"):
        nemo2.verify(lambda: nn.Linear(2, 2), torch.zeros(2, 2), lambda m, x: m(x).sum(), "tp=2")


def test_one_device_needs_no_processes():
    report = nemo2.verify(
        lambda: nn.Linear(VOCAB, 2), torch.ones(2, VOCAB), lambda m, x: m(x).mean(), "dp=1"
    )
    assert report.ok
    assert "equal to one device" in str(report)

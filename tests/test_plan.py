"""The plan: pure, printable, and the place where user errors surface, all at once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import nemo2
from nemo2 import Nemo2Error, PipelineError, ShardingError, shard
from nemo2.pipeline.microbatch import plan_batch, split_batch
from nemo2.pipeline.stages import split_blocks
from tests.models import GPT, WIDTH, Skip, next_token, token_ids


def test_pure_and_frozen():
    model = GPT(tied=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    plan = nemo2.plan(model, "dp=2,pp=2,tp=2", step=next_token, batch=token_ids(4))
    assert not dist.is_initialized()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert next_token(model, token_ids(4)).requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.blocks = ()
    again = nemo2.plan(model, {"dp": 2, "pp": 2, "tp": 2}, step=next_token, batch=token_ids(4))
    assert str(again) == str(plan)
    assert again.params == plan.params


def test_works_on_meta_for_any_world():
    with torch.device("meta"):
        model = GPT()
    plan = nemo2.plan(model, "dp=64,pp=3,tp=4", step=next_token, batch=token_ids(4))
    assert plan.sizes.world == 768
    assert plan.param("layers.0.up.weight").local_shape == (24, WIDTH)


def test_tables():
    plan = nemo2.plan(GPT(tied=True), "dp=2,pp=2,tp=2", step=next_token, batch=token_ids(4))
    text = str(plan)
    for part in (
        "mesh pp=2 dp=2 cp=1 tp=2 (8 ranks)",
        "layers.*.up.weight x3",
        "tp: Shard(0), dp: Shard(0)",
        "(48, 32)",
        "tied to head.weight",
        "0      0     layers.0 .. layers.1 (2)",
        "0 -> 1  layers.1[0]",
        "all-reduce of tied gradient",
        "reduce-scatter of gradients",
        "copied from the first rank",
    ):
        assert part in text, text
    assert nemo2.explain(plan) == text


def test_stages_of_interleaved_ranks():
    how = nemo2.Pipeline(4, "interleaved", 2)
    model = GPT(5, tied=True)
    plan = nemo2.plan(model, "pp=2", step=next_token, batch=token_ids(4), pipeline=how)
    assert [(s.index, s.rank, s.first, s.last) for s in plan.stages] == [
        (0, 0, 0, 0),
        (1, 1, 1, 1),
        (2, 0, 2, 3),
        (3, 1, 4, 4),
    ]
    tied = plan.param("embed.weight")
    assert (tied.homes, tied.stages, tied.ranks) == ((0, 3), (0, 3), (0, 1))
    assert plan.param("layers.3.up.weight").ranks == (0,)
    text = str(plan)
    for part in (
        "schedule=interleaved, virtual_stages=2",
        "stage  rank  chunk  blocks",
        "1      1     0      layers.1 .. layers.1 (1)",
        "2      0     1      layers.2 .. layers.3 (2)",
        "2 -> 3  layers.3[0]",
    ):
        assert part in text, text


@pytest.mark.parametrize("count", [1, 3, 7])
def test_microbatches_that_do_not_fill_rounds_are_refused(count):
    how = nemo2.Pipeline(count, "interleaved", 2)
    with pytest.raises(PipelineError, match=r"no multiple of 2\n  options: microbatches in \[\d"):
        nemo2.plan(GPT(4), "pp=2", pipeline=how)
    assert len(nemo2.plan(GPT(4), "pp=1", pipeline=how).stages) == 1


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"virtual_stages": 2}, "1F1B runs one stage on each rank\n  options: schedule='inter"),
        ({"schedule": "interleaved"}, "nothing to interleave\n  options: virtual_stages=2"),
        ({"virtual_stages": 0}, r"virtual_stages=0\): give an integer >= 1"),
        ({"virtual_stages": 1.5}, r"virtual_stages=1.5\): give an integer >= 1"),
    ],
)
def test_a_schedule_and_virtual_stages_that_contradict_each_other_are_refused(options, part):
    with pytest.raises(PipelineError, match=part):
        nemo2.Pipeline(**options)


def test_lent_parameters_are_named():
    plan = nemo2.plan(Skip(glue=True), "pp=2", step=next_token, batch=token_ids(4))
    assert plan.step.borrowed == {"scale": (1,), "head.weight": (1,), "head.bias": (1,)}
    assert "'head.weight' is used on stage 1 and lent there each step" in str(plan)


def test_all_problems_at_once():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(6, 10), nn.Linear(6, 8)
            shard(self.a.weight, "tp", dim=0)
            shard(self.b.weight, "tp", dim=0)
            shard(self.c.weight, "tp", dim=0)
            shard(self.c.weight, "tp", dim=1)

    with pytest.raises(ShardingError) as caught:
        nemo2.plan(Odd(), "tp=4")
    text = str(caught.value)
    assert "'a.weight'" in text
    assert "9 % 4 = 1" in text
    assert "pad dim 0 to 12" in text
    assert "'b.weight'" in text
    assert "annotations of 'c.weight' disagree" in text


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"precision": "fp8"}, "precision='fp8' is unknown; precisions: 'bf16'"),
        ({"remat": "some"}, "remat='some' is unknown; kinds: 'full', 'selective'"),
        ({"compile": "fast"}, "compile='fast' is unknown; True ('inductor'), 'aot_eager'"),
        (
            {"data_parallel": nemo2.DataParallel("fsdp", replicate=3)},
            "replicate=3) does not divide dp * cp = 2 * 1; replicate in [1, 2]",
        ),
        ({"data_parallel": nemo2.DataParallel("zero1", replicate=0)}, "replicate=0"),
        ({"data_parallel": nemo2.DataParallel("ddp", replicate=2)}, "use replicate=1, or 'fsdp'"),
        ({"data_parallel": nemo2.DataParallel("fsdp", reshard="yes")}, "True, False, 'auto'"),
        ({"data_parallel": nemo2.DataParallel("ddp", reshard=True)}, "'ddp' gathers nothing"),
        ({"data_parallel": nemo2.DataParallel("zero1", reshard=True)}, "use 'fsdp' to free them"),
        ({"data_parallel": "zero"}, "'zero' is unknown; kinds: ddp, zero1, fsdp"),
        ({"pipeline": nemo2.Pipeline(schedule="zigzag")}, "'zigzag' is unknown; schedules: 1f1b"),
        ({"context_parallel": "rings"}, "'rings' is unknown"),
        ({"tensor": 2}, "unknown option 'tensor'"),
        ({"pipeline": 4}, "pipeline=4; it is Pipeline(microbatches=4)"),
        ({"pipeline": {"microbatches": 4}}, "it is Pipeline(microbatches=4)"),
        ({"data_parallel": None}, "data_parallel=None; it is 'fsdp', 'zero1', 'ddp' or"),
        ({"context_parallel": 2}, "context_parallel=2; it is 'ring', 'all_gather', 'ulysses'"),
    ],
)
def test_options_that_do_not_work_say_so(options, part):
    with pytest.raises(Nemo2Error) as caught:
        nemo2.plan(GPT(), "dp=2,tp=2", **options)
    assert part in str(caught.value)


def test_all_that_is_wrong_is_listed_together():
    with pytest.raises(Nemo2Error, match=r"(?s)remat.*compile"):
        nemo2.plan(GPT(), "cp=2", remat="some", compile="fast")


def test_parts_that_do_not_divide():
    model = nn.Linear(4, 9)
    shard(model.weight, "tp", dim=0, parts=(4, 4, 1))
    with pytest.raises(ShardingError, match=r"parts=\(4, 4, 1\) on tp=2: 1 % 2 = 1"):
        nemo2.plan(model, "tp=2")


def test_stages():
    given = split_blocks([1] * 5, 2, nemo2.Pipeline(layers_per_stage=(1, 4)))
    assert [(s.first, s.last, s.rank) for s in given] == [(0, 0, 0), (1, 4, 1)]
    with pytest.raises(PipelineError, match=r"cannot split 3 blocks over pp=4.*pp in \[1, 2, 3\]"):
        _flat(lambda: nemo2.plan(GPT(), "pp=4"))
    for given in ((2, 2), (1, 1, 1), (3, 0), ()):
        with pytest.raises(PipelineError, match=r"does not fit 3 blocks.*\n.*2 numbers >= 1 whose"):
            nemo2.plan(GPT(), "pp=2", pipeline=nemo2.Pipeline(layers_per_stage=given))
    with pytest.raises(PipelineError, match="no list of blocks is annotated"):
        nemo2.plan(nn.Linear(2, 2), "pp=2")


def _flat(call):
    """Run ``call`` and put its error on one line, for ``match``."""
    try:
        call()
    except PipelineError as error:
        raise PipelineError(str(error).replace("\n", " ")) from None


def test_microbatches():
    ids, mask = torch.arange(12).view(6, 2), torch.ones(6, 2)
    parts = split_batch({"ids": ids, "mask": mask, "table": torch.zeros(5), "n": 3}, 3)
    assert [p["ids"].shape[0] for p in parts] == [2, 2, 2]
    assert all(p["table"].shape == (5,) and p["n"] == 3 for p in parts)
    assert torch.equal(torch.cat([p["ids"] for p in parts]), ids)
    assert plan_batch({"ids": ids, "mask": mask, "t": torch.zeros(5)}, 2).whole == ("['t']",)
    with pytest.raises(
        PipelineError, match=r"6 % 4 = 2\n  options: microbatches in \[1, 2, 3, 6\]"
    ):
        split_batch(ids, 4)
    with pytest.raises(PipelineError, match=r"microbatches in \[2, 6\] \| a batch of 8"):
        split_batch(ids, 4, rounds=2)  # interleaved on pp=2
    with pytest.raises(PipelineError, match="options: a batch of 4"):
        split_batch(ids[:3], 4, rounds=2)
    with pytest.raises(PipelineError, match="cannot tell the batch dim"):
        split_batch((ids, torch.zeros(5)), 2)
    with pytest.raises(PipelineError, match="holds no tensor"):
        split_batch({"n": 3}, 2)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        shard(self.layers, "pp")


class ReadsAValue(Base):
    def forward(self, ids):
        x = self.embed(ids)
        if x.max() > 100:
            x = x * 0
        for layer in self.layers:
            x = layer(x)
        return x


class WritesInPlace(Base):
    def forward(self, ids):
        x = torch.zeros(*ids.shape, 8)
        x[:, :1] = self.embed(ids)[:, :1]
        for layer in self.layers:
            x = layer(x)
        return x


class Twice(Base):
    def forward(self, ids):
        x = self.embed(ids)
        for layer in [*self.layers, *self.layers]:
            x = layer(x)
        return x


class SkipsOne(Base):
    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers[:3]:
            x = layer(x)
        return x


class Backwards(Base):
    def forward(self, ids):
        x = self.embed(ids)
        for layer in reversed(self.layers):
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (ReadsAValue, "'__bool__' reads the value"),
        (WritesInPlace, "'__setitem__' writes a value"),
        (Twice, "'layers.0' is called twice"),
        (SkipsOne, "never called: layers.3"),
        (Backwards, "out of order"),
    ],
)
def test_glue_that_cannot_be_split_is_refused(model, part):
    def step(m, ids):
        return m(ids).mean()

    with pytest.raises(PipelineError) as caught:
        nemo2.plan(model(), "pp=2", step=step, batch=token_ids(2))
    text = str(caught.value)
    assert part in text
    assert "options: " in text
    if model in (ReadsAValue, WritesInPlace):
        assert "test_plan.py" in text


def test_a_value_read_after_the_last_block_is_no_error():
    def step(m, ids):
        loss = next_token(m, ids)
        assert isinstance(loss.item(), float)
        return loss

    nemo2.plan(GPT(), "pp=2,tp=2", step=step, batch=token_ids(2))


def on_meta(device):
    with torch.device("meta"):
        model = Skip(glue=True)
    try:
        nemo2.parallelize(model, nemo2.make_mesh(tp=2, device=device))
    except Nemo2Error as error:
        return str(error)


def different_models(device):
    try:
        nemo2.parallelize(GPT(layers=2 + dist.get_rank()), nemo2.make_mesh(dp=2, device=device))
    except Nemo2Error as error:
        return str(error)


def left_alone(device):
    model = GPT(tied=True)
    names = list(model.state_dict())
    before = {n: p.clone() for n, p in model.named_parameters()}
    parallel = nemo2.parallelize(model, nemo2.make_mesh(tp=2, device=device))
    same = list(model.state_dict()) == names and all(
        torch.equal(before[n], p) for n, p in model.named_parameters()
    )
    inside = nemo2.parallelize(model, nemo2.make_mesh(tp=2, device=device), inplace=True)
    return (
        same,
        inside.module is model,
        set(parallel.params) == set(before),
        set(inside.params) == set(before),
    )


def test_parallelize(pool):
    for text in pool.run(2, on_meta, pool.device):
        assert "Skip has no reset_parameters for parameter 'scale'" in text
    for text in pool.run(2, different_models, pool.device):
        assert "ranks [1] differ from rank 0" in text
    assert pool.run(2, left_alone, pool.device) == [(True,) * 4] * 2


def drawn(device):
    torch.manual_seed(dist.get_rank())
    model = GPT()
    parallel = nemo2.parallelize(model, nemo2.make_mesh(dp=2, device=device))
    own = parallel.full_state_dict()["head.weight"].cpu()
    return own, model.head.weight.detach()


def test_weights_come_from_the_first_rank(pool):
    (a, first), (b, second) = pool.run(2, drawn, pool.device)
    assert torch.equal(a, b)
    assert torch.equal(a, first)
    assert not torch.equal(first, second)


def test_import_is_quiet_and_leaves_heavy_packages_for_later():
    code = (
        "import sys, time, torch\n"
        "start = time.process_time()\n"
        "import nemo2\n"
        "heavy = ('megatron', 'lightning', 'torch.distributed.tensor', 'torch.distributed.fsdp')\n"
        "assert not [n for n in sys.modules if n.startswith(heavy)]\n"
        "assert time.process_time() - start < 0.5\n"
        "assert nemo2.ParallelModel.__name__ == 'ParallelModel'\n"
    )
    subprocess.run([sys.executable, "-c", "import nemo2"], check=True)  # compiles, as pip does
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

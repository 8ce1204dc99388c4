"""What a step communicates: the plan's count, the run's count and the hand count are one."""

from __future__ import annotations

import contextlib
from collections import Counter
from math import prod
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import nemo2
from examples.gpt import GPT, GPTConfig
from nemo2.communication import collectives
from nemo2.sharding import collectives as ours
from tests.models import next_token, token_ids

CFG = GPTConfig(vocab=64, width=32, heads=4, layers=3, length=16)
BATCH, LENGTH = 4, 8  # next_token shifts 9 ids
ACTIVATION = BATCH * LENGTH * CFG.width
TOKENS = BATCH * LENGTH


class Watch:
    """Counts the collectives of torch.distributed by (name, elements)."""

    NAMES = (
        "all_reduce",
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
        "broadcast",
    )

    def __enter__(self):
        self.seen, self.originals = Counter(), {}
        for name in self.NAMES:
            original = getattr(dist, name, None)
            if original is not None:
                self.originals[name] = original
                setattr(dist, name, self._counting(name, original))
        return self.seen

    def _counting(self, name, original):
        def call(*args, **kwargs):
            tensor = args[0] if args else kwargs["output"]
            self.seen[name, tensor.numel()] += 1
            return original(*args, **kwargs)

        return call

    def __exit__(self, *exc):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def run_tp(device):
    torch.manual_seed(0)
    mesh = nemo2.make_mesh(tp=2, device=device)
    model = nemo2.parallelize(GPT(CFG), mesh, sequence_parallel=False)
    ids = token_ids(BATCH)
    run = nemo2.value_and_grad(next_token, model)
    _, grads = run(model.params, ids)
    with Watch() as step:
        run(model.params, ids)
    with Watch() as norm:
        nemo2.global_norm(grads, model)
    plan = model.runner.step_plan
    return (
        dict(step),
        dict(norm),
        dict(Counter(c.direction for c in collectives(plan.trace) if not c.small)),
    )


def test_example_on_tp_equals_the_hand_count(pool):
    """Per block two all-reduces forward (attention and MLP output) and two backward (their
    inputs); one forward for the embedding, one backward for the head's input. Nothing else has
    the size of an activation: logits are never gathered.

    Small: the loss all-reduces one maximum, and one stack of three numbers at most, a token;
    the step one vector of five numbers (loss, count, kind, pairs, ranks); the norm one number.
    """
    steps = pool.run(2, run_tp, pool.device)
    for step, norm, planned in steps:
        forward, backward = 2 * CFG.layers + 1, 2 * CFG.layers + 1
        assert step.pop(("all_reduce", ACTIVATION)) == forward + backward
        assert planned == {"forward": forward, "backward": backward}
        assert step.pop(("all_reduce", 5)) == 1
        small = {
            n: c
            for (name, n), c in step.items()
            if name == "all_reduce" and TOKENS <= n <= 3 * TOKENS
        }
        assert sum(small.values()) == 2
        assert len(step) == len(small), f"also communicated: {step}"
        assert norm == {("all_reduce", 1): 1}


def run_ddp_tp(device):
    torch.manual_seed(0)
    mesh = nemo2.make_mesh(dp=2, tp=2, device=device)
    options = {"data_parallel": "ddp", "pipeline": nemo2.Pipeline(microbatches=4)}
    options["sequence_parallel"] = False
    model = nemo2.parallelize(GPT(CFG), mesh, **options)
    run = nemo2.value_and_grad(next_token, model)
    run(model.params, token_ids(BATCH))
    with Watch() as step:
        run(model.params, token_ids(BATCH))
    return dict(step), sum(p.to_local().numel() for p in model.params.values())


def test_gradients_are_reduced_once_a_step(pool):
    for step, parameters in pool.run(4, run_ddp_tp, pool.device):
        assert step["all_reduce", parameters] == 1
        assert step["all_reduce", ACTIVATION // 4] == 4 * (4 * CFG.layers + 2)
        large = {k: v for k, v in step.items() if k[1] > ACTIVATION // 4}
        assert large == {("all_reduce", parameters): 1}


def test_plan_lists_them():
    how = {"step": next_token, "batch": token_ids(BATCH), "sequence_parallel": False}
    plan = nemo2.plan(GPT(CFG), "tp=2,pp=2", **how)
    text = str(plan)
    assert "layers.*.attention.out" in text
    assert "column-split" in text
    assert "all-reduce" in text
    assert "0 -> 1" in text
    assert "all-gather" not in text


def test_a_gather_is_shown():
    """A column-split layer whose output is used whole costs a gather, and the plan says so."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(8, 16)
            nemo2.shard(self.up.weight, "tp", dim=0)
            nemo2.shard(self.up.bias, "tp", dim=0)

        def forward(self, x):
            return self.up(x).cumsum(-1).mean()

    plan = nemo2.plan(Net(), "tp=2", step=lambda m, x: m(x), batch=torch.randn(2, 8))
    assert "all-gather" in str(plan)


# --- what runs is what is planned, no more


class Counted:
    """Counts collectives of more than a few numbers by (axis, kind, elements of the whole)."""

    def __init__(self, groups):
        # Gradients are summed over dp and cp together, here the same group as cp.
        self.axes = {groups.tp: "tp", groups.cp: "cp", groups.dp_cp: "dp and cp"}
        self.seen = Counter()

    def __enter__(self):
        self.undo = contextlib.ExitStack()
        for owner, name, kind, whole in (
            (dist, "all_reduce", "all-reduce", lambda x, *_: x.numel()),
            (ours, "gather_single", "all-gather", lambda out, *_: out.numel()),
            (ours, "scatter_single", "reduce-scatter", lambda out, x, *_: x.numel()),
            (dist, "all_to_all_single", "all-to-all", lambda out, *_: 2 * out.numel()),
        ):
            call = self.counting(getattr(owner, name), kind, whole)
            self.undo.enter_context(mock.patch.object(owner, name, call))
        self.undo.enter_context(mock.patch.object(dist, "P2POp", self.sending(dist.P2POp)))
        return self.seen

    def counting(self, original, kind, whole):
        def call(*args, group=None, **kwargs):
            axis = self.axes.get(group)
            if axis is not None and args[0].numel() > 3 * TOKENS:
                self.seen[axis, kind, whole(*args)] += 1
            return original(*args, group=group, **kwargs)

        return call

    def sending(self, original):
        def make(op, tensor, peer, group):
            if op is dist.isend:
                self.seen[self.axes[group], "exchange", tensor.numel()] += 1
            return original(op, tensor, peer, group)

        return make

    def __exit__(self, *exc):
        self.undo.close()


def counts(sizes, options, device):
    torch.manual_seed(0)
    mesh = nemo2.make_mesh(**sizes, device=device)
    model = nemo2.parallelize(GPT(CFG), mesh, data_parallel="ddp", **options)
    run = nemo2.value_and_grad(next_token, model)
    run(model.params, token_ids(BATCH))
    with Counted(model.groups) as seen:
        run(model.params, token_ids(BATCH))
    step = model.runner.step_plan
    planned = Counter()
    for c in collectives(step.trace, model.plan.blocks, model.plan.options.remat):
        if not c.small:
            planned[c.axis, c.kind, prod(c.shape)] += 1
    sums = sum(prod(model.plan.param(n).local_shape) for n in step.partial)
    if sums > 3 * TOKENS:
        planned["tp", "all-reduce", sums] += 1
    found = Counter({("cp" if a == "dp and cp" else a, k, n): c for (a, k, n), c in seen.items()})
    gradients = {key for key in found if key[:2] == ("cp", "all-reduce")}
    return {k: c for k, c in found.items() if k not in gradients}, dict(planned)


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
@pytest.mark.parametrize("sizes", [{"cp": 2}, {"cp": 2, "tp": 2}], ids=str)
def test_context_parallelism_runs_what_is_planned(pool, sizes, method):
    world = 2 * sizes.get("tp", 1)
    for seen, planned in pool.run(world, counts, sizes, {"context_parallel": method}, pool.device):
        assert seen == planned
        assert any(axis == "cp" for axis, _, _ in seen)


@pytest.mark.parametrize("on", [True, False])
def test_tensor_parallelism_runs_what_is_planned(pool, on):
    for seen, planned in pool.run(2, counts, {"tp": 2}, {"sequence_parallel": on}, pool.device):
        assert seen == planned


def test_sequence_parallelism_equals_the_hand_count():
    """Per block two all-gathers (the inputs of q, k, v together, and of the MLP) and two
    reduce-scatters (their outputs) forward, and their mirror backward; a reduce-scatter for the
    embedding, an all-gather for the head, and their mirrors. Beside these only the gradient of
    the learned positions, of one sequence without the batch.
    """
    how = {"step": next_token, "batch": token_ids(BATCH)}
    plan = nemo2.plan(GPT(CFG), "tp=2", **how)
    found = Counter((c.direction, c.kind, prod(c.shape)) for c in moved(plan))
    n = 2 * CFG.layers + 1
    positions = found.pop(("backward", "all-gather", LENGTH * CFG.width))
    assert positions == 1
    assert found == {
        ("forward", "all-gather", ACTIVATION): n,
        ("forward", "reduce-scatter", ACTIVATION): n,
        ("backward", "all-gather", ACTIVATION): n,
        ("backward", "reduce-scatter", ACTIVATION): n,
    }


def moved(plan):
    return [c for c in collectives(plan.step.trace) if not c.small]


@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        # keys and values of one part, n - 1 = 1 time; back: again, and their gradients n = 2 times
        ("ring", {("exchange", ACTIVATION): 1}, {("exchange", ACTIVATION): 3}),
        # keys and values of the whole sequence, together
        (
            "all_gather",
            {("all-gather", 2 * ACTIVATION): 1},
            {("reduce-scatter", 2 * ACTIVATION): 1},
        ),
        # q, k, v and the output, each once each way
        ("ulysses", {("all-to-all", ACTIVATION): 4}, {("all-to-all", ACTIVATION): 4}),
    ],
)
def test_context_parallelism_equals_the_hand_count(method, forward, backward):
    how = {"step": next_token, "batch": token_ids(BATCH), "context_parallel": method}
    plan = nemo2.plan(GPT(CFG), "cp=2", **how)
    for direction, one in (("forward", forward), ("backward", backward)):
        found = Counter((c.kind, prod(c.shape)) for c in moved(plan) if c.direction == direction)
        assert found == {key: count * CFG.layers for key, count in one.items()}

"""value_and_grad, grad, global_norm: pure in the parameters; and the torch way beside it."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import types

import optree
import pytest
import torch
from torch.distributed.tensor import DTensor

import nemo2
from tests.models import GPT, VOCAB, Skip, counted, next_token, token_ids

MESHES = ({"dp": 2, "pp": 2}, {"dp": 2, "tp": 2}, {"pp": 2, "tp": 2})


def build(mesh, kind, device, *, microbatches=2, model=None, **how):
    torch.manual_seed(0)
    model = (GPT(tied=True) if model is None else model).double()
    parallel = nemo2.parallelize(
        model,
        nemo2.make_mesh(**mesh, device=device),
        data_parallel=kind,
        pipeline=nemo2.Pipeline(microbatches=microbatches),
        **how,
    )
    return model, parallel


def own_part(parallel, ids):
    return ids.chunk(parallel.plan.sizes.dp)[parallel.groups.dp_rank]


def purity(mesh, kind, device):
    model, parallel = build(mesh, kind, device)
    run = nemo2.value_and_grad(next_token, parallel)
    ids = own_part(parallel, token_ids(8))
    before = {n: p.to_local().clone() for n, p in parallel.params.items()}
    loss, _ = run(parallel.params, ids)
    zeros = optree.tree_map(lambda p: (p * 0).detach(), parallel.params)
    at_zero, grads = run(zeros, ids)
    same = all(torch.equal(before[n], p.to_local()) for n, p in parallel.params.items())
    again, _ = run(parallel.params, ids)
    nobody = copy.deepcopy(model)
    for p in nobody.parameters():
        p.data.zero_()
    expected = next_token(nobody, token_ids(8))
    structure = all(
        isinstance(g, DTensor)
        and g.placements == parallel.params[n].placements
        and g.shape == parallel.params[n].shape
        for n, g in grads.items()
    )
    return {
        "zero": abs(at_zero.item() - expected.item()) < 1e-12,
        "unchanged": same and loss.item() == again.item() and loss.item() != at_zero.item(),
        "structure": structure and grads.keys() == parallel.params.keys(),
        "no grad left": all(p.grad is None for p in parallel.parameters()),
        "callers untouched": all(p.grad is None for p in model.parameters()),
    }


@pytest.mark.parametrize("kind", ["ddp", "zero1", "fsdp"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_pure_in_the_parameters(pool, mesh, kind):
    for result in pool.run(4, purity, mesh, kind, pool.device):
        assert all(result.values()), result


def sgd(mesh, kind, device):
    """Ten steps of ``tree_map(p - lr * g)`` against torch.optim.SGD on one device."""
    model, parallel = build(mesh, kind, device)
    alone = copy.deepcopy(model)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    run, params, errors = nemo2.value_and_grad(counted, parallel), parallel.params, []
    for step in range(10):
        ids = token_ids(8).roll(step, 1)
        total, count = counted(alone, ids)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        loss, grads = run(params, own_part(parallel, ids), step=step)
        with torch.no_grad():
            params = optree.tree_map(lambda p, g: p - 0.1 * g, params, grads)
        errors.append(abs(loss.item() - (total / count).item()))
    return max(errors)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_tree_map_is_an_optimizer(pool, kind):
    assert max(pool.run(4, sgd, {"dp": 2, "pp": 2}, kind, pool.device)) < 1e-12


def torch_way(mesh, kind, device, layer=None):
    """backward, clip_grad_norm_ and AdamW on model.parameters(), against one device."""
    module = None if layer is None else Recurrent(layer)
    model, parallel = build(mesh, kind, device, model=module)
    alone = copy.deepcopy(model)
    own = torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=1e-6)
    theirs = torch.optim.AdamW(alone.parameters(), lr=1e-2, eps=1e-6)
    errors = []
    for step in range(5):
        ids = token_ids(8).roll(step, 1)
        theirs.zero_grad()
        expected = next_token(alone, ids)
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        theirs.step()
        own.zero_grad()
        loss = parallel.backward(next_token, own_part(parallel, ids))
        errors.append(abs(loss.item() - expected.item()))
        errors.append(abs(parallel.clip_grad_norm_(0.5).item() - norm.item()))
        own.step()
    whole = parallel.full_state_dict()
    state = alone.state_dict()
    errors += [(whole[n].cpu() - state[n]).abs().max().item() for n in state]
    alone.load_state_dict(whole, strict=True)
    return max(errors), set(whole) == set(state)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_torch_way(pool, mesh, kind):
    for error, names in pool.run(4, torch_way, mesh, kind, pool.device):
        assert error < 1e-9
        assert names


class RecurrentBlock(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.rnn = layer(32, 32, batch_first=True)
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)
        nemo2.shard(self.up.weight, "tp", dim=0)
        nemo2.shard(self.up.bias, "tp", dim=0)
        nemo2.shard(self.down.weight, "tp", dim=1)

    def forward(self, x):
        x = x + self.rnn(x)[0]
        return x + self.down(torch.relu(self.up(x)))


class Recurrent(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(VOCAB, 32), torch.nn.Linear(32, VOCAB)
        self.layers = torch.nn.ModuleList(RecurrentBlock(layer) for _ in range(2))
        nemo2.shard(self.layers, "pp")

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("mesh", "layer"),
    [
        ({"dp": 2, "tp": 2}, torch.nn.GRU),
        ({"pp": 2, "tp": 2}, torch.nn.LSTM),
        ({"dp": 2, "pp": 2}, torch.nn.RNN),
    ],
    ids=str,
)
def test_recurrent_layers_step_after_step(pool, mesh, layer, kind):
    for error, names in pool.run(4, torch_way, mesh, kind, pool.device, layer):
        assert error < 1e-9
        assert names


def accumulation(device):
    _, parallel = build({"dp": 2, "tp": 2}, "fsdp", device)
    ids = own_part(parallel, token_ids(8))
    parallel.backward(next_token, ids)
    once = {n: p.grad.to_local().clone() for n, p in parallel.named_parameters()}
    parallel.backward(next_token, ids)
    twice = all(
        torch.allclose(p.grad.to_local(), 2 * once[n]) for n, p in parallel.named_parameters()
    )
    parallel.zero_grad()
    parallel.backward(next_token, ids)
    return twice, all(
        torch.equal(p.grad.to_local(), once[n]) for n, p in parallel.named_parameters()
    )


def test_gradients_accumulate_like_torch(pool):
    assert pool.run(4, accumulation, pool.device) == [(True, True)] * 4


def with_aux(device):
    _, parallel = build({"dp": 2, "pp": 2}, "fsdp", device)

    def loss_fn(model, ids):
        loss = next_token(model, ids)
        return loss, {"twice": 2 * loss.detach(), "size": len(ids)}

    ids = own_part(parallel, token_ids(8))
    (loss, aux), grads = nemo2.value_and_grad(loss_fn, parallel, has_aux=True)(parallel.params, ids)
    plain = nemo2.grad(next_token, parallel)(parallel.params, ids)
    only, aux2 = nemo2.grad(loss_fn, parallel, has_aux=True)(parallel.params, ids)
    same = all(
        torch.equal(g.to_local(), plain[n].to_local())
        and torch.equal(only[n].to_local(), g.to_local())
        for n, g in grads.items()
    )
    return (
        len(aux),
        [a["size"] for a in aux],
        same,
        loss.item(),
        [a["twice"].item() / 2 for a in aux],
        len(aux2),
    )


def test_has_aux(pool):
    results = pool.run(4, with_aux, pool.device)
    for count, sizes, same, loss, _, again in results:
        assert (count, sizes, same, again) == (2, [2, 2], True, 2)
        assert loss == results[0][3]
    parts = [x for r in (results[0], results[1]) for x in r[4]]
    assert abs(sum(parts) / 4 - results[0][3]) < 1e-12


class Partly(torch.nn.Module):
    """Unused, frozen and zero-dimensional parameters, and one used on some dp ranks only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.unused, self.frozen = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        y = self.frozen(self.first(x)) * self.scale
        return self.second(y) if x[0, 0] > 0 else y


def partly(kind, device):
    torch.manual_seed(0)
    model = Partly().double()
    parallel = nemo2.parallelize(model, nemo2.make_mesh(dp=2, device=device), data_parallel=kind)
    x = torch.ones(4, 8, dtype=torch.float64)
    x[2:] = -1
    parallel.backward(lambda m, x: m(x).square().mean(), own_part(parallel, x))
    alone = copy.deepcopy(model)
    loss = (alone(x[:2]).square().mean() + alone(x[2:]).square().mean()) / 2
    loss.backward()
    errors = {}
    for name, p in alone.named_parameters():
        own = parallel.params[name].grad
        if (own is None) != (p.grad is None):
            errors[name] = "one is None"
        elif own is not None and not torch.allclose(own.full_tensor().cpu(), p.grad, atol=1e-12):
            errors[name] = "differs"
    return errors


def test_unused_frozen_and_zero_dimensional_parameters(pool):
    """Under ddp a parameter that only some ranks use does not hang the reduction."""
    assert pool.run(2, partly, "ddp", pool.device) == [{}, {}]


class Frozen(GPT):
    """The first layers frozen, as in fine-tuning: the first stage has nothing to train."""

    def __init__(self):
        super().__init__(layers=4)
        for part in (self.embed, self.place, self.layers[0], self.layers[1]):
            part.requires_grad_(False)


def frozen_stage(mesh, kind, device):
    model, parallel = build(mesh, kind, device, model=Frozen())
    parallel.backward(next_token, own_part(parallel, token_ids(8)))
    alone = copy.deepcopy(model)
    next_token(alone, token_ids(8)).backward()
    for name, p in parallel.named_parameters():
        theirs = alone.get_parameter(name).grad
        if theirs is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad.full_tensor().cpu(), theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_frozen_first_stage(pool, kind):
    pool.run(4, frozen_stage, {"pp": 2, "tp": 2}, kind, pool.device)
    pool.run(4, frozen_stage, {"pp": 2, "dp": 2}, kind, pool.device)


def refusals(device):
    _, parallel = build({"tp": 2}, "ddp", device, microbatches=1)
    messages = []
    for attempt in (
        lambda: torch.func.grad(parallel)(torch.ones(2, 2)),
        parallel.half,
        lambda: nemo2.value_and_grad(next_token, parallel)({}, token_ids(2)),
        lambda: parallel.backward(lambda m, x: m(x), token_ids(2)),
        lambda: parallel.backward(lambda m, x: 1.0, token_ids(2)),
    ):
        try:
            attempt()
            messages.append("")
        except nemo2.Nemo2Error as error:
            messages.append(str(error))
    return messages


def test_refusals(pool):
    for messages in pool.run(2, refusals, pool.device):
        expected = (
            "torch.func",
            "cannot be moved",
            "missing: ",
            "scalar mean, or (sum, count)",
            "scalar mean, or (sum, count)",
        )
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def mixed_losses(device):
    """Return the loss when dp ranks return unlike things; see the error when microbatches do."""
    _, parallel = build({"dp": 2}, "ddp", device, microbatches=2)
    mean = parallel.groups.dp_rank == 0
    loss, _ = nemo2.value_and_grad(next_token if mean else counted, parallel)(
        parallel.params, token_ids(4)
    )
    calls = iter(range(100))

    def either(model, ids):
        return (next_token if next(calls) % 2 else counted)(model, ids)

    with pytest.raises(nemo2.PipelineError, match=r"for one microbatch and \(sum, count\)"):
        parallel.backward(either, token_ids(4))
    return float(loss)


def other_losses(device):
    """Return norms of gradients of losses of two dtypes; then see a pair after means refused."""
    _, parallel = build({"pp": 2}, "ddp", device, microbatches=2, model=GPT())
    now, norms = types.SimpleNamespace(step=0), []

    def loss_fn(model, ids):
        if now.step == 3:
            return counted(model, ids)
        loss = next_token(model, ids)
        return loss.float() if now.step % 2 else loss

    run = nemo2.value_and_grad(loss_fn, parallel)
    for now.step in range(3):
        norms.append(nemo2.global_norm(run(parallel.params, token_ids(4))[1], parallel).item())
    now.step = 3
    last = parallel.groups.pp_rank == 1
    refused = pytest.raises(nemo2.PipelineError, match=r"returned \(sum, count\), and a mean in an")
    with refused if last else contextlib.nullcontext():
        run(parallel.params, token_ids(4))
    return norms


def test_the_dtype_of_the_loss_may_change(pool):
    for norms in pool.run(2, other_losses, pool.device):
        assert norms == pytest.approx([norms[0]] * 3, rel=1e-6)


def test_means_and_sums_are_not_mixed(pool):
    assert all(math.isnan(loss) for loss in pool.run(2, mixed_losses, pool.device))


def replaced(device):
    """Give a model other parameters in torch's ways; what its calls say, and what it gives."""
    parallel = nemo2.parallelize(torch.nn.Linear(2, 2), nemo2.make_mesh(device=device))
    x, own = torch.ones(1, 2, device=device), parallel.params["weight"]
    before, zeros = parallel(x), {n: torch.zeros_like(p) for n, p in parallel.params.items()}
    said = []
    with pytest.raises(nemo2.Nemo2Error) as caught:
        torch.func.functional_call(parallel, zeros, (x,))
    said.append(str(caught.value))
    assert torch.equal(parallel(x), before)
    parallel.module.weight = torch.nn.Parameter(torch.zeros(2, 2, device=device))
    with pytest.raises(nemo2.Nemo2Error) as caught:
        parallel.backward(lambda m, x: m(x).sum(), x)
    said.append(str(caught.value))
    parallel.module.weight = own
    assert torch.equal(parallel(x), before)
    return said


def test_other_parameters_are_not_ignored(pool):
    called, assigned = pool.run(1, replaced, pool.device)[0]
    assert (
        "parameters such as 'weight' (2 in all) were replaced after the model was split" in called
    )
    assert (
        "parameters such as 'weight' (1 in all) were replaced after the model was split" in assigned
    )
    assert "nemo2.value_and_grad(loss_fn, model)(params, batch)" in called


def forward_only(device):
    model, parallel = build({"pp": 2, "tp": 2}, "ddp", device, model=Skip(glue=True))
    parallel.eval()
    ids = token_ids(4)
    out, everywhere = parallel(ids), parallel(ids, broadcast_output=True)
    expected = model(ids)
    last = parallel.groups.pp_rank == 1
    return (out is not None) == last, torch.allclose(
        everywhere.cpu(), expected.detach(), atol=1e-12
    )


def test_forward_only(pool):
    assert pool.run(4, forward_only, pool.device) == [(True, True)] * 4


def penalised(weight):
    def loss_fn(model, ids):
        loss = next_token(model, ids)
        if weight:
            loss = loss + weight * model.layers[0].up.weight.square().sum()
        return loss

    return loss_fn


def switched(mesh, device):
    """Losses from one factory, a partial made anew, a module's flag: each is its own step."""
    model, parallel = build(mesh, "ddp", device)
    ids, errors = token_ids(8), []
    steps = [penalised(0.0), penalised(0.1), penalised(0.2), penalised(0.0)]
    steps += [functools.partial(weighted, weight=w) for w in (0.0, 0.3)]
    for loss_fn in steps:
        loss, grads = nemo2.value_and_grad(loss_fn, parallel)(
            parallel.params, own_part(parallel, ids)
        )
        alone = copy.deepcopy(model)
        expected = loss_fn(alone, ids)
        expected.backward()
        errors.append(abs(loss.item() - expected.item()))
        for name, grad in grads.items():
            theirs = alone.get_parameter(name).grad
            errors.append((grad.full_tensor().cpu() - theirs).abs().max().item())
    return max(errors)


def weighted(model, ids, weight):
    return penalised(weight)(model, ids)


@pytest.mark.parametrize("mesh", [{"pp": 2}, {"tp": 2}], ids=str)
def test_a_step_that_changes_is_planned_again(pool, mesh):
    assert max(pool.run(2, switched, mesh, pool.device)) < 1e-10


def same_step(device):
    _, parallel = build({"tp": 2}, "ddp", device)
    for i in range(20):
        parallel.backward(lambda m, b, i=i: next_token(m, b) * (i + 1), token_ids(4))
    return len(parallel._step_plans.found)


def test_a_lambda_in_a_loop_is_one_step(pool):
    """Its default is a growing index: small numbers are told apart, the others are alike."""
    assert pool.run(2, same_step, pool.device) == [10, 10]


def frozen_later(mesh, kind, device):
    model, parallel = build(mesh, kind, device)
    frozen = [n for n in parallel.params if n.startswith(("layers.0.", "place"))]
    for name in frozen:
        parallel.params[name].requires_grad_(False)
    parallel.backward(next_token, own_part(parallel, token_ids(8)))
    alone = copy.deepcopy(model)
    next_token(alone, token_ids(8)).backward()
    for name, p in parallel.named_parameters():
        if name in frozen:
            assert p.grad is None, name
        else:
            theirs = alone.get_parameter(name).grad
            torch.testing.assert_close(p.grad.full_tensor().cpu(), theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_freezing_after_parallelize_is_followed(pool, kind):
    pool.run(4, frozen_later, {"pp": 2, "dp": 2}, kind, pool.device)
    pool.run(4, frozen_later, {"tp": 2, "dp": 2}, kind, pool.device)


def unfrozen_later(device):
    _, parallel = build({"tp": 2}, "ddp", device, model=Frozen())
    parallel.params["embed.weight"].requires_grad_(True)
    try:
        parallel.backward(next_token, token_ids(4))
    except nemo2.Nemo2Error as error:
        return str(error)


def test_unfreezing_after_parallelize_is_refused(pool):
    for text in pool.run(2, unfrozen_later, pool.device):
        assert "'embed.weight' were frozen when the model was split" in text


def penalty_outside_blocks(device):
    _, parallel = build({"dp": 2}, "fsdp", device)
    try:
        parallel.backward(penalised(0.1), token_ids(4))
    except nemo2.Nemo2Error as error:
        return str(error)


def test_a_block_parameter_in_the_loss_under_fsdp_is_refused(pool):
    for text in pool.run(2, penalty_outside_blocks, pool.device):
        assert "data_parallel='ddp'" in text

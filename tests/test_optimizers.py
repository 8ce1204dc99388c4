"""Optimizers step on local shards, with the numbers and the state of DTensor's way."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import nemo2
from nemo2 import shard
from nemo2.sharding import optimizers

KINDS = {
    "adamw": lambda p: optim.AdamW(p, lr=0.1, amsgrad=True),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "adam": lambda p: optim.Adam(p, lr=0.1, foreach=False),
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "nadam": lambda p: optim.NAdam(p, lr=0.1),
    "radam": lambda p: optim.RAdam(p, lr=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.5),
    "adamax": lambda p: optim.Adamax(p, lr=0.1),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.1),
    "asgd": lambda p: optim.ASGD(p, lr=0.1),
    "rprop": lambda p: optim.Rprop(p, lr=0.1),
}


class Dispatches(TorchDispatchMode):
    """Counts operations that reach DTensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(issubclass(t, DTensor) for t in types)
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Split over tp, uneven over dp, zero-dimensional, and unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.scale = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 5)
        shard(self.up.weight, "tp", dim=0)
        shard(self.up.bias, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) * self.scale


def square(model, x):
    return model(x).square().mean()


def batch(step):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).double()


def model_on(mesh, device):
    torch.manual_seed(0)
    return nemo2.parallelize(Net().double(), nemo2.make_mesh(**mesh, device=device))


def trained(mesh, kind, device, *, on_shards):
    """Return weights and state after three steps, and DTensor's operations in the last one."""
    model = model_on(mesh, device)
    names = {p: n for n, p in model.named_parameters()}
    with mock.patch.object(optimizers, "ELEMENTWISE", optimizers.ELEMENTWISE if on_shards else ()):
        optimizer = KINDS[kind](list(model.parameters()))
        for step in range(3):
            model.backward(square, batch(step))
            with Dispatches() as seen:
                optimizer.step()
            optimizer.zero_grad()
    state = {
        (names[p], k): (type(v).__name__, v.full_tensor() if isinstance(v, DTensor) else v)
        for p, own in optimizer.state.items()
        for k, v in own.items()
    }
    weights = model.full_state_dict()
    return weights, state, seen.count


def same_both_ways(mesh, device):
    for kind in KINDS:
        ours, states, count = trained(mesh, kind, device, on_shards=True)
        if kind == "rprop":  # DTensor refuses its writes
            assert count == 0
            continue
        theirs, others, many = trained(mesh, kind, device, on_shards=False)
        assert count == 0 < many, kind
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs), kind
        assert states.keys() == others.keys(), kind
        for key, (name, value) in states.items():
            assert name == others[key][0], (kind, key)
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(others[key][1])), (kind, key)


@pytest.mark.parametrize("mesh", [{"dp": 2, "tp": 2}, {"dp": 4}])
def test_the_same_numbers_and_state_as_through_dtensor(pool, mesh):
    pool.run(4, same_both_ways, mesh, pool.device, timeout=200)


def odd_ways(device):
    model = model_on({"dp": 2}, device)
    params = list(model.parameters())
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = model.backward(square, batch(0))
        seen.append(
            all(isinstance(p, DTensor) for g in optimizer.param_groups for p in g["params"])
        )
        return loss

    optimizer = optim.AdamW(params, lr=0.1)
    before = params[2].full_tensor().clone()
    assert optimizer.step(closure) > 0
    assert seen == [True]
    assert not torch.equal(before, params[2].full_tensor())
    assert optimizer.param_groups[0]["params"] == params
    assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in optimizer.state)

    held = copy.deepcopy(optimizer.state_dict())
    again = optim.AdamW(params, lr=0.1)
    again.load_state_dict(held)
    with Dispatches() as counted:
        again.step()
    assert counted.count == 0

    looked = []
    optimizer.register_step_pre_hook(
        lambda o, *_: looked.append(isinstance(o.param_groups[0]["params"][0], DTensor))
    )
    optimizer.step()
    assert looked == [True]  # a user's hook sees DTensors

    class FailingError(RuntimeError):
        pass

    def fail(*args, **kwargs):
        raise FailingError

    with mock.patch("torch.optim.adamw.adam", fail), mock.patch("torch.optim.adam.adam", fail):
        try:
            again.step()
        except FailingError:
            looked.append("raised")
    assert looked[-1] == "raised"
    state = again.state_dict()["state"]
    assert all(isinstance(s["exp_avg"], DTensor) for s in state.values())
    assert again.param_groups[0]["params"] == params


def test_closures_hooks_saving_and_errors(pool):
    pool.run(2, odd_ways, pool.device)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        shard(self.blocks, "pp")
        for block in self.blocks:
            shard(block.weight, "tp", dim=0)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def refusals(mesh, device):
    """Return what LBFGS and Adafactor say in their first step, or their loss."""
    found = {}
    model = nemo2.parallelize(Stack().double(), nemo2.make_mesh(**mesh, device=device))
    for kind in (torch.optim.LBFGS, torch.optim.Adafactor):
        optimizer = kind(model.parameters(), lr=1e-3)

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            return model.backward(square, batch(0))

        try:
            found[kind.__name__] = float(optimizer.step(closure))
        except nemo2.Nemo2Error as error:
            found[kind.__name__] = str(error)
    return found


@pytest.mark.parametrize("mesh", [{"pp": 2}, {"tp": 2}, {"dp": 2}], ids=str)
def test_optimizers_of_more_than_one_parameter_at_a_time(pool, mesh):
    refused = {"LBFGS": "pp=2", "Adafactor": None} if "pp" in mesh else {"Adafactor": "split"}
    for found in pool.run(2, refusals, mesh, pool.device):
        for kind in ("LBFGS", "Adafactor"):
            if refused.get(kind):
                assert refused[kind] in found[kind]
                assert "options:" in found[kind]
            else:
                assert isinstance(found[kind], float), found[kind]

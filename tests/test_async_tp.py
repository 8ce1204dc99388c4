"""``Compile(async_tp=True)``: collectives joined to products, where there are the operators.

On CPUs torch has none; its fallback, a collective and a product, stands for them.
"""

from __future__ import annotations

import re
import shutil
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn

import nemo2
from nemo2 import Compile, Nemo2Error, shard
from nemo2.compile import overlap
from tests.models import GPT, WIDTH, next_token, token_ids

inductor = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
OPERATORS = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")


def give_operators():
    """Let the operators run on CPUs of this process."""
    from torch.distributed import _symmetric_memory as symmetric

    for name in OPERATORS:
        operator = f"symm_mem::{name}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU"):
            fallback = getattr(symmetric, f"_{name}_fallback")
            torch.library.impl(operator, "CPU")(fallback)


def step(model, mesh, compile, batch, device, hide, **options):
    """Return loss and gradients, and how often the code of each graph calls what moves tensors."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    codes = []
    parallel = nemo2.parallelize(
        model, nemo2.make_mesh(**mesh, device=device), compile=compile, **options
    )
    # One product for each collective, in graphs so small.
    change = {"_OPERATIONS_A_BYTE": 1e-6} if hide else {"hide_collectives": every_wait}
    with (
        mock.patch.object(GraphLowering, "save_output_code", codes.append),
        config.patch(fx_graph_cache=False),
        mock.patch.multiple(overlap, **change),
    ):
        loss, grads = nemo2.value_and_grad(next_token, parallel)(parallel.params, batch)
    names = (*OPERATORS, "all_gather_into_tensor", "reduce_scatter_tensor")
    calls = {tuple(len(re.findall(rf"= torch\.ops\.\w+\.{n}\.", x)) for n in names) for x in codes}
    return loss, {n: g.full_tensor() for n, g in grads.items()}, sorted(x for x in calls if any(x))


def every_wait(graph):
    """Stand for ``hide_collectives`` that hides nothing."""
    return [n for n in graph.nodes if n.target == torch.ops._c10d_functional.wait_tensor.default]


def compared(model, mesh, batch, device, hide, **options):
    allowed = nullcontext()
    if device == "cpu":
        give_operators()
        allowed = mock.patch("nemo2.parallelize.check_peer_memory")
    torch.manual_seed(0)
    model, ids = model(), token_ids(batch)
    want, expected, _ = step(model, mesh, False, ids, device, hide, **options)
    with allowed:
        how = Compile(async_tp=True)
        loss, grads, calls = step(model, mesh, how, ids, device, hide, **options)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    return calls


@inductor
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_what_nothing_hides_is_joined_to_its_products(pool, bias, batch):
    """Forward: two gathers and two sums. Backward: the first gather; weights hide the others."""
    args = partial(GPT, 1, bias=bias), {"tp": 2}, batch, pool.device, True
    for calls in pool.run(2, compared, *args, timeout=280):
        assert calls == [(1, 0, 1, 2), (2, 2, 0, 0)]


@inductor
def test_a_sum_of_several_products_stays_a_collective(pool):
    """The gradients of a column-split layer's input: q, k and v's; the first layer's is one."""
    args = partial(GPT, 1), {"tp": 2}, 2, pool.device, False
    for calls in pool.run(2, compared, *args, timeout=280):
        assert calls == [(2, 1, 0, 1), (2, 2, 0, 0)]


@inductor
def test_collectives_of_other_axes_are_left_alone(pool):
    """Keys and values are gathered over cp; only the memory of tp was asked for."""
    args = partial(GPT, 1), {"cp": 2, "tp": 2}, 2, pool.device, True
    for calls in pool.run(4, compared, *args, context_parallel="all_gather", timeout=280):
        assert (2, 2, 1, 0) in calls  # forward


class Scaled(nn.Module):
    """A product of two factors and a bias with numbers of their own, after a gather."""

    def __init__(self):
        super().__init__()
        self.norm, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.bias = nn.Parameter(torch.randn(WIDTH))
        shard(self.up, "tp", dim=1)
        shard(self.bias, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x):
        rows = self.norm(x).reshape(-1, WIDTH)
        made = torch.addmm(self.bias, rows, self.up, beta=0.5, alpha=2.0)
        return x + self.down(made.view(x.shape).relu())


class ScaledGPT(GPT):
    def __init__(self):
        super().__init__(1)
        self.layers[0] = Scaled()


@inductor
def test_a_product_with_other_factors_keeps_them(pool):
    args = ScaledGPT, {"tp": 2}, 2, pool.device, False
    for calls in pool.run(2, compared, *args, timeout=280):
        assert (0, 1, 1, 0) in calls  # forward


def refused(options, device):
    model, mesh = GPT(layers=1), nemo2.make_mesh(tp=2, device=device)
    with pytest.raises(Nemo2Error) as error:
        nemo2.parallelize(model, mesh, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compile": Compile("aot_eager", async_tp=True)}, "needs backend='inductor'"),
        (
            {"compile": Compile(async_tp=True), "sequence_parallel": False},
            "needs sequence_parallel=True (or None), not False",
        ),
        ({"compile": Compile("eager")}, "compile=Compile(backend='eager', async_tp=False) is"),
    ],
)
def test_what_it_needs_is_said_by_the_plan(options, said):
    with pytest.raises(Nemo2Error, match=re.escape(said)):
        nemo2.plan(GPT(layers=1), "tp=2", **options)


def test_memory_out_of_reach_is_said_on_all_ranks(pool):
    said = pool.run(2, refused, {"compile": Compile(async_tp=True)}, "cpu")
    assert said[0] == said[1]
    assert "ranks [0, 1] do not: the mesh is on cpu" in said[0]


def explained(device):
    mesh = nemo2.make_mesh(device=device)
    model = nemo2.parallelize(GPT(layers=1), mesh, compile=Compile(async_tp=True))
    return nemo2.explain(model)


def test_without_tensor_parallelism_it_asks_for_nothing(pool):
    assert "compile=inductor, async_tp" in pool.run(1, explained, "cpu")[0]

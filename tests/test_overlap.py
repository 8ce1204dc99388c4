"""Collectives of a compiled block's backward, hidden behind the gradients of weights."""

from __future__ import annotations

import re
import shutil
from unittest import mock

import pytest
import torch

import nemo2
from nemo2.compile import overlap
from tests.models import GPT, next_token, token_ids

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")

EVENTS = re.compile(
    r"(?P<start>torch\.ops\._c10d_functional\.(?!wait)\w+\.default\()"
    r"|(?P<wait>torch\.ops\._c10d_functional\.wait_tensor\.default\()"
    r"|(?P<product>extern_kernels\.(?:mm|bmm|addmm)\()"
)


def hidden(code):
    """Return of each collective how many products the code runs before it waits for it."""
    found, behind = [], None
    for line in code[code.index("def call(") :].splitlines():
        event = None if line.lstrip().startswith("#") else EVENTS.search(line)
        if event is None:
            continue
        if event["start"]:
            assert behind is None, "two at a time: the test does not tell them apart"
            behind = 0
        elif event["wait"]:
            found.append(behind)
            behind = None
        elif behind is not None:
            behind += 1
    return found


def compiled(mesh, options, device, hide=True):
    """Return what each graph of a block hides, and the gradients of a step."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    codes = []
    torch.manual_seed(0)
    model = nemo2.parallelize(
        GPT(layers=1), nemo2.make_mesh(**mesh, device=device), compile=True, **options
    )
    # One product for each, in graphs so small.
    change = {"_OPERATIONS_A_BYTE": 1e-6} if hide else {"hide_collectives": lambda graph: None}
    with (
        mock.patch.object(GraphLowering, "save_output_code", codes.append),
        config.patch(fx_graph_cache=False),
        mock.patch.multiple(overlap, **change),
    ):
        _, grads = nemo2.value_and_grad(next_token, model)(model.params, token_ids(4))
    graphs = sorted({tuple(found) for code in codes if (found := hidden(code))})
    return graphs, {n: g.to_local() for n, g in grads.items()}


@pytest.mark.parametrize(
    ("options", "backward"),
    [
        # The gradient's gather comes first, with nothing to do meanwhile.
        ({}, (0, 1, 1, 4)),
        ({"sequence_parallel": False}, (1, 5)),
    ],
    ids=["split sequence", "whole sequence"],
)
def test_sums_and_gathers_run_beside_gradients_of_weights(pool, options, backward):
    args = {"tp": 2}, options, pool.device
    forward = (0,) * len(backward)
    plain = pool.run(2, compiled, *args, hide=False, timeout=280)
    for (graphs, grads), (before, want) in zip(
        pool.run(2, compiled, *args, timeout=280), plain, strict=True
    ):
        assert before == [forward]
        assert graphs == sorted([forward, backward])
        for name, grad in grads.items():
            assert torch.equal(grad, want[name]), name


def test_gathers_that_run_again_are_hidden_too(pool):
    options = {"remat": "selective"}
    for graphs, _ in pool.run(2, compiled, {"tp": 2}, options, pool.device, timeout=280):
        _, backward = graphs
        assert len(backward) == 6
        assert sum(n > 0 for n in backward) >= 4, backward

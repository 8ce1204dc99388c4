"""Results of torch calls on shapes, remembered: those that would be made anew."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nemo2.pipeline import shapes
from nemo2.pipeline.absent import Absent

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget():
    shapes._result.cache_clear()


def absent(*shape, dtype=torch.float32):
    return Absent.like(shape, dtype, CPU)


def facts(x):
    return tuple(x.shape), x.stride(), x.dtype, x.device


def misses():
    return shapes._result.cache_info().misses


CALLS = {
    "layer_norm": lambda: F.layer_norm(absent(2, 3, 8), (8,), absent(8), absent(8)),
    "linear of a transposed input": lambda: F.linear(absent(2, 8, 3).mT, absent(5, 8)),
    "keywords": lambda: absent(2, 3, 8).sum(dim=-1, keepdim=True, dtype=torch.float64),
    "a real tensor": lambda: absent(2, 3) + torch.ones(3, dtype=torch.float64),
    "attention": lambda: F.scaled_dot_product_attention(
        absent(2, 4, 6, 8), absent(2, 4, 6, 8), absent(2, 4, 6, 8), is_causal=True
    ),
    "a list of tensors": lambda: torch.cat([absent(2, 3), absent(4, 3)], dim=0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_remembered_is_what_was_made(call):
    made, before = call(), misses()
    again = call()
    assert misses() == before > 0
    assert facts(again) == facts(made)
    assert again is not made
    assert shapes.memory(again.meta) != shapes.memory(made.meta)


def test_several_results():
    for _ in range(2):
        before = misses()
        values, places = absent(4, 8).topk(3, dim=-1)
        assert facts(values) == ((4, 3), (3, 1), torch.float32, CPU)
        assert facts(places) == ((4, 3), (3, 1), torch.int64, CPU)
    assert misses() == before


def test_arguments_that_are_equal_and_not_the_same():
    whole = absent(4, dtype=torch.int64)
    assert [(whole * one).dtype for one in (2, 2.0, True)] == [
        torch.int64,
        torch.float32,
        torch.int64,
    ]
    torch.set_default_dtype(torch.float64)
    try:
        assert (whole * 2.0).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_views_share_memory_also_the_second_time():
    for _ in range(2):
        x = absent(2, 3, 4)
        for view in (x.view(6, 4), x.mT, x[:, 1:], x.unsqueeze(0), *x.chunk(3, dim=1)):
            assert shapes.memory(view.meta) == shapes.memory(x.meta)
        copied = x.mT.reshape(8, 3)
        assert shapes.memory(copied.meta) != shapes.memory(x.meta)


def test_writes_in_place_are_made():
    for _ in range(2):
        x = absent(2, 3)
        assert x.add_(absent(2, 3)) is x
        x.t_()
        assert tuple(x.meta.shape) == (3, 2)


def test_errors_come_each_time():
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"reduction dim|shapes"):
            F.linear(absent(2, 3), absent(4, 5))


def test_functions_of_user_code_are_called_each_time():
    calls = []

    def noisy(x):
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(noisy, (x,), x)
        calls.append(tuple(x.shape))
        return x.clone()

    for _ in range(2):
        noisy(absent(2, 3))
    assert calls == [(2, 3), (2, 3)]

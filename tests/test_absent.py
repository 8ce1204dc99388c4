"""Absent tensors: a shape and a device, no value; the pitfalls that stages by absence has."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nemo2.pipeline.absent
from nemo2.errors import PipelineError
from nemo2.pipeline.absent import Absent, _is_user_file, is_absent

CPU = torch.device("cpu")


def absent(*shape: int, dtype: torch.dtype = torch.float32) -> Absent:
    return Absent.like(shape, dtype, CPU)


def test_shapes_flow() -> None:
    x = absent(2, 3, 8)
    y = F.gelu(x @ torch.randn(8, 4)).transpose(1, 2)[:, None].mean(-1)
    assert is_absent(y)
    assert y.shape == (2, 1, 4)
    assert y.dtype == torch.float32
    assert all(is_absent(z) for z in (1 - x, x + 1, x > 0, *x.chunk(2, -1), torch.cat([x, x])))
    assert x.size(-1) == 8
    assert len(x) == 2
    assert x.numel() == 48
    assert x.stride() == (24, 8, 1)


def test_home_is_a_real_device() -> None:
    x = absent(2, 3)
    assert x.device == CPU
    assert not x.is_meta
    assert not x.is_cuda
    assert torch.arange(3, device=x.device).device == CPU
    assert x.to(torch.float64).dtype == torch.float64
    assert x.to("cpu", torch.int64, non_blocking=True).dtype == torch.int64
    assert is_absent(x.to(device="cpu"))
    assert is_absent(x.to(torch.zeros(1, dtype=torch.float16)))
    assert x.to(torch.zeros(1, dtype=torch.float16)).dtype == torch.float16
    assert x.cpu() is x
    assert x.float().dtype == torch.float32
    assert x.type(torch.int32).dtype == torch.int32
    assert isinstance(x, Tensor)


def test_requires_grad_is_what_it_will_be() -> None:
    x = absent(2)
    assert x.requires_grad
    x.needs_grad = False
    assert not x.requires_grad


@pytest.mark.parametrize(
    "make",
    [
        torch.zeros_like,
        torch.ones_like,
        torch.rand_like,
        torch.empty_like,
        lambda x: torch.full_like(x, 2.0),
        lambda x: x.new_zeros(2, 3),
        lambda x: x.new_full((2, 3), 1.0),
        lambda x: x.new_tensor([[1.0] * 3] * 2),
    ],
)
def test_constructors_give_real_tensors(make: Callable[[Tensor], Tensor]) -> None:
    out = make(absent(2, 3, dtype=torch.float64))
    assert type(out) is Tensor
    assert out.shape == (2, 3)
    assert out.dtype == torch.float64
    assert out.device == CPU
    out.sum().item()  # it has values


@pytest.mark.parametrize(
    "drop",
    [
        lambda x: F.dropout(x, 0.5),
        nn.Dropout(0.5),
        lambda x: F.alpha_dropout(x, 0.5, training=True),
        lambda x: F.dropout1d(x, 0.5),
        lambda x: F.dropout(x, 0.5, inplace=True),
        lambda x: x.bernoulli(0.5),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    ],
)
def test_random_numbers_are_not_drawn(drop: Callable[[Tensor], Tensor]) -> None:
    before = torch.get_rng_state()
    assert is_absent(drop(absent(2, 3, 4)))
    assert torch.equal(torch.get_rng_state(), before)


READS: list[Callable[[Tensor], Any]] = [
    lambda x: x.sum().item(),
    lambda x: float(x.sum()),
    lambda x: int(x.sum()),
    lambda x: bool(x.sum() > 0),
    lambda x: 1 if x.max() > 3 else 2,
    lambda x: x.tolist(),
    lambda x: x.numpy(),
    lambda x: x.nonzero(),
    lambda x: torch.equal(x, x),
    lambda x: torch.allclose(x, torch.ones(2, 3)),
    lambda x: x.unique(),
    lambda x: x[x > 0],
    lambda x: x.masked_select(x > 0),
]


@pytest.mark.parametrize("number", range(len(READS)))
def test_reading_a_value_names_the_line(number: int) -> None:
    with pytest.raises(
        PipelineError, match=r"(reads the|needs a) value(?s:.*)test_absent\.py:\d+: "
    ):
        READS[number](absent(2, 3))


def test_message_of_a_read() -> None:
    x = absent(2, 3)
    with pytest.raises(PipelineError, match=r"'item' reads the value(?s:.*)options: compute it"):
        x.sum().item()  # this line
    with pytest.raises(PipelineError, match=r"x\.sum\(\)\.item\(\)  # that line"):
        x.sum().item()  # that line


WRITES: list[Callable[[Tensor, Tensor], Any]] = [
    lambda real, x: real.add_(x),
    lambda real, x: real.copy_(x),
    lambda real, x: real.__setitem__(0, x[0]),
    lambda real, x: real.masked_fill_(x > 0, 0.0),
    lambda real, x: real.__imul__(x),
    lambda real, x: real.index_add_(0, torch.tensor([0]), x[:1]),
]


@pytest.mark.parametrize("number", range(len(WRITES)))
def test_writing_into_a_real_tensor(number: int) -> None:
    real = torch.ones(2, 3)
    with pytest.raises(PipelineError, match=r"(?s)writes a value.*test_absent\.py:\d+.*torch\.cat"):
        WRITES[number](real, absent(2, 3))
    assert torch.equal(real, torch.ones(2, 3))


def test_writing_into_an_absent_tensor() -> None:
    x = absent(2, 3)
    assert x.add_(1) is x
    assert x.mul_(absent(3)) is x
    x[0] = 1.0
    x += torch.ones(3)
    assert is_absent(x)


def test_files_of_the_user() -> None:
    assert _is_user_file("/home/me/nemo2/torch/train.py")
    assert not _is_user_file(torch.nn.functional.__file__)
    assert not _is_user_file(nemo2.pipeline.absent.__file__)


def test_errors_of_shapes_are_the_users() -> None:
    with pytest.raises(RuntimeError, match="reduction dim"):
        absent(2, 3) @ absent(2, 3)


def test_bind() -> None:
    x = absent(2, 3)
    held = [x]
    value = torch.ones(2, 3, requires_grad=True)
    x.bind(value)
    y = held[0] * 2
    assert type(y) is Tensor
    y.sum().backward()
    assert torch.equal(value.grad, torch.full((2, 3), 2.0))  # type: ignore[arg-type]
    assert float(x.detach().sum()) == 6.0
    assert x.tolist() == [[1.0] * 3] * 2
    assert is_absent(x + absent(3))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_passes_absent_tensors(reentrant: bool) -> None:
    linear = nn.Linear(3, 4)
    assert is_absent(checkpoint(linear, absent(2, 3), use_reentrant=reentrant))


def test_checkpoint_sees_what_was_bound() -> None:
    """Recomputation must find the tensor of its own microbatch."""
    x, other = absent(2, 3), absent(2, 3)
    one = torch.ones(2, 3, requires_grad=True)
    x.bind(one)
    y = checkpoint(lambda a: (a * a).sin(), x, use_reentrant=False)
    other.bind(torch.zeros(2, 3))
    y.sum().backward()
    assert torch.allclose(one.grad, 2 * torch.ones(2, 3).cos())  # type: ignore[arg-type]


def test_copies_and_pickles() -> None:
    x = absent(2)
    assert copy.deepcopy({"x": x})["x"] is x
    with pytest.raises(PipelineError, match="cannot pickle Absent"):
        pickle.dumps(x)
    assert repr(x) == "Absent(shape=(2,), dtype=torch.float32)"


def test_containers_of_models() -> None:
    x = absent(2, 3)
    out = nn.MultiheadAttention(3, 1, batch_first=True)(x[None], x[None], x[None])
    assert is_absent(out[0])
    assert is_absent(torch.utils._pytree.tree_map(lambda t: t + 1, {"a": x})["a"])


def test_kernels_are_never_reached() -> None:
    with (
        pytest.raises(PipelineError, match="needs the value"),
        torch._C.DisableTorchFunctionSubclass(),
    ):
        absent(2) + 1


@pytest.mark.parametrize("weights", [None, torch.float32, torch.float64, torch.int64])
def test_counts_have_a_size_if_it_is_said(weights: torch.dtype | None) -> None:
    ids = torch.tensor([0, 2, 2])
    given = {} if weights is None else {"weights": torch.ones(3, dtype=weights)}
    real = torch.bincount(ids, minlength=5, **given)
    made = torch.bincount(absent(3).long(), minlength=5, **given)
    assert (made.shape, made.dtype) == (real.shape, real.dtype)
    with pytest.raises(PipelineError, match="'bincount' needs a value"):
        torch.bincount(absent(3).long())

"""Boundaries: what is refused, and the round trip through the two buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo2.errors import PipelineError
from nemo2.pipeline.boundary import Boundary, Parcel, TensorSpec, pack, unpack

pytestmark = pytest.mark.timeout(60)
FLOAT = TensorSpec((4, 6), torch.float64, True)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        ((torch.ones(4, 6).double(),), "planned 2 tensors, got 1"),
        ((torch.ones(4, 5).double(), torch.ones(2)), r"tensor 0: planned .*\(4, 6\).*\(4, 5\)"),
        ((torch.ones(4, 6), torch.ones(2)), "tensor 0: planned .*float64.*float32"),
        ((torch.ones(4, 6).double(), 3), "tensor 1: got int"),
        (
            (torch.ones(4, 6).double(), torch.ones(2, requires_grad=True)),
            "tensor 1: planned without gradient",
        ),
    ],
)
def test_what_a_stage_hands_over_must_be_as_planned(outputs: Any, problem: str) -> None:
    boundary = Boundary((FLOAT, TensorSpec((2,), torch.float32, False)))
    with pytest.raises(PipelineError, match=f"stage 1 does not hand over.*\n.*{problem}"):
        boundary.check(outputs, "stage 1", training=True)


def test_all_problems_of_a_boundary_are_named() -> None:
    boundary = Boundary((FLOAT, FLOAT))
    with pytest.raises(PipelineError, match=r"tensor 0: got str\n  tensor 1: got int\n  options:"):
        boundary.check(("a", 1), "stage 0", training=True)


def test_only_floats_require_grad() -> None:
    with pytest.raises(PipelineError, match=r"dtype torch\.int64 cannot require grad"):
        TensorSpec((1,), torch.int64, True)


DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.bool,
    torch.int8,
    torch.int16,
    torch.int64,
]


def test_tensors_of_any_dtype_arrive_as_they_were() -> None:
    values = []
    for i, dtype in enumerate(DTYPES):
        shape = ((), (3,), (2, 5), (1, 0, 2))[i % 4]
        values += [torch.randint(0, 2, shape).to(dtype), torch.randn(shape).to(torch.float32)]
    values = [v.requires_grad_() if v.dtype == torch.float32 else v for v in values]
    boundary = Boundary(tuple(TensorSpec(tuple(v.shape), v.dtype, v.requires_grad) for v in values))
    got = unpack(boundary, pack(boundary, values, CPU), CPU)
    for value, arrived in zip(values, got, strict=True):
        assert (arrived.dtype, arrived.shape) == (value.dtype, value.shape)
        assert torch.equal(arrived.double(), value.double()) or value.is_complex()
        assert not value.is_complex() or torch.equal(arrived, value)
        assert arrived.requires_grad == value.requires_grad
        assert not arrived._is_view()
        assert arrived.is_contiguous()


def test_gradients_pass_through_a_buffer_of_the_widest_dtype() -> None:
    specs = [((2, 3), torch.bfloat16), ((), torch.float32), ((2,), torch.complex64)]
    boundary = Boundary(tuple(TensorSpec(shape, dtype, True) for shape, dtype in specs))
    assert (boundary.buffer_dtype, boundary.buffer_numel) == (torch.float32, 6 + 1 + 4)
    values = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape, dtype in specs]
    a, b, c = unpack(boundary, pack(boundary, values, CPU), CPU)
    (a.sum() * 2 + b * 3 + torch.view_as_real(c.conj().resolve_conj())[:, 1].sum()).backward()
    assert values[0].grad is not None
    assert torch.equal(values[0].grad, torch.full((2, 3), 2.0, dtype=torch.bfloat16))
    assert torch.equal(values[1].grad, torch.tensor(3.0))
    assert torch.equal(values[2].grad, torch.full((2,), -1j, dtype=torch.complex64))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_lone_contiguous_tensor_is_not_copied(requires_grad: bool) -> None:
    value = torch.randn(3, 4)[1:].requires_grad_(requires_grad)
    boundary = Boundary((TensorSpec((2, 4), torch.float32, requires_grad),))
    parcel = pack(boundary, [value], CPU)
    assert [m.data_ptr() for _, m in parcel.messages()] == [value.data_ptr()]
    assert unpack(boundary, parcel, CPU)[0].data_ptr() == value.data_ptr()


def test_both_sides_agree_on_the_messages_and_there_is_always_one() -> None:
    for tensors in [
        (),
        (TensorSpec((0,), torch.int64, False),),
        (TensorSpec((0,), torch.float32, True),),
    ]:
        boundary = Boundary(tensors)
        values = [torch.empty(s.shape, dtype=s.dtype) for s in tensors]
        sent = pack(boundary, values, CPU).messages()
        received = Parcel.empty(boundary, CPU).messages()
        assert [(tag, m.shape, m.dtype) for tag, m in sent] == [(1, (1,), torch.uint8)]
        assert [(tag, m.shape) for tag, m in received] == [(1, (1,))]

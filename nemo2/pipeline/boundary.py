"""What crosses from one pipeline stage to the next, and how it travels.

A boundary is any number of tensors of any shapes and dtypes. Megatron's schedules differentiate one
tensor per boundary, so all tensors that require grad share one flat *gradient buffer*; everything
else (integers, booleans, floats without gradient) shares one flat buffer of *raw bytes* beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from nemo2.errors import PipelineError

_ALIGNMENT = 16  # bytes; each tensor in the raw buffer starts at a multiple, as its dtype needs


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a boundary.

    Args:
        shape: local shape of one microbatch on this rank.
        dtype: any dtype; only floating and complex ones can require grad.
        requires_grad: whether the next stage sends a gradient back (in training).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def __post_init__(self) -> None:
        if self.requires_grad and not (self.dtype.is_floating_point or self.dtype.is_complex):
            raise PipelineError(
                f"a boundary tensor of dtype {self.dtype} cannot require grad\n"
                "  options: requires_grad=False | a floating or complex dtype"
            )

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Boundary:
    """The tensors that one stage hands to the next, in order; possibly none.

    The same on both sides of the boundary: each side sends and receives what it says, whatever
    the tensors at hand turn out to be.
    """

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def differentiable(self) -> tuple[TensorSpec, ...]:
        """The tensors in the gradient buffer."""
        return tuple(spec for spec in self.tensors if spec.requires_grad)

    @cached_property
    def plain(self) -> tuple[TensorSpec, ...]:
        """The tensors in the buffer of raw bytes."""
        return tuple(spec for spec in self.tensors if not spec.requires_grad)

    @cached_property
    def buffer_dtype(self) -> torch.dtype:
        """The real dtype that holds every differentiable tensor without loss."""
        dtypes = [spec.dtype.to_real() for spec in self.differentiable]
        return reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()

    @cached_property
    def buffer_numel(self) -> int:
        return sum(_real_numel(spec) for spec in self.differentiable)

    @cached_property
    def raw_offsets(self) -> tuple[int, ...]:
        """Where each plain tensor starts, in bytes, and at the end the total."""
        offsets = [0]
        for spec in self.plain:
            offsets.append(offsets[-1] + -(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT)
        if not self.buffer_numel and not offsets[-1]:
            # NCCL opens a group's communicator when all its ranks send or receive something.
            offsets[-1] = 1
        return tuple(offsets)

    def check(self, outputs: Sequence[Any], where: str, *, training: bool) -> None:
        """Raise PipelineError naming every output that is not as planned."""
        problems = []
        if len(outputs) != len(self.tensors):
            problems.append(f"planned {len(self.tensors)} tensors, got {len(outputs)}")
        for i, (spec, value) in enumerate(zip(self.tensors, outputs, strict=False)):
            if not isinstance(value, Tensor):
                problems.append(f"tensor {i}: got {type(value).__name__}")
            elif (tuple(value.shape), value.dtype) != (spec.shape, spec.dtype):
                planned, got = (spec.shape, spec.dtype), (tuple(value.shape), value.dtype)
                problems.append(f"tensor {i}: planned {planned}, got {got}")
            elif training and value.requires_grad and not spec.requires_grad:
                problems.append(f"tensor {i}: planned without gradient, got one that requires grad")
        if problems:
            raise PipelineError(
                f"{where} does not hand over what was planned\n  "
                + "\n  ".join(problems)
                + "\n  options: plan again with this batch | give all microbatches the same shapes"
            )


@dataclass
class Parcel:
    """The two flat buffers of one microbatch at one boundary; None where there is nothing."""

    buffer: Tensor | None
    raw: Tensor | None

    @classmethod
    def empty(cls, boundary: Boundary, device: torch.device) -> Parcel:
        """Return buffers to receive into."""
        numel, nbytes = boundary.buffer_numel, boundary.raw_offsets[-1]
        buffer = torch.empty(numel, dtype=boundary.buffer_dtype, device=device) if numel else None
        raw = torch.empty(nbytes, dtype=torch.uint8, device=device) if nbytes else None
        return cls(buffer, raw)

    def messages(self) -> list[tuple[int, Tensor]]:
        """Return what travels, each with its tag; never empty, the same on both sides."""
        pair = enumerate((self.buffer, self.raw))
        return [(tag, tensor.detach()) for tag, tensor in pair if tensor is not None]


def pack(boundary: Boundary, outputs: Sequence[Tensor], device: torch.device) -> Parcel:
    """Return the buffers for a stage's checked outputs, connected to them by autograd.

    A lone contiguous tensor is not copied, its buffer shares its memory; otherwise tensors are
    copied once. A buffer is never an autograd view.

    Communication: none.
    """
    pairs = list(zip(boundary.tensors, outputs, strict=True))
    floats = [value for spec, value in pairs if spec.requires_grad]
    buffer = None
    if boundary.buffer_numel:
        buffer = _Pack.apply(boundary, *floats)  # type: ignore[no-untyped-call]
    plain = [value.detach() for spec, value in pairs if not spec.requires_grad]
    return Parcel(buffer, _pack_raw(boundary, plain, device))


def unpack(boundary: Boundary, parcel: Parcel, device: torch.device) -> tuple[Tensor, ...]:
    """Return the tensors of a parcel, in the boundary's order.

    They share the buffers' memory where dtypes agree, but are not autograd views, so that the
    stage may change them in place as it may change any hidden state.

    Communication: none.
    """
    floats: tuple[Tensor, ...] = ()
    if boundary.differentiable:
        buffer = parcel.buffer
        if buffer is None:  # tensors that require grad, but all empty
            buffer = torch.empty(0, dtype=boundary.buffer_dtype, device=device)
        floats = _Unpack.apply(boundary, buffer)  # type: ignore[no-untyped-call]
    floats_left, plain_left = iter(floats), iter(_unpack_raw(boundary, parcel.raw, device))
    return tuple(
        next(floats_left if spec.requires_grad else plain_left) for spec in boundary.tensors
    )


class _Pack(torch.autograd.Function):
    """Differentiable tensors -> one flat buffer; backward cuts the buffer's gradient."""

    @staticmethod
    def forward(ctx: Any, boundary: Boundary, *tensors: Tensor) -> Tensor:
        ctx.boundary = boundary
        return _flatten(boundary, tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = _unflatten(ctx.boundary, gradient.contiguous())
        needed = ctx.needs_input_grad[1:]
        return None, *(part if need else None for part, need in zip(parts, needed, strict=True))


class _Unpack(torch.autograd.Function):
    """One flat buffer -> its tensors; backward joins their gradients, zeros for unused ones."""

    @staticmethod
    def forward(ctx: Any, boundary: Boundary, buffer: Tensor) -> tuple[Tensor, ...]:
        ctx.boundary = boundary
        return _unflatten(boundary, buffer.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, _flatten(ctx.boundary, gradients)


def _flatten(boundary: Boundary, tensors: Sequence[Tensor]) -> Tensor:
    """Join differentiable tensors; without a copy where there is one contiguous tensor."""
    parts = []
    for tensor in tensors:
        real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        parts.append(real.detach().resolve_neg().to(boundary.buffer_dtype).contiguous())
    if len(parts) == 1:
        return _alias(parts[0], parts[0].dtype, 0, (parts[0].numel(),))
    return torch.cat([part.reshape(-1) for part in parts])


def _unflatten(boundary: Boundary, buffer: Tensor) -> tuple[Tensor, ...]:
    """Cut a flat buffer into tensors of the planned shapes and dtypes."""
    tensors, start = [], 0
    for spec in boundary.differentiable:
        shape = (*spec.shape, 2) if spec.dtype.is_complex else spec.shape
        part = _alias(buffer, buffer.dtype, start * buffer.dtype.itemsize, shape)
        part = part.to(spec.dtype.to_real())
        if spec.dtype.is_complex:
            part = _alias(part.clone(), spec.dtype, 0, spec.shape)  # clone: complex alignment
        tensors.append(part)
        start += _real_numel(spec)
    return tuple(tensors)


def _pack_raw(boundary: Boundary, tensors: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """Join the bytes of plain tensors; without a copy where there is one that fills the buffer."""
    nbytes = boundary.raw_offsets[-1]
    if not nbytes:
        return None
    parts = [t.resolve_conj().resolve_neg().contiguous() for t in tensors]
    if len(parts) == 1 and boundary.plain[0].nbytes == nbytes:
        return _alias(parts[0], torch.uint8, 0, (nbytes,))
    raw = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    for part, spec, start in zip(parts, boundary.plain, boundary.raw_offsets, strict=False):
        raw[start : start + spec.nbytes] = _alias(part, torch.uint8, 0, (spec.nbytes,))
    return raw


def _unpack_raw(boundary: Boundary, raw: Tensor | None, device: torch.device) -> list[Tensor]:
    if raw is None:
        return [torch.empty(s.shape, dtype=s.dtype, device=device) for s in boundary.plain]
    pairs = zip(boundary.plain, boundary.raw_offsets, strict=False)
    return [_alias(raw, spec.dtype, start, spec.shape) for spec, start in pairs]


def _alias(tensor: Tensor, dtype: torch.dtype, start: int, shape: tuple[int, ...]) -> Tensor:
    """Return a contiguous tensor on ``tensor``'s memory from byte ``start``, unknown to autograd.

    A view would be recorded as one, and autograd forbids in-place changes of views that a custom
    function returns.
    """
    offset = tensor.storage_offset() * tensor.dtype.itemsize + start
    assert offset % dtype.itemsize == 0, (offset, dtype)
    alias = torch.empty(0, dtype=dtype, device=tensor.device)
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return alias.set_(tensor.untyped_storage(), offset // dtype.itemsize, shape, strides)


def _real_numel(spec: TensorSpec) -> int:
    return spec.numel * (2 if spec.dtype.is_complex else 1)

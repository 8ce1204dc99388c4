"""Operations that a compiler calls as they are: attention over a split sequence, dropout's masks.

``ring.py``, ``prefixes.py`` and ``counter.py`` have what they do; a graph names an axis by its
group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from . import counter, kernels, prefixes, ring
from .collectives import Axis
from .ring import Attention

_custom_op: Any = torch.library.custom_op  # untyped upstream
_group_of: Any = getattr(distributed_c10d, "_resolve_process_group")  # noqa: B009


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, what: Attention, axis: Axis
) -> tuple[Tensor, Tensor]:
    """Return attention and its log-sum-exp; see ``ring.ring_forward``."""
    out: tuple[Tensor, Tensor] = _forward(q, k, v, *_said(what, axis))
    return out


def ring_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    what: Attention,
    axis: Axis,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; see ``ring.ring_backward``."""
    grads: tuple[Tensor, Tensor, Tensor] = _backward(grad, q, k, v, out, lse, *_said(what, axis))
    return grads


def _said(what: Attention, axis: Axis) -> tuple[Any, ...]:
    assert axis.group is not None
    return (
        what.mask,
        what.causal,
        what.scale,
        axis.group.group_name,
        axis.rank,
        axis.degree,
        axis.balanced,
    )


def _meant(
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    group: str,
    rank: int,
    degree: int,
    balanced: bool,
) -> tuple[Attention, Axis]:
    axis = Axis("cp", _group_of(group), rank, degree, balanced, summed=True)
    return Attention(causal, mask, scale), axis


@_custom_op("nemo2::ring_forward", mutates_args=())  # type: ignore[untyped-decorator]
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    group: str,
    rank: int,
    degree: int,
    balanced: bool,
) -> tuple[Tensor, Tensor]:
    return ring.ring_forward(q, k, v, *_meant(mask, causal, scale, group, rank, degree, balanced))


@_forward.register_fake  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return kernels.result_for(q, v, q.dtype), kernels.lse_for(q, mask)


@_custom_op("nemo2::ring_backward", mutates_args=())  # type: ignore[untyped-decorator]
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    group: str,
    rank: int,
    degree: int,
    balanced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    what, axis = _meant(mask, causal, scale, group, rank, degree, balanced)
    return ring.ring_backward(grad, q, k, v, out, lse, what, axis)


@_backward.register_fake  # type: ignore[untyped-decorator]
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


@_custom_op("nemo2::prefixes_forward", mutates_args=())  # type: ignore[untyped-decorator]
def prefixes_forward(
    q: Tensor, k: Tensor, v: Tensor, ends: list[int], causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return attention and its log-sum-exp; see ``prefixes.prefixes_forward``."""
    return prefixes.prefixes_forward(q, k, v, ends, causal, scale)


@prefixes_forward.register_fake  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return kernels.result_for(q, v, q.dtype), kernels.lse_for(q, None)


@_custom_op("nemo2::prefixes_backward", mutates_args=())  # type: ignore[untyped-decorator]
def prefixes_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: list[int],
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; see ``prefixes.prefixes_backward``."""
    return prefixes.prefixes_backward(grad, q, k, v, out, lse, ends, causal, scale)


@prefixes_backward.register_fake  # type: ignore[untyped-decorator]
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@_custom_op("nemo2::keep_mask", mutates_args=())  # type: ignore[untyped-decorator]
def keep_mask(key: Tensor, positions: list[Tensor], probability: float) -> Tensor:
    """Return which elements are kept; see ``counter.keep_mask``."""
    return counter.keep_mask(key, positions, probability)


@keep_mask.register_fake  # type: ignore[untyped-decorator]
def _(key: Tensor, positions: list[Tensor], probability: float) -> Tensor:
    return key.new_empty([p.numel() for p in positions], dtype=torch.bool)

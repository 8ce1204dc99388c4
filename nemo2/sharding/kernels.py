"""Attention of some queries over some keys, with the log-sum-exp that merging parts needs.

On CUDA in half precision and without a dense mask: torch's flash kernels. Else: plain torch in
at least float32, which every dtype and mask can use, and which tests compare to one device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


def _flash(q: Tensor, mask: Tensor | None) -> bool:
    fits = q.is_cuda and q.dtype in _HALF and mask is None and q.ndim == 4
    return fits and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return attention (..., m, d) and the log-sum-exp of each row's scores (..., m).

    A row that may look at no key gets zeros, and minus infinity.

    Args:
        causal: row i sees columns up to i + (columns - rows).
    """
    if _flash(q, mask) and (not causal or q.shape[-2] == k.shape[-2]):
        out, lse = _aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )[:2]
        return out, lse
    scores = _scores(q, k, mask, causal, scale)
    top = scores.amax(-1, keepdim=True)
    safe = torch.where(torch.isneginf(top), 0, top)
    weights = (scores - safe).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v.to(scores.dtype)) / total.clamp_min(torch.finfo(scores.dtype).tiny)
    return out, (safe + total.log()).squeeze(-1)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v for these keys' share of the whole attention.

    Args:
        out, lse: of the rows over *all* keys.
    """
    if _flash(q, mask) and (not causal or q.shape[-2] == k.shape[-2]):
        zero = torch.zeros((), dtype=torch.uint64, device=q.device)
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            grad.contiguous(),
            q,
            k,
            v,
            out.contiguous(),
            lse.contiguous(),
            None,
            None,
            q.shape[-2],
            k.shape[-2],
            0.0,
            causal,
            zero,
            zero,
            scale=scale,
        )
        return dq, dk, dv
    scores = _scores(q, k, mask, causal, scale)
    dtype = scores.dtype
    safe = torch.where(torch.isneginf(lse), 0, lse).to(dtype)
    weights = (scores - safe.unsqueeze(-1)).exp_()
    wide = grad.to(dtype)
    dv = weights.transpose(-1, -2) @ wide
    through = wide @ v.to(dtype).transpose(-1, -2)
    share = (wide * out.to(dtype)).sum(-1, keepdim=True)
    ds = weights * (through - share) * _scale(q, scale)
    return ds @ k.to(dtype), ds.transpose(-1, -2) @ q.to(dtype), dv


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(dtype) * _scale(q, scale)) @ k.to(dtype).transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(dtype)
    if causal:
        rows, columns = scores.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        scores = scores.masked_fill(~seen, -math.inf)
    return scores


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Return attention of the last rows of a sequence over its keys, differentiable.

    Args:
        causal: row i sees columns up to i + (columns - rows); then without a mask.
    """
    rows, columns = q.shape[-2], k.shape[-2]
    if not causal or rows == columns:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
    return F.scaled_dot_product_attention(q, k, v, seen, scale=scale)

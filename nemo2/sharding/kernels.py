"""Attention of some queries over some keys, with the log-sum-exp that merging parts needs.

On CUDA in half precision and without a dense mask: the fused kernel that torch would choose for one
device (cuDNN's or flash, as ``torch.nn.attention.sdpa_kernel`` allows). Else: plain torch in at
least float32, which every dtype and mask can use, and which tests compare to one device. Keys and
values may have fewer heads than queries; each of theirs serves as many, and is never repeated in
memory by a fused kernel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Return which fused kernel runs: ``"cudnn"``, ``"flash"`` or none."""
    if mask is not None or not q.is_cuda or q.dtype not in _HALF or q.ndim != 4:
        return None
    chosen = torch._fused_sdp_choice(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    names = {SDPBackend.CUDNN_ATTENTION.value: "cudnn", SDPBackend.FLASH_ATTENTION.value: "flash"}
    return names.get(chosen)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return attention (..., m, d) and the log-sum-exp of each row's scores (..., m).

    With a mask it is given as two numbers, (2, ..., m): the largest score, and what the sum adds
    to it. Under a mask of huge negative numbers, rows that see nothing have all scores alike, and
    their sum would be lost beside the score. A row that may look at no key gets zeros, and minus
    infinity.

    Args:
        causal: row i sees columns up to i + (columns - rows); then rows <= columns, and no mask.
    """
    kernel, before = fused(q, k, v, mask), k.shape[-2] - q.shape[-2]
    if kernel == "flash":
        padded = (_in_eights(x) for x in (q, k, v))
        made = _aten._scaled_dot_product_flash_attention(
            *padded, 0.0, causal, scale=_scale(q, scale)
        )
        return made[0][..., : v.shape[-1]], made[1]
    if kernel is None:
        return _plain(q, k, v, mask, causal, scale)
    if causal and before:  # its causal mask starts at the upper left
        out, lse = forward(q, _rows(k, 0, before), _rows(v, 0, before), None, False, scale)
        out = out.float()
        square = _rows(k, before), _rows(v, before)
        merge(out, lse, *forward(q, *square, None, True, scale))
        return out.to(q.dtype), lse
    made = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return made[0], made[1].squeeze(-1)


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
    kernel, before = fused(q, k, v, mask), k.shape[-2] - q.shape[-2]
    if kernel is None:
        return _plain_backward(grad, q, k, v, out, lse, mask, causal, scale)
    if kernel == "cudnn" and causal and before:
        of = grad, q, _rows(k, 0, before), _rows(v, 0, before), out, lse, None, False, scale
        dq, *early = backward(*of)
        of = grad, q, _rows(k, before), _rows(v, before), out, lse, None, True, scale
        more, *late = backward(*of)
        dk, dv = (torch.cat(halves, -2) for halves in zip(early, late, strict=True))
        return dq.float().add_(more), dk, dv
    # Without dropout neither reads its state of random numbers.
    kind = torch.uint64 if kernel == "flash" else torch.int64
    state = torch.zeros((), dtype=kind, device=q.device)
    sizes = (None, None, q.shape[-2], k.shape[-2])
    if kernel == "flash":
        padded = (_in_eights(x) for x in (grad, q, k, v, out))
        made = _aten._scaled_dot_product_flash_attention_backward(
            *padded, lse.contiguous(), *sizes, 0.0, causal, state, state, scale=_scale(q, scale)
        )
        grads = [x[..., : y.shape[-1]] for x, y in zip(made, (q, k, v), strict=True)]
    else:
        lse = lse.contiguous().unsqueeze(-1)
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, state, state, None, *sizes, 0.0, causal, scale=scale
        )
    return grads[0], grads[1], grads[2]


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add attention over some keys to that over others, ``out``, in place."""
    part_lse = part_lse.to(lse.dtype)
    if two := lse.ndim == out.ndim:
        top = torch.maximum(lse[0], part_lse[0])
        own, other = (x[0] - _finite(top) + x[1] for x in (lse, part_lse))
        lse[0] = top
    else:
        own, other = lse, part_lse
    share = torch.where(torch.isneginf(other), 0, (other - own).sigmoid())
    out.lerp_(part.to(out.dtype), share.unsqueeze(-1).to(out.dtype))
    torch.logaddexp(own, other, out=lse[1] if two else lse)


def lse_for(q: Tensor, mask: Tensor | None) -> Tensor:
    """Return an empty tensor for the log-sum-exp of the rows of ``q``, as ``forward`` gives it."""
    two = (2,) if mask is not None else ()
    return q.new_empty((*two, *q.shape[:-1]), dtype=torch.promote_types(q.dtype, torch.float32))


def result_for(q: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor for attention (..., heads, m, d), laid out as torch's kernels do.

    In memory a row's heads lie side by side, as the projection after it needs them.
    """
    if q.ndim < 3:
        return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype)
    *batch, heads, rows, _ = q.shape
    return q.new_empty((*batch, rows, heads, v.shape[-1]), dtype=dtype).transpose(-2, -3)


def as_many_heads(x: Tensor, q: Tensor) -> Tensor:
    """Return keys or values, each head repeated as often as queries share it."""
    if x.ndim < 3 or x.shape[-3] == q.shape[-3]:
        return x
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)


def _in_eights(x: Tensor) -> Tensor:
    """Return ``x`` with zeros after its last dim: torch's operator takes multiples of eight."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _rows(x: Tensor, start: int, stop: int | None = None) -> Tensor:
    return x[..., start:stop, :]


# --- plain torch ---------------------------------------------------------------------------------


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    k, v = as_many_heads(k, q), as_many_heads(v, q)
    scores = _scores(q, k, mask, causal, scale, _one_device_fuses(q, k, v, mask))
    top = scores.amax(-1, keepdim=True)
    weights = (scores - _finite(top)).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v.to(scores.dtype)) / total.clamp_min(torch.finfo(scores.dtype).tiny)
    top, more = top.squeeze(-1), total.log().squeeze(-1)
    return out, top + more if mask is None else torch.stack([top, more])


def _plain_backward(
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
    heads = k.shape[-3] if k.ndim > 2 else 1
    k, v = as_many_heads(k, q), as_many_heads(v, q)
    fuses = _one_device_fuses(q, k, v, mask)
    scores = _scores(q, k, mask, causal, scale, fuses)
    dtype = scores.dtype
    # With it, gradients of rows that see nothing are those of weights of one each.
    sums = lse.sum(0, keepdim=True) if fuses else lse if mask is not None else lse.unsqueeze(0)
    for part in sums:
        scores = scores - _finite(part).to(dtype).unsqueeze(-1)
    weights = scores.exp_()
    wide = grad.to(dtype)
    dv = weights.transpose(-1, -2) @ wide
    through = wide @ v.to(dtype).transpose(-1, -2)
    share = (wide * out.to(dtype)).sum(-1, keepdim=True)
    ds = weights * (through - share) * _scale(q, scale)
    dk = ds.transpose(-1, -2) @ q.to(dtype)
    return ds @ k.to(dtype), _summed_heads(dk, heads), _summed_heads(dv, heads)


def _one_device_fuses(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Say whether torch on one device takes a fused kernel for a mask: it keeps one number a row.

    Under a mask of huge negative numbers that shows in rows that see nothing.
    """
    if mask is None or q.ndim != 4:
        return False
    return bool(torch._fused_sdp_choice(q, k, v, mask) != SDPBackend.MATH.value)


def _finite(x: Tensor) -> Tensor:
    return torch.where(torch.isneginf(x), 0, x)


def _summed_heads(x: Tensor, heads: int) -> Tensor:
    if x.ndim < 3 or x.shape[-3] == heads:
        return x
    return x.reshape(*x.shape[:-3], heads, -1, *x.shape[-2:]).sum(-3)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    fuses: bool,
) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(dtype) * _scale(q, scale)) @ k.to(dtype).transpose(-1, -2)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(dtype)
        if fuses and q.is_cuda:  # there scores are multiplied by log2(e), and the lowest overflow
            lowest = torch.finfo(dtype).min / math.log2(math.e)
            scores = scores.masked_fill(scores < lowest, -math.inf)
    if causal:
        rows, columns = scores.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        scores = scores.masked_fill(~seen, -math.inf)
    return scores

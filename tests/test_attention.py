"""Attention over a split sequence against attention on one device, kernel by kernel."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemo2.sharding import kernels
from nemo2.sharding.attention import context_attention
from nemo2.sharding.collectives import Axis, all_gather, take

SIZES = {"b": 2, "heads": 4, "kv": 2, "d": 8}


def make(seq, dtype, device, kv=SIZES["kv"], d=SIZES["d"]):
    torch.manual_seed(3)
    shapes = [(SIZES["heads"], d), (kv, d), (kv, d), (SIZES["heads"], d)]
    made = [torch.randn(SIZES["b"], h, seq, w, dtype=torch.float64) for h, w in shapes]
    return [x.to(device, dtype) for x in made]


def mask_of(kind, seq, device, dtype):
    if kind == "documents":
        at = torch.arange(seq, device=device)
        document = (at // 5)[None].expand(SIZES["b"], seq)
        same = document[:, None, :, None] == document[:, None, None, :]
        return same & (at[:, None] >= at)
    if kind == "bias":
        return torch.randn(SIZES["heads"], seq, seq, device=device).to(dtype)
    if kind == "padded":  # huge finite numbers: rows that see nothing see everything alike
        at = torch.arange(seq, device=device)
        hidden = (at < 5) | (at[:, None] < at)
        return torch.zeros(seq, seq, device=device).masked_fill(hidden, -3e38).to(dtype)
    if kind == "columns":  # whole rows see nothing of some parts
        return (torch.arange(seq, device=device) < 3)[None, None, None]
    return None


def alone(q, k, v, grad, mask, causal):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    out.backward(grad)
    return [out.detach(), q.grad, k.grad, v.grad]


def compared(method, balanced, kind, causal, seq, dtype, device, d=SIZES["d"]):
    """Return the largest relative error of the output and the gradients on this rank."""
    n, rank = dist.get_world_size(), dist.get_rank()
    axis = Axis("cp", dist.group.WORLD, rank, n, balanced, summed=True)
    q, k, v, grad = make(seq, dtype, device, d=d)
    mask = mask_of(kind, seq, q.device, dtype)
    want = alone(q, k, v, grad, mask, causal)
    own = [take(x, 2, axis).contiguous().requires_grad_() for x in (q, k, v)]
    out = context_attention(*own, mask, is_causal=causal, enable_gqa=True, axis=axis, method=method)
    out.backward(take(grad, 2, axis).contiguous())
    got = [all_gather(x.detach(), 2, axis) for x in (out, *(x.grad for x in own))]
    pairs = zip(got, want, strict=True)
    return max(float((g - w).double().norm() / w.double().norm()) for g, w in pairs)


def all_compared(methods, seq, dtype, device, d=SIZES["d"]):
    found = {}
    masks = ("documents", "bias", "padded", "columns")
    kinds = ((None, True), (None, False), *((mask, False) for mask in masks))
    for method, balanced, (kind, causal) in itertools.product(methods, (True, False), kinds):
        how = method, balanced, kind, causal
        found[how] = compared(*how, seq, dtype, device, d)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_methods_equal_one_device(pool, world):
    methods = ("ring", "all_gather", "ulysses") if world == 2 else ("ring", "all_gather")
    seq, device = 4 * world * 2, pool.device
    for found in pool.run(world, all_compared, methods, seq, torch.float64, device):
        assert all(error < 1e-12 for error in found.values()), found


def in_half_precision(kernel, size, device):
    kinds = [SDPBackend.MATH, getattr(SDPBackend, kernel)]
    with sdpa_kernel(kinds) if device == "cuda" else nullcontext():
        return all_compared(("ring", "all_gather"), 512, torch.bfloat16, device, size)


@pytest.mark.parametrize(
    ("kernel", "size"), [("FLASH_ATTENTION", 64), ("FLASH_ATTENTION", 20), ("CUDNN_ATTENTION", 64)]
)
def test_half_precision_kernels(pool, kernel, size):
    """bfloat16: on CUDA a fused kernel for what has no dense mask."""
    for found in pool.run(2, in_half_precision, kernel, size, pool.device):
        assert all(error < 2e-2 for error in found.values()), found


class OnlySquares:
    """cuDNN's attention in plain torch: under a causal mask row i sees columns up to i."""

    def _scaled_dot_product_cudnn_attention(
        self, q, k, v, bias, want_lse, dropout, causal, debug, scale
    ):
        assert want_lse
        assert not causal or q.shape == k.shape
        out, lse = kernels._plain(q, k, v, None, causal, scale)
        return out, lse.unsqueeze(-1)

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad, q, k, v, out, lse, seed, offset, bias, rows, columns, *rest, scale
    ):
        assert not rest[3] or q.shape == k.shape
        assert lse.shape == (*q.shape[:-1], 1)
        return kernels._plain_backward(grad, q, k, v, out, lse.squeeze(-1), None, rest[3], scale)


class OnlyEights:
    """Torch's flash operator in plain torch: sizes of heads are multiples of eight."""

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout, causal, *, scale):
        assert not q.shape[-1] % 8
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        return kernels._plain(q, k, v, None, causal, scale)

    def _scaled_dot_product_flash_attention_backward(
        self, grad, q, k, v, out, lse, a, b, rows, columns, dropout, causal, seed, offset, *, scale
    ):
        assert {x.shape[-1] for x in (grad, q, k, v, out)} == {q.shape[-1]}
        assert not q.shape[-1] % 8
        return kernels._plain_backward(grad, q, k, v, out, lse, None, causal, scale)


@pytest.mark.parametrize("d", [8, 20])
def test_heads_of_any_size_fit_the_flash_operator(monkeypatch, d):
    q, k, v, grad = (x.float() for x in make(12, torch.float64, "cpu", d=d))
    want = kernels.forward(q, k, v, None, True, None)
    grads = kernels.backward(grad, q, k, v, *want, None, True, None)
    monkeypatch.setattr(kernels, "fused", lambda *_: "flash")
    monkeypatch.setattr(kernels, "_aten", OnlyEights())
    got = kernels.forward(q, k, v, None, True, None)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(kernels.backward(grad, q, k, v, *got, None, True, None), grads)


def test_a_kernel_that_masks_only_squares_gives_the_last_rows_of_a_sequence(monkeypatch):
    q, k, v, grad = (x.float() for x in make(12, torch.float64, "cpu", kv=4))
    last = q[..., -5:, :], k, v
    want = kernels.forward(*last, None, True, None)
    grads = kernels.backward(grad[..., -5:, :], *last, *want, None, True, None)
    monkeypatch.setattr(kernels, "fused", lambda *_: "cudnn")
    monkeypatch.setattr(kernels, "_aten", OnlySquares())
    got = kernels.forward(*last, None, True, None)
    torch.testing.assert_close(got, want)
    made = kernels.backward(grad[..., -5:, :], *last, *got, None, True, None)
    torch.testing.assert_close(made, grads)


def test_the_kernel_that_is_allowed_is_chosen_for_half_precision_on_cuda():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16, device=device)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert kernels.fused(x, x, x, None) == ("flash" if device == "cuda" else None)
        assert kernels.fused(x, x, x, torch.ones(16, 16, device=device)) is None
        assert kernels.fused(x.float(), x.float(), x.float(), None) is None


def test_a_row_that_may_look_at_nothing_adds_nothing():
    q, k, v, _ = make(4, torch.float64, "cpu", kv=4)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:] = True
    out, lse = kernels.forward(q, k, v, mask, False, None)
    assert torch.equal(out[:, :, 0], torch.zeros_like(out[:, :, 0]))
    assert torch.isneginf(lse[0, :, :, 0]).all()
    assert torch.isfinite(out).all()
    grads = kernels.backward(torch.ones_like(out), q, k, v, out, lse, mask, False, None)
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0][:, :, 0].any()

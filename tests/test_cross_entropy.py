"""Vocabulary-parallel cross-entropy against ``F.cross_entropy`` on the whole logits."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from nemo2.errors import ShardingError
from nemo2.pytree import tree_leaves
from nemo2.sharding import cross_entropy as module
from nemo2.sharding.cross_entropy import cross_entropy
from tests.pool import Pool

CLASSES = 24
SHAPES: list[tuple[int, ...]] = [(CLASSES,), (6, CLASSES), (3, CLASSES, 5), (2, CLASSES, 3, 2)]


def device() -> str:
    return "cuda" if torch.cuda.is_initialized() else "cpu"


def sharded(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return (loss, this rank's logits as a leaf)."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    dim = 1 if logits.dim() > 1 else 0
    local = logits.detach().chunk(degree, dim)[rank].clone().requires_grad_()
    vocab = logits.shape[dim]
    got = cross_entropy(
        local, target, group=dist.group.WORLD, rank=rank, degree=degree, vocab_size=vocab, **options
    )
    return got, local


def compare(logits: Tensor, target: Tensor, tolerance: float, **options: Any) -> None:
    # The reference runs on the CPU: on CUDA torch gives 0 for some means over nothing, on CPU nan.
    whole = logits.detach().cpu().clone().requires_grad_()
    plain = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    expected = F.cross_entropy(whole, target.cpu(), **plain)
    got, local = sharded(logits, target, **options)
    assert got.dtype == expected.dtype
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(got.cpu(), expected, **close)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    got.backward(upstream.to(got.device))
    assert whole.grad is not None
    assert local.grad is not None
    dim = 1 if logits.dim() > 1 else 0
    reference = whole.grad.chunk(dist.get_world_size(), dim)[dist.get_rank()]
    torch.testing.assert_close(local.grad.cpu(), reference, **close)
    everyone = [torch.empty_like(got) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, got.detach())
    assert all(torch.equal(one.nan_to_num(), got.nan_to_num()) for one in everyone)


def every_option(dtype: torch.dtype, tolerance: float, piece: int) -> int:
    with mock.patch.object(module, "PIECE", piece):
        return all_options(dtype, tolerance)


def all_options(dtype: torch.dtype, tolerance: float) -> int:
    count = 0
    options = itertools.product(
        SHAPES, ("mean", "sum", "none"), (False, True), (0.0, 0.3, 1.0), (-100, 7), (0.0, 0.4, 1.0)
    )
    for shape, reduction, weighted, smoothing, ignore_index, ignored in options:
        logits = 4 * torch.randn(shape, dtype=dtype, device=device())
        tokens = [size for dim, size in enumerate(shape) if dim != min(1, len(shape) - 1)]
        target = torch.randint(CLASSES, tokens, device=device())
        target[torch.rand(tokens, device=device()) < ignored] = ignore_index
        weight = torch.rand(CLASSES, dtype=dtype, device=device()) if weighted else None
        compare(
            logits,
            target,
            tolerance,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=smoothing,
        )
        count += 1
    return count


@pytest.mark.parametrize(("degree", "piece"), [(1, 30), (2, 1 << 26), (4, 7)])
def test_float64_is_exact(pool: Pool, degree: int, piece: int) -> None:
    # 1e-12: the sums are taken in another order, nothing else differs.
    assert pool.run(degree, every_option, torch.float64, 1e-12, piece) == [432] * degree


class Largest(TorchDispatchMode):
    """Remembers the most elements that a wide tensor had."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.int64):
                self.size = max(self.size, x.numel())
        return out


def test_no_wide_copy_of_all_logits_is_made() -> None:
    logits = torch.randn(64, 100).bfloat16().requires_grad_()
    target = torch.randint(100, (64,))
    options: dict[str, Any] = {"group": None, "rank": 0, "degree": 1, "vocab_size": 100}
    with mock.patch.object(module, "PIECE", 500), Largest() as seen:
        cross_entropy(logits, target, **options).backward()
    assert 100 <= seen.size <= 500
    assert logits.grad is not None
    small = logits.grad.clone()
    logits.grad = None
    cross_entropy(logits, target, **options).backward()
    assert torch.equal(small, logits.grad)


def low_precision() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        logits = 4 * torch.randn(64, CLASSES, dtype=dtype, device=device())
        target = torch.randint(CLASSES, (64,), device=device())
        for smoothing in (0.0, 0.1):
            compare(logits, target, tolerance, label_smoothing=smoothing)
    # In bf16 the gradient is that of float32 arithmetic, rounded once.
    exact = logits.float().requires_grad_()
    F.cross_entropy(exact, target, reduction="sum").backward()
    got, local = sharded(logits, target, reduction="sum")
    got.backward()
    assert exact.grad is not None
    reference = exact.grad.chunk(dist.get_world_size(), 1)[dist.get_rank()].bfloat16()
    torch.testing.assert_close(local.grad, reference, rtol=2**-7, atol=1e-7)
    with torch.autocast(device(), dtype=torch.bfloat16):
        assert sharded(logits, target)[0].dtype == F.cross_entropy(logits, target).dtype


def test_low_precision(pool: Pool) -> None:
    pool.run(2, low_precision)


def extreme() -> None:
    logits = torch.randn(5, CLASSES, dtype=torch.float64, device=device())
    target = torch.tensor([0, 5, 11, 17, 23], device=device())
    compare(logits * 1e4, target, 1e-12)
    masked = logits.clone()
    masked[:, 6:11] = -torch.inf  # classes that cannot be
    compare(masked, target, 1e-12)
    masked[:, 12:] = -torch.inf  # every class of some ranks
    compare(masked, target.clamp(max=5), 1e-12)
    compare(logits, target.int().long() * 0 - 100, 1e-12)
    compare(logits[:0], target[:0], 1e-12)


def test_extreme_values_and_empty_batches(pool: Pool) -> None:
    pool.run(4, extreme)


def count_collectives(smoothing: float) -> tuple[int, list[str], int]:
    logits = torch.randn(6, CLASSES, device=device())
    target = torch.arange(6, device=device())
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with CommDebugMode() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss, local = sharded(logits, target, label_smoothing=smoothing)
    with CommDebugMode() as backward:
        loss.backward()
    assert backward.get_total_counts() == 0
    kinds = [str(kind) for kind in forward.get_comm_counts()]
    large = {t.data_ptr() for t in kept if t.numel() >= local.numel()}
    return forward.get_total_counts(), kinds, len(large - {local.data_ptr()})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_all_reduces_forward_and_none_backward(pool: Pool, smoothing: float) -> None:
    for count, kinds, large in pool.run(2, count_collectives, smoothing):
        assert count == 2
        assert large == 0  # of logits size nothing is kept but the logits
        assert len(kinds) == 1
        assert "reduce" in kinds[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": torch.rand(4, 8)}, r"(?s)probabilities as target.*pass class indices"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target has shape \(3,\), needs \(4,\)"),
        ({"vocab_size": 9}, r"has 8 classes on this rank, 8 \* 1 ranks is not 9"),
        ({"weight": torch.ones(7)}, r"weight has shape \(7,\), needs \(8,\)"),
        ({"reduction": "avg"}, r"reduction='avg'; use 'mean', 'sum' or 'none'"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1.5 is not between 0 and 1"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"target": torch.zeros(4, dtype=torch.long), "vocab_size": 8} | options
    with pytest.raises(ShardingError, match=message):
        cross_entropy(torch.randn(4, 8), group=None, rank=0, degree=1, **arguments)


def test_a_target_out_of_range_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"neither in \[0, 8\) nor ignore_index=-100"):
        cross_entropy(
            torch.randn(2, 8),
            torch.tensor([1, 8]),
            group=None,
            rank=0,
            degree=1,
            vocab_size=8,
        )

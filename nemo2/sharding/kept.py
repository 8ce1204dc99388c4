"""What a block that is checkpointed selectively keeps for its recomputation.

Matrix products are kept by torch's selective checkpoint. Of a row-split product it is the sum
over the axis that is kept: neither the product nor its communication is done again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Kept:
    """The sums of one call of one block, in the order in which it made them.

    ``again`` is set while the block is recomputed.
    """

    def __init__(self) -> None:
        self.again = False
        self._sums: deque[tuple[Tensor, int]] = deque()
        self._partial = False

    def policy(self, ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """Say to torch's selective checkpoint which results to keep: products with weights.

        A batched product of one batch is such a one; others multiply activations.
        """
        plain = func is torch.ops.aten.bmm.default and args[0].shape[0] == 1
        if (func in _PRODUCTS or plain) and not self._partial:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def summed(self, product: Callable[[], Tensor], total: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``total(product())``; in a recomputation the result that was kept.

        Then ``product`` is called for what it saves for backward only. A result that was since
        changed in place is computed again.

        Communication: that of ``total``; none in a recomputation.
        """
        if not self.again:
            with self._aside():
                out = product()
            out = total(out)
            self._sums.append((out.detach(), out._version))
            return out
        known, version = self._sums.popleft()
        if known._version != version:
            with self._aside():
                out = product()
            return total(out)
        with self._aside(), _Skip():
            out = product()
        result: Tensor = _Instead.apply(out, known)  # type: ignore[no-untyped-call]
        return result

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Keep no product that is made inside."""
        self._partial = True
        try:
            yield
        finally:
            self._partial = False


class _Skip(TorchDispatchMode):
    """Gives products the right shape and no values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (*_PRODUCTS, torch.ops.aten.bmm.default):
            left, right = args[-2:]
            return left.new_empty((*left.shape[:-1], right.shape[-1]))
        return func(*args, **(kwargs or {}))


class _Instead(torch.autograd.Function):
    """Another value in the place of a tensor, with its place in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

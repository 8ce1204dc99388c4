"""What a block that is checkpointed selectively keeps for its recomputation: matrix products.

Of a row-split product the sum over the axis is kept: neither the product nor its communication
is done again. torch's own selective checkpoint keeps what single operations return, in a strict
order of all operations, which leaves no room for that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_BATCHED = torch.ops.aten.bmm.default


def version_of(x: Tensor) -> int:
    """Return how often ``x`` was written into; tensors of inference mode do not know it."""
    return 0 if x.is_inference() else x._version


class Kept:
    """The products and sums of one call of one block, in the order in which it made them.

    A result that was changed in place since it was kept is computed again.

    Attributes:
        again: whether the block is being recomputed.
    """

    def __init__(self) -> None:
        self.again = False
        self._products: deque[tuple[Tensor, int]] = deque()
        self._sums: deque[tuple[Tensor, int]] = deque()
        self._partial = False

    def mode(self) -> TorchDispatchMode:
        """Return the mode under which the block runs, and runs again."""
        return _Products(self)

    def product(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Return ``func``'s result, in a recomputation the one that was kept."""
        out: Tensor
        if self._partial:
            out = func(*args, **kwargs)
        elif self.again:
            out, version = self._products.popleft()
            if out._version != version:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
            # Below autograd a detached tensor shares the count of changes under this guard only.
            with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
                self._products.append((out.detach(), out._version))
        return out

    def summed(self, product: Callable[[], Tensor], total: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``total(product())``; in a recomputation the result that was kept.

        Then ``product`` is called for what it saves for backward only.

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
        with self._aside(), _Skip():  # type: ignore[no-untyped-call]
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


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands products with weights to ``Kept``.

    A batched product of one batch is such a one; others multiply activations with each other.
    """

    def __init__(self, kept: Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS or (func is _BATCHED and args[0].shape[0] == 1):
            return self.kept.product(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Skip(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives products the right shape and no values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (*_PRODUCTS, _BATCHED):
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

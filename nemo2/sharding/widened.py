"""``logits.float()`` before a loss, put off: ``F.cross_entropy`` then reads the logits themselves.

Losses are written ``F.cross_entropy(logits.float(), labels)``. The wide copy of all logits, and
the probabilities that autograd keeps in float32, are the largest tensors of many trainings. In the
last stage ``LateWidening`` (``late.py``) answers ``.float()`` of large 16-bit tensors by a
``Widened``: a float32 tensor to all that use it, which makes the wide values when something needs
them. ``F.cross_entropy`` does not: it computes in float32 from the 16-bit values, which it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pytree import tree_leaves, tree_map
from .cross_entropy import cross_entropy

_VIEWS: set[Any] = {
    Tensor.view,
    Tensor.reshape,
    Tensor.flatten,
    Tensor.contiguous,
    Tensor.squeeze,
    Tensor.unsqueeze,
    Tensor.__getitem__,
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
}
_SIZES: set[Any] = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous}
_SIZES |= {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "device", "is_cuda")}
_OWN: set[Any] = {Tensor.is_floating_point, torch.is_floating_point}
_OWN |= {
    getattr(Tensor, name).__get__
    for name in ("dtype", "requires_grad", "grad_fn", "is_leaf", "grad")
}


def widens(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Say whether a call is ``x.float()`` or ``x.to(torch.float32)``, and no more than that."""
    if func is Tensor.float:
        return len(args) == 1 and not kwargs
    given = (*args[1:], *kwargs.values())
    return func is Tensor.to and len(given) == 1 and given[0] is torch.float32


class Late(torch.autograd.Function):
    """Gives a ``Widened`` its place in the graph, for what takes it without asking for values."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, fused: bool, differentiable: bool) -> Widened:
        ctx.dtype = source.dtype
        return Widened(source, fused=fused, differentiable=differentiable)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype), None, None


def put_off(source: Tensor, *, fused: bool) -> Widened:
    """Return ``source.float()`` without its values."""
    made: Widened = Late.apply(source, fused, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return made


class Widened(Tensor):
    """A float32 tensor that has the values of ``source``, and makes them when they are needed.

    Attributes:
        source: the 16-bit tensor, with its history.
        parent: what it is a view of, and the call that made the view; None for the first.
        fused: whether a loss of it may be compiled.
        differentiable: whether the wide values have a gradient, where ``source`` has one.
    """

    source: Tensor
    parent: tuple[Widened, Callable[[Tensor], Tensor]] | None
    fused: bool
    differentiable: bool

    @staticmethod
    def __new__(cls, source: Tensor, *, fused: bool, differentiable: bool) -> Widened:
        made: Widened = torch.Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=torch.float32, device=source.device
        )
        return made

    def __init__(self, source: Tensor, *, fused: bool, differentiable: bool) -> None:
        self.source, self.parent = source, None
        self.fused, self.differentiable = fused, differentiable
        self._wide: Tensor | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the wide values have been made, and may have been changed in place since."""
        parent = self.parent[0] if self.parent is not None else None
        return self._wide is not None or (parent is not None and parent.is_whole)

    def whole(self) -> Tensor:
        """Return the wide values, made once; views share their memory, as those of a copy do."""
        if self._wide is None:
            with torch.set_grad_enabled(self.differentiable):
                if self.parent is None:
                    self._wide = self.source.float()
                else:
                    self._wide = self.parent[1](self.parent[0].whole())
        return self._wide

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if isinstance(x, Widened):
            if func in _OWN:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func in _SIZES:
                return func(x.source, *args[1:], **kwargs)
            others = tree_leaves((args[1:], kwargs))
            if widens(func, args, kwargs):
                return x
            if func in _VIEWS and not x.is_whole and not any(isinstance(y, Tensor) for y in others):
                return _view(x, func, args[1:], kwargs)
        if func is F.cross_entropy:
            loss = _loss(*args, **kwargs)
            if loss is not None:
                return loss
        return func(*tree_map(wide_values, args), **tree_map(wide_values, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """What did not ask, as custom autograd functions, which have their place in the graph."""

        def values(x: Any) -> Any:
            return x.whole().detach() if isinstance(x, Widened) else x

        return func(*tree_map(values, args), **tree_map(values, kwargs or {}))


def wide_values(x: Any) -> Any:
    """Return ``x`` with its values, if they were put off."""
    return x.whole() if isinstance(x, Widened) else x


def narrow(x: Tensor) -> tuple[Tensor, bool, bool]:
    """Return what a loss reads in place of ``x``; whether it is wide all the same; and fused."""
    if not isinstance(x, Widened):
        return x, False, False
    return (x.whole(), True, False) if x.is_whole else (x.source, True, x.fused)


def _view(x: Widened, func: Callable[..., Any], args: Any, kwargs: Any) -> Widened:
    def view(wide: Tensor) -> Tensor:
        out: Tensor = func(wide, *args, **kwargs)
        return out

    with torch.set_grad_enabled(x.differentiable):
        made = put_off(view(x.source), fused=x.fused)
    made.parent = x, view
    return made


def _loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Return the loss of class indices by the 16-bit logits; None where it is not that."""
    odd = size_average is not None or reduce is not None or reduction not in ("mean", "sum", "none")
    if not isinstance(input, Widened) or input.is_whole or odd or target.is_floating_point():
        return None
    if target.shape != (*input.shape[:1], *input.shape[2:]) or not 0.0 <= label_smoothing <= 1.0:
        return None  # torch says what is wrong
    if weight is not None and (weight.requires_grad or weight.shape != input.shape[1:2]):
        return None
    return cross_entropy(
        input.source,
        target,
        group=None,
        rank=0,
        degree=1,
        vocab_size=input.shape[1],
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        wide=True,
        fused=input.fused,
    )

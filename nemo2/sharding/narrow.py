"""Losses of ``logits.float()`` that read the 16-bit logits, and keep nothing wider for backward.

Losses are written ``F.cross_entropy(logits.float(), labels)``. Autograd then keeps a float32 value
for each logit, and its gradient passes through float32 copies of all logits: the largest tensors of
many trainings. The last stage of a step runs under ``NarrowLosses``, which knows of each float32
copy whose it is. The copy is made all the same and any use of it is as ever. ``F.cross_entropy`` of
it is computed in float32 from the 16-bit logits, whose gradient it gives: the same numbers, but
that gradients of several uses of one copy are added in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import Nemo2Error
from ..pytree import tree_leaves
from .cross_entropy import cross_entropy
from .modes import Watcher

SMALLEST = 1 << 20  # logits; a smaller copy costs nothing that counts
_NARROW = (torch.bfloat16, torch.float16)
# Each as it is done to the 16-bit logits, which may be laid out as no ``view`` can take them.
_VIEWS: dict[Any, Callable[..., Tensor]] = {
    Tensor.view: Tensor.reshape,
    **{
        x: x
        for name in ("reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute")
        for x in (getattr(Tensor, name), getattr(torch, name))
    },
    Tensor.contiguous: Tensor.contiguous,
    Tensor.__getitem__: Tensor.__getitem__,
}
_HOOKS = (Tensor.register_hook, Tensor.retain_grad)
_OUT_OF_SIGHT = (Tensor.data.__get__, Tensor.numpy, Tensor.__dlpack__, Tensor.set_)  # type: ignore[attr-defined]


@dataclass
class _Origin:
    """The 16-bit logits that a float32 copy is of."""

    logits: Tensor
    version: int
    plain: bool = False  # something asks for gradients of the copy
    used: bool = False  # a loss has read the logits in place of the copy

    @property
    def unchanged(self) -> bool:
        return self.logits.requires_grad and self.logits._version == self.version


@dataclass(frozen=True)
class _Copy:
    """A float32 copy of 16-bit logits, or a view or part of one."""

    origin: _Origin
    version: int
    views: tuple[tuple[Callable[..., Tensor], Any, Any], ...]

    def narrow(self) -> Tensor:
        """Return the 16-bit logits that have the same values."""
        x = self.origin.logits
        for view, args, kwargs in self.views:
            x = view(x, *args, **kwargs)
        return x


class NarrowLosses(Watcher):
    """The mode under which losses of float32 copies read the 16-bit logits.

    Args:
        fused: compile what a loss runs over all logits. Without it only losses that are computed by
            ``nemo2`` in any case are changed, as those of split logits: torch's own are faster.

    Raises: Nemo2Error where the user's code asks, after such a loss, for the gradient of the copy,
        or for its memory or that of the logits.
    """

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self._copies: Any = WeakTensorKeyDictionary()  # of each copy that the user still has

    def __enter__(self) -> NarrowLosses:
        _entered.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        _entered.remove(self)
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # the user's own compiled loss
            return func(*args, **kwargs)
        if func is F.cross_entropy and self.fused:
            loss = self._loss(*args, **kwargs)
            if loss is not None:
                return loss
        if func in _HOOKS or func in _OUT_OF_SIGHT or func is torch.autograd.grad:
            self._seen_through(func, tree_leaves((args, kwargs)))
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            copy = self._copied(func, args, kwargs, out)
            if copy is not None:
                self._copies[out] = copy
        return out

    def narrowed(self, x: Tensor) -> Tensor | None:
        """Return 16-bit logits with the values of ``x``, to which its gradient can go; or None."""
        copy = self._known(x)
        if copy is None or copy.origin.plain or not x.requires_grad:
            return None
        if _top_saved_tensors_default_hooks(True) is not None:  # a checkpoint counts what is saved
            return None
        copy.origin.used = True
        return copy.narrow()

    def _copied(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, out: Tensor
    ) -> _Copy | None:
        """Return what ``out`` is a float32 copy of, if it is one or a view of one."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not out.requires_grad:
            return None
        if widens(func, args, kwargs):
            return _Copy(_Origin(x, x._version), out._version, ()) if _suits(x) else None
        if func not in _VIEWS:
            return None
        given = tree_leaves((args[1:], kwargs))
        copy = self._known(x)
        if copy is None or any(isinstance(y, (Tensor, torch.dtype)) for y in given):
            return None
        return _Copy(copy.origin, out._version, (*copy.views, (_VIEWS[func], args[1:], kwargs)))

    def _known(self, x: Tensor) -> _Copy | None:
        """Return what is known of ``x``, if neither it nor the logits were written to since."""
        copy: _Copy | None = self._copies.get(x) if type(x) is Tensor else None
        if copy is None or copy.version != x._version or not copy.origin.unchanged:
            return None
        return copy

    def _seen_through(self, func: Callable[..., Any], given: list[Any]) -> None:
        """Leave copies alone of which more is asked than values; too late is an error."""
        for x in (x for x in given if type(x) is Tensor):
            for other, copy in self._copies.items():
                shared = _shared(x, other)
                if func in _OUT_OF_SIGHT:
                    shared = shared or _shared(x, copy.origin.logits)
                if not shared:
                    continue
                copy.origin.plain = True
                if copy.origin.used:
                    raise _too_late(func, copy.origin.logits)

    def _loss(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        """Return the loss of class indices, from the 16-bit logits; None where it is not that."""
        odd = size_average is not None or reduce is not None or label_smoothing != 0.0
        if odd or reduction not in ("mean", "sum", "none") or input.ndim < 2:
            return None
        if target.is_floating_point() or target.shape != (*input.shape[:1], *input.shape[2:]):
            return None  # torch says what is wrong
        if weight is not None and (weight.requires_grad or weight.shape != input.shape[1:2]):
            return None
        logits = self.narrowed(input)
        if logits is None:
            return None
        return cross_entropy(
            logits,
            target,
            group=None,
            rank=0,
            degree=1,
            vocab_size=input.shape[1],
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            wide=True,
            fused=True,
        )


_entered: list[NarrowLosses] = []


def entered() -> NarrowLosses | None:
    """Return the mode that the present step runs under, if there is one."""
    return _entered[-1] if _entered else None


def widens(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Say whether a call is ``x.float()`` or ``x.to(torch.float32)``, and no more than that."""
    if func is Tensor.float:
        return len(args) == 1 and not kwargs
    given = (*args[1:], *kwargs.values())
    return func is Tensor.to and len(given) == 1 and given[0] is torch.float32


def _suits(x: Tensor) -> bool:
    """Say whether ``x`` is a large 16-bit tensor under autograd alone."""
    if type(x) is not Tensor or x.dtype not in _NARROW or x.numel() < SMALLEST:
        return False
    transformed = peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    return x.requires_grad and not transformed


def _shared(x: Tensor, y: Tensor) -> bool:
    return bool(x.untyped_storage()._cdata == y.untyped_storage()._cdata)


def _too_late(func: Callable[..., Any], logits: Tensor) -> Nemo2Error:
    name = {Tensor.data.__get__: "data"}.get(func, func.__name__)  # type: ignore[attr-defined]
    return Nemo2Error(
        f"'{name}' of a float32 copy of logits of shape {tuple(logits.shape)}, or on the logits,"
        " after F.cross_entropy of the copy: with compile= the loss reads the 16-bit logits, so"
        " that the copy has no gradient and the logits must stay as they are\n"
        "  options: call it before the loss, which then is computed as it is written |"
        " compile=False"
    )

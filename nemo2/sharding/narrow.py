"""Losses of ``logits.float()`` that read the 16-bit logits, and keep nothing wider for backward.

Losses are written ``F.cross_entropy(logits.float(), labels)``. Autograd then keeps a float32 value
for each logit, and its gradient passes through float32 copies of all logits: the largest tensors of
many trainings. The last stage of a step runs under ``NarrowLosses``, which knows of each float32
copy whose it is. The copy is made all the same and any use of it is as ever. ``F.cross_entropy`` of
it is computed in float32 from the 16-bit logits, whose gradient it gives: the same numbers, but
that its gradient is rounded to 16 bits before that of other uses of the copy is added.
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
from ..pipeline.absent import name_of
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
# What asks for a tensor's gradient or its node, and for memory whose writes are not counted.
_GRADIENT = {"register_hook", "retain_grad", "grad_fn", "grad", "backward"}
_MEMORY = {"numpy", "__array__", "__dlpack__", "untyped_storage", "storage", "set_", "data.__set__"}


@dataclass
class _Origin:
    """The 16-bit logits that a float32 copy is of, and what they were when it was made."""

    logits: Tensor
    version: int
    memory: int
    node: Any
    plain: bool = False  # more is asked of the copy, or of the logits, than values
    used: bool = False  # a loss has read the logits in place of the copy

    @property
    def unchanged(self) -> bool:
        x = self.logits
        same = x._version == self.version and x.data_ptr() == self.memory
        return same and x.requires_grad and x.grad_fn is self.node


@dataclass(frozen=True)
class _Copy:
    """A float32 copy of 16-bit logits, or a view or part of one."""

    origin: _Origin
    version: int
    memory: int
    views: tuple[tuple[Callable[..., Tensor], tuple[Any, ...]], ...] = ()

    def narrow(self) -> Tensor:
        """Return the 16-bit logits that have the same values."""
        x = self.origin.logits
        for view, args in self.views:
            x = view(x, *args)
        return x


class NarrowLosses(Watcher):
    """The mode under which losses of float32 copies read the 16-bit logits.

    Args:
        fused: compile what a loss runs over all logits. Without it only losses that are computed by
            ``nemo2`` in any case are changed, as those of split logits: torch's own are faster.

    Raises: Nemo2Error where the user's code asks, after such a loss, for the gradient of the copy,
        or for memory of the logits whose writes torch does not count.
    """

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self._copies: Any = WeakTensorKeyDictionary()  # of each copy that the user still has
        self._read: list[_Origin] = []  # those that losses have read

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
        if self._copies or self._read:
            name = name_of(func)
            if name == "data" and self._concerns(args[0]):
                return args[0].detach()  # whose writes are counted, unlike those into ``x.data``
            if name in _GRADIENT or name in _MEMORY:
                self._note(name, tree_leaves((args, kwargs)))
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            copy = self._copied(func, args, kwargs, out)
            if copy is not None:
                self._copies[out] = copy
        return out

    def narrowed(self, x: Tensor) -> Tensor | None:
        """Return 16-bit logits with the values of ``x``, to which its gradient can go; or None.

        Once for each copy: what several losses add would else be added in 16 bits.
        """
        copy = self._known(x)
        if copy is None or copy.origin.plain or copy.origin.used:
            return None
        if not x.requires_grad or not torch.is_grad_enabled() or _is_transformed():
            return None
        if _top_saved_tensors_default_hooks(True) is not None:  # a checkpoint counts what is saved
            return None
        copy.origin.used = True
        self._read.append(copy.origin)
        return copy.narrow()

    def _copied(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, out: Tensor
    ) -> _Copy | None:
        """Return what ``out`` is a float32 copy of, if it is one or a view of one."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not out.requires_grad or _is_transformed():
            return None
        if widens(func, args, kwargs) and _suits(x):
            origin = _Origin(x, x._version, x.data_ptr(), x.grad_fn)
            return _Copy(origin, out._version, out.data_ptr())
        if func not in _VIEWS or kwargs:
            return None
        copy, given = self._known(x), _literals(args[1:])
        # A list as an index may take an element twice.
        given = None if func is Tensor.__getitem__ and _has_list(args[1]) else given
        if copy is None or given is None or copy.origin.plain:
            return None
        # Small parts would keep the memory of all logits.
        stored = copy.origin.logits.untyped_storage().nbytes() // copy.origin.logits.element_size()
        if 2 * out.numel() < stored:
            return None
        views = (*copy.views, (_VIEWS[func], given))
        return _Copy(copy.origin, out._version, out.data_ptr(), views)

    def _known(self, x: Tensor) -> _Copy | None:
        """Return what is known of ``x``, if neither it nor the logits were written to since."""
        copy: _Copy | None = self._copies.get(x) if type(x) is Tensor else None
        if copy is None or (copy.version, copy.memory) != (x._version, x.data_ptr()):
            return None
        return copy if copy.origin.unchanged else None

    def _concerns(self, x: Any) -> bool:
        """Say whether ``x`` shares memory with a copy, or with logits."""
        ours = [*self._copies.keys()]
        ours += [copy.origin.logits for copy in self._copies.values()]
        ours += [origin.logits for origin in self._read]
        return type(x) is Tensor and any(_shared(x, y) for y in ours)

    def _note(self, name: str, given: list[Any]) -> None:
        """Leave copies alone of which more is asked than values; too late is an error."""
        for x in (x for x in given if type(x) is Tensor):
            for other, copy in list(self._copies.items()):
                if _shared(x, other) or (name in _MEMORY and _shared(x, copy.origin.logits)):
                    copy.origin.plain = True
                    if copy.origin.used and name in _GRADIENT:
                        raise _too_late(name, copy.origin.logits)
            for origin in self._read if name in _MEMORY else ():
                if _shared(x, origin.logits):
                    raise _too_late(name, origin.logits)

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
    """Say whether ``x`` is a large 16-bit tensor with a gradient."""
    large = x.numel() >= SMALLEST and x.device.type != "meta"
    return type(x) is Tensor and x.dtype in _NARROW and x.requires_grad and large


def _is_transformed() -> bool:
    """Say whether a transform of torch.func, or forward-mode autograd, is running."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _literals(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return copies of a view's arguments that nothing can change; None if it has others."""
    kept: list[Any] = []
    for x in args:
        if isinstance(x, (tuple, list)):
            inner = _literals(tuple(x))
            if inner is None:
                return None
            kept.append(inner if isinstance(x, tuple) else list(inner))
        elif isinstance(x, slice):
            if any(type(y) not in (int, type(None)) for y in (x.start, x.stop, x.step)):
                return None
            kept.append(x)
        elif type(x) in (int, type(None), type(...)):
            kept.append(x)
        else:
            return None
    return tuple(kept)


def _has_list(x: Any) -> bool:
    """Say whether an index has a list in it."""
    return isinstance(x, list) or (isinstance(x, tuple) and any(map(_has_list, x)))


def _shared(x: Tensor, y: Tensor) -> bool:
    try:
        return bool(x.untyped_storage()._cdata == y.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or in a transform
        return False


def _too_late(name: str, logits: Tensor) -> Nemo2Error:
    return Nemo2Error(
        f"'{name}' of a float32 copy of logits of shape {tuple(logits.shape)}, or of the logits,"
        " after F.cross_entropy of the copy: with compile= the loss reads the 16-bit logits, so"
        " that the copy has no gradient and the logits must stay as they are\n"
        "  options: call it before the loss, which then is computed as it is written |"
        " compile=False"
    )

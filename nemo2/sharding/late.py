"""The mode that puts ``logits.float()`` off until something needs the wide values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..pipeline.absent import is_inplace, name_of
from .actions import Watcher
from .widened import Widened, put_off, widens

SMALLEST = 1 << 20  # elements; a smaller copy costs nothing that counts
_CASTS = (torch.bfloat16, torch.float16)


class LateWidening(Watcher):
    """Answers ``.float()`` of large 16-bit tensors by a ``Widened``, while a step is after blocks.

    Args:
        fused: whether losses of such tensors may be compiled.
    """

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.made: list[Widened] = []

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
        if widens(func, args, kwargs) and _suits(args[0]):
            self.made.append(put_off(args[0].contiguous(), fused=self.fused))
            return self.made[-1]
        if self.made and (is_inplace(name_of(func)) or "out" in kwargs):
            self._before_write(kwargs.get("out", args[0] if args else None))
        return func(*args, **kwargs)

    def _before_write(self, target: Any) -> None:
        """Make the wide values whose 16-bit ones a call is about to change."""
        for wide in self.made:
            if type(target) is Tensor and _memory(target) == _memory(wide.source):
                wide.whole()


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _suits(x: Any) -> bool:
    """Say whether ``x`` is a large 16-bit tensor, of which ``.float()`` makes a contiguous copy."""
    if type(x) is not Tensor or x.dtype not in _CASTS or x.ndim < 2 or x.shape[-1] < 16:
        return False
    if x.numel() < SMALLEST:
        return False
    strides = x.stride()
    return strides[-1] == 1 and list(strides) == sorted(strides, reverse=True)

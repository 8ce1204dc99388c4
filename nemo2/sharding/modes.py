"""The torch-function modes of ours, and how code that is not theirs to see is kept from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch._C import (
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode

from ..pipeline.absent import name_of


class Watcher(TorchFunctionMode):
    """A mode of ours that counts the torch calls of the user's code; see ``suspended``."""

    def opened(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a composite function so that this mode sees the calls that it is made of."""
        functional: Any = F
        check = functional.has_torch_function

        def unseen(tensors: Any) -> bool:
            functional.has_torch_function = check  # only the function's own, first question
            return False

        functional.has_torch_function = unseen
        try:
            with self:
                return func(*args, **kwargs)
        finally:
            functional.has_torch_function = check


def is_uncounted(func: Any) -> bool:
    """Say whether a call is none of a module's calls, which are known by their numbers.

    One marks a range for the profiler (FSDP's hooks make such). Others ask for what the tensors
    with which torch compiles answer themselves, so that there is no call.
    """
    name = name_of(func)
    return name in ("device", "layout") or name.startswith("_record_function")


COMPOSITE = (F.multi_head_attention_forward,)  # their parts have rules of their own


@contextmanager
def suspended() -> Iterator[None]:
    """Leave our own torch-function modes, and no others, for the time of a block or module."""
    removed = pause()
    try:
        yield
    finally:
        resume(removed)


def pause() -> list[TorchFunctionMode]:
    """Take our modes off the stack; returns the stack as it was, for ``resume``."""
    before: list[TorchFunctionMode] = []
    while _len_torch_function_stack():
        before.append(_pop_torch_function_stack())
    before.reverse()
    for mode in before:
        if not isinstance(mode, Watcher):
            _push_on_torch_function_stack(mode)
    return before


def resume(before: list[TorchFunctionMode]) -> None:
    """Put back what ``pause`` took off."""
    while _len_torch_function_stack():
        _pop_torch_function_stack()
    for mode in before:
        _push_on_torch_function_stack(mode)

"""Custom autograd functions while planning: their backward is the user's own, and unseen.

Inside ``forward`` of a ``torch.autograd.Function`` gradients are off, yet they flow through
its result. What its backward computes cannot be watched, so on split tensors only functions
made of calls that need nothing from the plan are let through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from .calls import Call, Decision, refuse


def check_function(call: Call, decision: Decision, functions: list[type]) -> None:
    """Refuse a call inside a custom function if its backward would have to communicate."""
    own = [f for f in functions if f is not CheckpointFunction]  # that one runs forward again
    if own and (decision.action is not None or decision.partial_params):
        raise refuse(
            call,
            f"in the autograd function {own[0].__name__} meets",
            "sequence_parallel=False, where it is the sequence that is split | torch calls in"
            " place of the function | annotate less of this module",
        )


@contextmanager
def watched_functions(functions: list[type]) -> Iterator[None]:
    """Keep in ``functions`` the custom functions that are running and that carry a gradient."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original.__func__(cls, *args, **kwargs)
        functions.append(cls)
        try:
            return original.__func__(cls, *args, **kwargs)
        finally:
            functions.pop()

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]

"""Activation checkpointing of blocks: their forward runs again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..errors import Nemo2Error
from ..pytree import tree_leaves
from .actions import Axes
from .kept import Kept
from .modes import Watcher, pause, resume


def recomputed(forward: Callable[..., Any], kind: str, axes: Axes) -> Callable[..., Any]:
    """Return the forward of a block that keeps less than ``forward`` for the backward.

    ``"full"`` keeps the inputs; ``"selective"`` also the results of matrix products, of
    row-split ones after their sum. The recomputation runs ``forward`` alone, no hooks of the
    block, with the block's own inputs, random state, autocast and torch-function modes. It
    stops when all that the backward needs is there.

    Communication: see ``communication.py``: what ``forward`` gathers, exchanges and (``"full"``)
    sums before its last call that saves something for backward, a second time in backward.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        _refuse_caches((args, kwargs))
        modes = _foreign_modes()
        kept = Kept() if kind == "selective" else None
        second = _inside(axes, kept, modes, again=True)
        first = [_inside(axes, kept, None, again=False)]

        def body(*given: Any) -> Any:
            # Entered here: torch leaves what context_fn gives it open when the forward raises.
            with first.pop() if first else nullcontext():
                return forward(*given, **kwargs)

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), second

        return checkpoint(body, *args, use_reentrant=False, context_fn=contexts)

    return run


@contextmanager
def _inside(
    axes: Axes,
    kept: Kept | None,
    modes: list[TorchFunctionMode] | None,
    *,
    again: bool,
) -> Iterator[None]:
    """Run a block, or run it again: what one run remembers the other must not see."""
    before = [list(axis.kept) for axis in axes.values()]
    stack = pause()
    resume(stack if modes is None else modes)
    _forget(axes)
    for axis in axes.values():
        axis.kept[:] = [] if kept is None else [kept]
    if kept is not None:
        kept.again = again
    try:
        with nullcontext() if kept is None else kept.mode():
            yield
    finally:
        for axis, own in zip(axes.values(), before, strict=True):
            axis.kept[:] = own
        _forget(axes)
        resume(stack)


def _forget(axes: Axes) -> None:
    for axis in axes.values():
        axis.entered.clear()


def _refuse_caches(given: Any) -> None:
    """Refuse what the recomputation would change a second time: caches of Hugging Face models."""
    if any(hasattr(x, "get_seq_length") for x in tree_leaves(given)):
        raise Nemo2Error(
            "remat runs each block a second time, and this one fills a cache of keys and values\n"
            "  options: model.config.use_cache = False for training | remat=None"
        )


def _foreign_modes() -> list[TorchFunctionMode]:
    """Return the torch-function modes that are not ours, outermost first."""
    stack = pause()
    resume(stack)
    return [mode for mode in stack if not isinstance(mode, Watcher)]

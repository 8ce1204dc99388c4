"""Activation checkpointing of blocks: their forward runs again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..errors import Nemo2Error
from ..pipeline.absent import is_absent
from ..pytree import tree_leaves
from .actions import Axes
from .kept import Kept, version_of
from .modes import Watcher, pause, resume


def recomputed(block: nn.Module, buffers: Buffers, kind: str, axes: Axes) -> Callable[..., Any]:
    """Return a forward of ``block`` that keeps less than its own for the backward.

    ``"full"`` keeps the inputs; ``"selective"`` also the results of matrix products, of
    row-split ones after their sum. The recomputation runs the forward alone, no hooks of the
    block, with the block's own inputs, random state, autocast and torch-function modes, and with
    buffers as they were: what it writes into them is dropped. It stops when all that the
    backward needs is there.

    Communication: see ``communication.py``: what the forward gathers, exchanges and (``"full"``)
    sums before its last call that saves something for backward, a second time in backward.
    """
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        _refuse_caches((args, kwargs))
        modes = _foreign_modes()
        kept = Kept() if kind == "selective" else None
        before = buffers.snapshot()
        second = _again(before, axes, kept, modes)
        first = [_inside(axes, kept, None, again=False)]

        def body(*given: Any) -> Any:
            # Entered here: torch leaves what context_fn gives it open when the forward raises.
            if not first:
                return forward(*given, **kwargs)
            with first.pop():
                out = forward(*given, **kwargs)
            buffers.compare(before)
            return out

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), second

        return checkpoint(body, *args, use_reentrant=False, context_fn=contexts)

    return run


@contextmanager
def _again(
    before: Snapshot, axes: Axes, kept: Kept | None, modes: list[TorchFunctionMode]
) -> Iterator[None]:
    with before.put_back(), _inside(axes, kept, modes, again=True):
        yield


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


class Snapshot(dict[tuple[int, str], tuple[Tensor, int, Tensor | None]]):
    """Buffers before a run of a block: by place the tensor, its version, and a copy if any."""

    def __init__(self, holders: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self._holders = holders

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Let the block read them for a time, and write into copies."""
        now = {place: self._holders[place[0]][place[1]] for place in self}
        for (i, name), (tensor, _, copy) in self.items():
            self._holders[i][name] = tensor if copy is None else copy
        try:
            yield
        finally:
            for (i, name), tensor in now.items():
                self._holders[i][name] = tensor


class Buffers:
    """The buffers of a block, and which of them its forward writes into."""

    def __init__(self, name: str, block: nn.Module) -> None:
        self._name = name
        self._holders = [module._buffers for module in block.modules()]
        self._written: set[tuple[int, str]] | None = None  # not known before the first run

    def snapshot(self) -> Snapshot:
        """Return what a run may change; in the first run that is all, for as long as it takes."""
        found = Snapshot(self._holders)
        for i, held in enumerate(self._holders):
            for name, x in held.items():
                if isinstance(x, Tensor) and not is_absent(x):
                    known = self._written is not None and (i, name) not in self._written
                    found[i, name] = x, version_of(x), None if known else x.detach().clone()
        return found

    def compare(self, before: Snapshot) -> None:
        """Keep of a snapshot what the run has changed."""
        for place, (tensor, version, copy) in list(before.items()):
            i, name = place
            if version_of(tensor) == version and self._holders[i][name] is tensor:
                del before[place]
            elif version_of(tensor) != version and copy is None:
                raise Nemo2Error(
                    f"remat: block '{self._name}' writes into its buffer '{name}' in some calls"
                    " only, so that it cannot run again as it did\n"
                    f"  options: assign self.{name} instead of writing into it | remat=None"
                )
        self._written = (self._written or set()) | {*before}


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

"""Whether a step may run different blocks on different ranks, seen while it is planned."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

_READS = {"__bool__", "__contains__", "__float__", "__index__", "__int__", "allclose", "equal"}
_READS |= {"is_nonzero", "item", "masked_select", "nonzero", "numpy", "tolist", "unique"}


class SkipWatch(TorchFunctionMode):
    """Notes whether a step reads values before it has called all blocks, outside of blocks.

    Only then can it skip blocks by the values of its batch. What ranks do until the first read
    is the same, so they agree about it.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.may_skip = False
        self._blocks = blocks
        self._called: set[int] = set()
        self._inside = 0
        self._read = False
        self._hooks = ExitStack()

    def __enter__(self) -> SkipWatch:
        for block in self._blocks:
            for handle in (
                block.register_forward_pre_hook(self._enter_block),
                block.register_forward_hook(self._leave_block),
            ):
                self._hooks.callback(handle.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self._read and not self._inside and getattr(func, "__name__", "") in _READS:
            self._read = True
            self.may_skip = len(self._called) < len(self._blocks)
        return func(*args, **(kwargs or {}))

    def _enter_block(self, block: nn.Module, args: Any) -> None:
        self._called.add(id(block))
        self._inside += 1

    def _leave_block(self, block: nn.Module, args: Any, output: Any) -> None:
        self._inside -= 1

"""Mixed precision of parameters that FSDP2 does not manage: low-precision copies of masters.

A run computes on copies that are cast once a step. After each backward that reaches a copy its
gradient is added to the master's, in the master's dtype; so microbatches are summed and ranks
reduced in float32. FSDP2 does the same for what it splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def compute_copy(master: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """Return what a run computes with for ``master``: itself, or a copy in another dtype.

    A copy has memory while ``filled`` only, and never keeps a gradient: it goes to ``master``.
    """
    if master.dtype == dtype:
        return master
    copy = nn.Parameter(
        torch.empty(0, dtype=dtype, device=master.device), requires_grad=master.requires_grad
    )
    if not copy.requires_grad:  # for good: what was frozen when the model was split stays so
        return copy

    def hand_on(copy: Tensor) -> None:  # keeps no reference: Python would not see the cycle
        grad, copy.grad = copy.grad, None
        assert grad is not None
        if master.grad is None:
            master.grad = grad.to(master.dtype)
        else:
            master.grad.add_(grad)

    leaf: Any = copy  # untyped upstream
    leaf.register_post_accumulate_grad_hook(hand_on)
    return copy


@contextmanager
def filled(pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> Iterator[None]:
    """Give each copy of (master, copy) the master's present value for the time of a run."""
    copies = [(master, copy) for master, copy in pairs if copy is not master]
    for master, copy in copies:
        copy.data = master.detach().to(copy.dtype)
    try:
        yield
    finally:
        for _, copy in copies:
            copy.grad, copy.data = None, copy.new_empty(0)

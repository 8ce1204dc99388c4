"""Forwards that take the place of a module's own under tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _len_torch_function_stack

from ..sharding.actions import Action, rowwise_linear, run_action, suspended, vary_once
from ..sharding.collectives import Axis
from .absent import is_absent, resolve


def quiet_forward(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that its caller's script does not count."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            return original(*args, **kwargs)

    return forward


def plain_forward(
    module: nn.Module, original: Callable[..., Any], action: Action, axis: Axis
) -> Callable[..., Any]:
    """Return the planned forward of an ``nn.Linear`` or ``nn.Embedding``."""
    local = _on_local_tensors(module, action, axis)

    def planned(x: Tensor) -> Any:
        x = resolve(x)
        if is_absent(module.weight) or is_absent(x):
            return original(x)
        return local(x)

    def forward(input: Tensor) -> Any:
        if not _len_torch_function_stack():
            return planned(input)
        with suspended():
            return planned(input)

    return forward


def _on_local_tensors(module: Any, action: Action, axis: Axis) -> Callable[[Tensor], Any]:
    vary_alone = action.kind == "call" and [f.steps for f in action.fixes] == [(("vary", None),)]
    if vary_alone and isinstance(module, nn.Linear):

        def local(x: Tensor) -> Any:
            return F.linear(vary_once(x, axis), module.weight, module.bias)

    elif action.kind == "rowwise" and not action.fixes:

        def local(x: Tensor) -> Any:
            return rowwise_linear(x, module.weight, module.bias, axis)

    elif isinstance(module, nn.Linear):

        def local(x: Tensor) -> Any:
            return run_action(action, axis, F.linear, (x, module.weight, module.bias), {})

    else:

        def local(x: Tensor) -> Any:
            norm = (module.max_norm, module.norm_type, module.scale_grad_by_freq)
            args = (x, module.weight, module.padding_idx, *norm, module.sparse)
            return run_action(action, axis, F.embedding, args, {})

    return local

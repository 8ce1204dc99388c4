"""Forwards that take the place of a module's own under tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _len_torch_function_stack

from ..errors import PipelineError
from ..pytree import tree_flatten, tree_unflatten
from ..sharding.actions import (
    Action,
    Axes,
    apply_steps,
    enter_once,
    rowwise_linear,
    run_action,
)
from ..sharding.dropout import count
from ..sharding.modes import suspended
from ..trace import Entry
from .absent import is_absent, resolve


def quiet_forward(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that its caller's script does not count."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            return original(*args, **kwargs)

    return forward


def relay(tree: Any, entries: Sequence[Entry], axes: Axes) -> Any:
    """Change the layout of leaves of ``tree``; absent ones stay as they are."""
    leaves, spec = tree_flatten(tree)
    for entry in entries:
        x = resolve(leaves[entry.leaf])
        if not is_absent(x):
            leaves[entry.leaf] = apply_steps(x, entry.steps, axes)
    return tree_unflatten(spec, leaves)


def edged_forward(
    module: nn.Module,
    original: Callable[..., Any],
    entries: Sequence[Entry],
    exits: Sequence[Entry],
    axes: Axes,
    closed: tuple[tuple[int, ...], torch.dtype] | None = None,
) -> Callable[..., Any]:
    """Return a forward that changes the layout of what the module gets and returns.

    ``closed``: the shape and dtype that it must return, where its code was not planned.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            if entries:
                args, kwargs = relay((args, kwargs), entries, axes)
            out = original(*args, **kwargs)
            if closed is not None:
                _check_closed(module, out, closed)
            return relay(out, exits, axes) if exits else out

    return forward


def _check_closed(module: nn.Module, out: Any, planned: tuple[Any, torch.dtype]) -> None:
    """Raise when code that was not planned does what the plan could not know."""
    found = (tuple(out.shape), out.dtype) if isinstance(out, Tensor) else type(out).__name__
    if found != planned:
        raise PipelineError(
            f"{type(module).__name__} reads values, so what it returns was taken to be one tensor"
            f" like its first input, {planned}; it returns {found}\n"
            "  options: put the part that reads values into a module of its own that returns one"
            " tensor like its input | write it without reading values"
        )
    for owner in module.modules():
        for name, x in owner.__dict__.items():
            kept = x if isinstance(x, (list, tuple)) else (x,)
            if any(isinstance(y, Tensor) and y.grad_fn is not None for y in kept):
                raise PipelineError(
                    f"{type(owner).__name__} reads values, and keeps one with a gradient in its"
                    f" attribute '{name}', which the plan could not see\n"
                    "  options: write it without reading values | keep x.detach()"
                )


def plain_forward(
    module: nn.Module, original: Callable[..., Any], action: Action, axes: Axes
) -> Callable[..., Any]:
    """Return the planned forward of an ``nn.Linear``, an ``nn.Embedding`` or a dropout module."""
    if action.kind == "dropout":
        return _dropout_forward(module, original, action, axes)
    local = _on_local_tensors(module, action, axes)

    def planned(x: Tensor) -> Any:
        x = resolve(x)
        if is_absent(module.weight) or is_absent(x):
            return original(x)
        return local(x)

    return _uncounted(planned)


def _uncounted(planned: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Return a forward of one argument that its caller's script does not count."""

    def forward(input: Tensor) -> Any:
        if not _len_torch_function_stack():
            return planned(input)
        with suspended():
            return planned(input)

    return forward


def _dropout_forward(
    module: Any, original: Callable[..., Any], action: Action, axes: Axes
) -> Callable[..., Any]:
    function = getattr(F, action.name)

    def planned(x: Tensor) -> Any:
        x = resolve(x)
        if is_absent(x):
            count(action.value)
            return original(x)
        inplace = module.inplace and not isinstance(module, nn.AlphaDropout)
        args = (x, module.p, module.training, inplace)
        return run_action(action, axes, function, args, {})

    return _uncounted(planned)


def _on_local_tensors(module: Any, action: Action, axes: Axes) -> Callable[[Tensor], Any]:
    tp = axes["tp"]
    steps = [step for fix in action.fixes for step in fix.steps]
    of_input = [fix.leaves for fix in action.fixes] == [(0,)]  # a weight may vary as well
    enters = len(steps) == 1 and steps[0][:2] in (("vary", "tp"), ("gather_vary", "tp"))
    enters = enters and of_input
    if action.kind == "call" and enters and isinstance(module, nn.Linear):
        layout = steps[0][2]

        def local(x: Tensor) -> Any:
            return F.linear(enter_once(x, layout, tp), module.weight, module.bias)

    elif action.kind == "rowwise" and not action.fixes:

        def local(x: Tensor) -> Any:
            return rowwise_linear(x, module.weight, module.bias, action, axes)

    elif isinstance(module, nn.Linear):

        def local(x: Tensor) -> Any:
            return run_action(action, axes, F.linear, (x, module.weight, module.bias), {})

    else:

        def local(x: Tensor) -> Any:
            norm = (module.max_norm, module.norm_type, module.scale_grad_by_freq)
            args = (x, module.weight, module.padding_idx, *norm, module.sparse)
            return run_action(action, axes, F.embedding, args, {})

    return local

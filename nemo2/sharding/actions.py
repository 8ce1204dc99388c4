"""What the plan asks of one torch call, and the mode that carries it out.

The plan sees every torch call with its *global* meaning. Where the local run of the same
call needs more (a collective, a local size, this rank's part of an operand) the plan holds
an ``Action``. Actions of plain ``nn.Linear`` and ``nn.Embedding`` modules are installed as
their forward; all others run under ``Emulate``, entered only for the modules that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import (
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)
from torch.overrides import TorchFunctionMode

from ..errors import Nemo2Error
from ..pipeline.absent import is_absent, name_of, user_line
from ..pytree import tree_flatten, tree_leaves, tree_unflatten
from . import collectives
from .collectives import Axis
from .cross_entropy import cross_entropy


@dataclass(frozen=True)
class Fix:
    """Bring one operand to the layout that the call needs.

    ``steps`` are ``("gather", dim)``, ``("split", dim)``, ``("vary", None)``,
    ``("select", (dim, ratio))`` or ``("repeat", (dim, ratio))``, applied in order to the
    leaves ``leaves`` of the flattened ``(args, kwargs)``.
    """

    leaves: tuple[int, ...]
    steps: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Action:
    """How one torch call runs on local tensors.

    ``soft`` actions only replace sizes: they are not needed where the module computes the
    same local sizes by itself, which the plan proves by a second run on local shapes.
    """

    name: str
    kind: str = "call"
    fixes: tuple[Fix, ...] = ()
    value: Any = None
    soft: bool = False


def apply_steps(x: Tensor, steps: tuple[tuple[str, Any], ...], axis: Axis) -> Tensor:
    for step, arg in steps:
        if step == "gather":
            x = collectives.gather(x, arg, axis)
        elif step == "split":
            x = collectives.split(x, arg, axis)
        elif step == "vary":
            x = vary_once(x, axis)
        elif step == "repeat":
            x = x.repeat_interleave(arg[1], dim=arg[0])
        elif step == "select":
            dim, ratio = arg
            x = _select_heads(collectives.vary(x, axis), dim, ratio, axis)
        else:
            raise AssertionError(step)
    return x


def vary_once(x: Tensor, axis: Axis) -> Tensor:
    """Enter the tensor-parallel region once for the calls that share the input ``x``.

    Query, key and value projections of one input share one copy, so that their input
    gradients are added before the one all-reduce.
    """
    if not x.requires_grad or not torch.is_grad_enabled():
        return x
    seen = axis.varied
    if seen and seen[0] is x and seen[2] == x._version:
        known: Tensor = seen[1]
        return known
    out = collectives.vary(x, axis)
    seen[:] = [x, out, x._version]
    return out


def _select_heads(x: Tensor, dim: int, ratio: int, axis: Axis) -> Tensor:
    """Take the key or value heads that this rank's query heads attend to.

    ``ratio`` query heads share one key head; this rank holds ``ratio * heads / degree``.
    """
    heads = x.shape[dim]
    queries = heads * ratio // axis.degree
    first, last = axis.rank * queries // ratio, ((axis.rank + 1) * queries - 1) // ratio
    return x.narrow(dim, first, last - first + 1)


def run_action(action: Action, axis: Axis, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run one call on local tensors as ``action`` says."""
    if action.kind == "constant":
        return action.value
    if action.fixes:
        leaves, spec = tree_flatten((args, kwargs))
        for fix in action.fixes:
            value = apply_steps(leaves[fix.leaves[0]], fix.steps, axis)
            for i in fix.leaves:
                leaves[i] = value
        args, kwargs = tree_unflatten(spec, leaves)
    return _KINDS[action.kind](action, axis, func, args, kwargs)


def _call(action: Action, axis: Axis, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _identity(action: Action, axis: Axis, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return args[0]


def _reshape(action: Action, axis: Axis, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return args[0].reshape(action.value)


def _expand(action: Action, axis: Axis, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return args[0].expand(action.value)


def _constructor(
    action: Action, axis: Axis, func: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Run ``zeros_like`` and its kin on a tensor of the global shape, without its memory."""
    leaves, spec = tree_flatten((args, kwargs))
    first = next(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
    leaves[first] = leaves[first].detach().new_empty(()).expand(action.value)
    args, kwargs = tree_unflatten(spec, leaves)
    return func(*args, **kwargs)


def _partial(action: Action, axis: Axis, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    out = collectives.reduce(func(*args, **kwargs), axis)
    return out / axis.degree if action.value == "mean" else out


def _rowwise(action: Action, axis: Axis, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Matmul over a split inner dim: sum the partial products, then add the bias once."""
    if action.value == "linear":
        x, weight, bias = bind_linear(*args, **kwargs)
        return rowwise_linear(x, weight, bias, axis)
    return _rowwise_addmm(axis, *args, **kwargs)


def _rowwise_addmm(
    axis: Axis, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    out = collectives.reduce(torch.mm(mat1, mat2), axis) * alpha
    return out + (input * beta).to(out.dtype)


def bind_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def rowwise_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
    out = collectives.reduce(F.linear(x, weight), axis)
    return out if bias is None else out + bias.to(out.dtype)  # dtypes differ under autocast


def _embedding(action: Action, axis: Axis, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    bound = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | kwargs
    return vocab_embedding(bound["input"], bound["weight"], bound.get("padding_idx"), axis)


def vocab_embedding(ids: Tensor, weight: Tensor, padding_idx: int | None, axis: Axis) -> Tensor:
    """Look up ids in a table split over its rows: rows of other ranks count as zero, then sum.

    Communication: forward one all-reduce of the output over ``axis``; backward none.
    """
    rows = weight.shape[0]
    local = ids - axis.rank * rows
    here = (local >= 0) & (local < rows)
    if padding_idx is not None:
        if padding_idx < 0:
            padding_idx += rows * axis.degree
        padding_idx -= axis.rank * rows
        padding_idx = padding_idx if 0 <= padding_idx < rows else None
    out = F.embedding(local.clamp(0, rows - 1), weight, padding_idx)
    return collectives.reduce(out.masked_fill(~here.unsqueeze(-1), 0.0), axis)


def _cross_entropy(
    action: Action, axis: Axis, func: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    names = (
        "input",
        "target",
        "weight",
        "size_average",
        "ignore_index",
        "reduce",
        "reduction",
        "label_smoothing",
    )
    bound = dict(zip(names, args, strict=False)) | kwargs
    return cross_entropy(
        bound["input"],
        bound["target"],
        group=axis.group,
        rank=axis.rank,
        degree=axis.degree,
        vocab_size=action.value,
        weight=bound.get("weight"),
        ignore_index=bound.get("ignore_index", -100),
        reduction=bound.get("reduction", "mean"),
        label_smoothing=bound.get("label_smoothing", 0.0),
    )


_KINDS: Mapping[str, Callable[..., Any]] = {
    "call": _call,
    "identity": _identity,
    "reshape": _reshape,
    "constructor": _constructor,
    "expand": _expand,
    "partial": _partial,
    "rowwise": _rowwise,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
}


@dataclass(frozen=True)
class Script:
    """The calls of one module's forward that need an action, by their running number."""

    module: str
    calls: tuple[str, ...]
    actions: Mapping[int, Action]
    captures: Mapping[int, tuple[Any, ...]]


class Watcher(TorchFunctionMode):
    """A mode of ours that counts the torch calls of the user's code; see ``suspended``."""


class Emulate(Watcher):
    """Run a module's own code on local tensors while it sees global sizes.

    Every torch call of the module's forward is counted; a call with an action is carried
    out by it. Calls on tensors of another stage pass untouched.
    """

    def __init__(
        self, script: Script, axis: Axis | None, capture: Callable[[Any, Any], None] | None = None
    ) -> None:
        super().__init__()
        self.script, self.axis, self.capture, self.count = script, axis, capture, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        number = self.count
        self.count += 1
        kwargs = kwargs or {}
        if number >= len(self.script.calls) or self.script.calls[number] != name_of(func):
            raise self._other_path(number, name_of(func))
        action = self.script.actions.get(number)
        out = func(*args, **kwargs) if action is None else self._act(action, func, args, kwargs)
        keys = self.script.captures.get(number)
        if keys is not None and self.capture is not None:
            for leaf, key in keys:
                self.capture(key, tree_leaves(out)[leaf])
        return out

    def check_complete(self) -> None:
        """Raise when the code ended before all planned calls were made."""
        if self.count < len(self.script.calls):
            raise self._other_path(self.count, "the end")

    def _other_path(self, number: int, name: str) -> Nemo2Error:
        calls = self.script.calls
        planned = f"'{calls[number]}'" if number < len(calls) else "none"
        where = f"the forward of '{self.script.module}'" if self.script.module else "the step"
        return Nemo2Error(
            f"{where} took another path than when it was planned:"
            f" torch call {number} was {planned}, now it is '{name}'{user_line()}\n"
            "  options: make the path depend only on shapes and on train/eval"
        )

    def _act(self, action: Action, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if any(is_absent(x) and x.bound is None for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if self.axis is None:
            raise AssertionError("an action without a tensor-parallel axis")
        return run_action(action, self.axis, func, args, kwargs)


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

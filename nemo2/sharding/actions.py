"""What the plan asks of one torch call, and the mode that carries it out.

The plan sees every torch call with its *global* meaning. Where the local run of the same
call needs more (a collective, a local size, this rank's part of an operand) the plan holds
an ``Action``. Actions of plain ``nn.Linear`` and ``nn.Embedding`` modules are installed as
their forward; all others run under ``Emulate``, entered only for the modules that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Nemo2Error
from ..pipeline.absent import is_absent, name_of, user_line
from ..pytree import tree_flatten, tree_leaves, tree_unflatten
from . import collectives, tracing
from .attention import context_attention
from .collectives import Axis
from .cross_entropy import cross_entropy
from .dropout import Site, count, is_dropout, run_dropout
from .layout import Layout
from .modes import COMPOSITE, Watcher, is_uncounted
from .narrow import entered

Axes = Mapping[str, Axis]


@dataclass(frozen=True)
class Fix:
    """Bring one operand to the layout that the call needs.

    ``steps`` are (name, axis, argument), applied in order to the leaves ``leaves`` of the
    flattened ``(args, kwargs)``: ``gather``, ``gather_vary`` and ``split`` with a ``Layout``,
    ``vary``, and ``select`` or ``repeat`` with ``(dim, ratio)``.
    """

    leaves: tuple[int, ...]
    steps: tuple[tuple[str, str, Any], ...]


@dataclass(frozen=True)
class Action:
    """How one torch call runs on local tensors.

    ``soft`` actions only replace sizes: they are not needed where the module computes the
    same local sizes by itself, which the plan proves by a second run on local shapes.
    ``scatter``: how a sum over ``tp`` leaves its result split, or None.
    """

    name: str
    kind: str = "call"
    fixes: tuple[Fix, ...] = ()
    value: Any = None
    soft: bool = False
    scatter: Layout | None = None


def apply_steps(x: Tensor, steps: tuple[tuple[str, str, Any], ...], axes: Axes) -> Tensor:
    for step, name, arg in steps:
        axis = axes[name]
        if step == "gather":
            x = collectives.gather(x, arg, axis)
        elif step == "gather_vary":
            x = enter_once(x, arg, axis)
        elif step == "split":
            x = collectives.split(x, arg, axis)
        elif step == "vary":
            x = enter_once(x, None, axis)
        elif step == "repeat":
            x = x.repeat_interleave(arg[1], dim=arg[0])
        elif step == "select":
            dim, ratio = arg
            x = _select_heads(collectives.vary(x, axis), dim, ratio, axis)
        else:
            raise AssertionError(step)
    return x


def enter_once(x: Tensor, layout: Layout | None, axis: Axis) -> Tensor:
    """Enter the tensor-parallel region once for the calls that share the input ``x``.

    Query, key and value projections of one input share one copy (or one gather, where ``x`` is
    split as ``layout``), so that their input gradients are added before the one reduction.
    """
    grad = x.requires_grad and torch.is_grad_enabled()
    if layout is None and not grad:
        return x
    version = None if tracing.current() else x._version  # a traced tensor has none
    seen, key = axis.entered, (layout, version, grad)
    if seen and seen[0] is x and seen[2] == key:
        known: Tensor = seen[1]
        return known
    if layout is None:
        out = collectives.vary(x, axis)
    else:
        out = collectives.gather(x, layout, axis, varies=True)
    seen[:] = [x, out, key]
    return out


def _select_heads(x: Tensor, dim: int, ratio: int, axis: Axis) -> Tensor:
    """Take the key or value heads that this rank's query heads attend to.

    ``ratio`` query heads share one key head; this rank holds ``ratio * heads / degree``.
    """
    heads = x.shape[dim]
    queries = heads * ratio // axis.degree
    first, last = axis.rank * queries // ratio, ((axis.rank + 1) * queries - 1) // ratio
    return x.narrow(dim, first, last - first + 1)


def run_action(action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run one call on local tensors as ``action`` says."""
    if action.kind == "constant":
        return action.value
    if action.fixes:
        leaves, spec = tree_flatten((args, kwargs))
        for fix in action.fixes:
            value = apply_steps(leaves[fix.leaves[0]], fix.steps, axes)
            for i in fix.leaves:
                leaves[i] = value
        args, kwargs = tree_unflatten(spec, leaves)
    return _KINDS[action.kind](action, axes, func, args, kwargs)


def _call(action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _identity(action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return args[0]


def _reshape(action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return args[0].reshape(action.value)


def _expand(action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return args[0].expand(action.value)


def _pieces(action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    dim, ranges, single = action.value
    parts = tuple(args[0].narrow(dim, start, length) for start, length in ranges)
    return parts[0] if single else parts


def _constructor(
    action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Run ``zeros_like`` and its kin on a tensor of the global shape, without its memory."""
    leaves, spec = tree_flatten((args, kwargs))
    first = next(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
    leaves[first] = leaves[first].detach().new_empty(()).expand(action.value)
    args, kwargs = tree_unflatten(spec, leaves)
    return func(*args, **kwargs)


def total(x: Tensor, action: Action, axis: Axis) -> Tensor:
    """Sum the partial results of an action over ``axis``; over tp they may stay split."""
    if action.scatter is None or axis.name != "tp":
        return collectives.reduce(x, axis)
    return collectives.scatter(x, action.scatter, axis)


def _total_of(product: Callable[[], Tensor], action: Action, axes: Axes) -> Tensor:
    """Sum a partial product over its axes, or take the sum that a checkpoint has kept."""
    over = [axes[name] for name in action.value[1]]

    def summed(x: Tensor) -> Tensor:
        for axis in over:
            x = total(x, action, axis)
        return x

    if not over[0].kept:
        return summed(product())
    return over[0].kept[0].summed(product, summed)


def _partial(action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    how, over = action.value
    for name in over:
        out = total(out, action, axes[name])
        out = out / axes[name].degree if how == "mean" else out
    return out


def _rowwise(action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Matmul over a split inner dim: sum the partial products, then add the bias once."""
    if action.value[0] == "linear":
        return rowwise_linear(*bind_linear(*args, **kwargs), action, axes)
    return _rowwise_addmm(action, axes, *args, **kwargs)


def _rowwise_addmm(
    action: Action,
    axes: Axes,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    out = _total_of(lambda: torch.mm(mat1, mat2), action, axes) * alpha
    return out + (input * beta).to(out.dtype)


def bind_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def rowwise_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, action: Action, axes: Axes
) -> Tensor:
    out = _total_of(lambda: F.linear(x, weight), action, axes)
    return out if bias is None else out + bias.to(out.dtype)  # dtypes differ under autocast


def _embedding(action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    bound = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | kwargs
    out = vocab_embedding(bound["input"], bound["weight"], bound.get("padding_idx"), axes["tp"])
    return total(out, action, axes["tp"])


def vocab_embedding(ids: Tensor, weight: Tensor, padding_idx: int | None, axis: Axis) -> Tensor:
    """Look up ids in a table split over its rows: rows of other ranks count as zero.

    Returns:
        this rank's part, to be summed over ``axis``.

    Raises: IndexError for an index out of range; on a GPU an assertion there, as torch does.
    """
    rows = weight.shape[0]
    total_rows = rows * axis.degree
    inside = ((ids >= 0) & (ids < total_rows)).all()
    try:  # a plain assert would wait for the GPU
        torch._assert_async(inside, f"embedding: an index is not in [0, {total_rows})")
    except RuntimeError as error:
        if ids.is_cuda:  # there it is an earlier failure that comes to light
            raise
        raise IndexError(str(error)) from None  # as one device does
    local = ids - axis.rank * rows
    here = (local >= 0) & (local < rows)
    if padding_idx is not None:
        if padding_idx < 0:
            padding_idx += rows * axis.degree
        padding_idx -= axis.rank * rows
        padding_idx = padding_idx if 0 <= padding_idx < rows else None
    out = F.embedding(local.clamp(0, rows - 1), weight, padding_idx)
    return out.masked_fill(~here.unsqueeze(-1), 0.0)


def _cross_entropy(
    action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any
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
    classes, tokens = action.value
    whole = classes is None
    logits, losses = bound["input"], entered()
    narrow = losses.narrowed(logits) if losses is not None else None
    logits = logits if narrow is None else narrow
    return cross_entropy(
        logits,
        bound["target"],
        group=None if whole else axes["tp"].group,
        rank=0 if whole else axes["tp"].rank,
        degree=1 if whole else axes["tp"].degree,
        vocab_size=logits.shape[1 if logits.ndim > 1 else 0] if whole else classes,
        weight=bound.get("weight"),
        ignore_index=bound.get("ignore_index", -100),
        reduction=bound.get("reduction", "mean"),
        label_smoothing=bound.get("label_smoothing", 0.0),
        tokens=tuple((axes[name], layout) for name, layout in tokens),
        wide=narrow is not None,
        fused=losses is not None and losses.fused,
    )


def _attention(action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return context_attention(*args, **kwargs, axis=axes["cp"], method=action.value)


def _dropout(action: Action, axes: Axes, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return run_dropout(action.value, axes, action.name, func, args, kwargs)


_KINDS: Mapping[str, Callable[..., Any]] = {
    "call": _call,
    "identity": _identity,
    "reshape": _reshape,
    "constructor": _constructor,
    "expand": _expand,
    "pieces": _pieces,
    "partial": _partial,
    "rowwise": _rowwise,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "attention": _attention,
    "dropout": _dropout,
}


@dataclass(frozen=True)
class Script:
    """The calls of one module's forward that need an action, by their running number."""

    module: str
    calls: tuple[str, ...]
    actions: Mapping[int, Action]
    captures: Mapping[int, tuple[Any, ...]]

    @property
    def only_draws(self) -> bool:
        """Whether all that it changes is where dropout gets its numbers."""
        return not self.captures and all(a.kind == "dropout" for a in self.actions.values())


class Emulate(Watcher):
    """Run a module's own code on local tensors while it sees global sizes.

    Every torch call of the module's forward is counted; a call with an action is carried
    out by it. Calls on tensors of another stage pass untouched.
    """

    def __init__(
        self, script: Script, axes: Axes, capture: Callable[[Any, Any], None] | None = None
    ) -> None:
        super().__init__()
        self.script, self.axes, self.capture, self.count = script, axes, capture, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITE:
            return self.opened(func, args, kwargs)
        if is_uncounted(func):
            return func(*args, **kwargs)
        number = self.count
        self.count += 1
        if number >= len(self.script.calls) or not _alike(self.script.calls[number], name_of(func)):
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
            if isinstance(action.value, Site):
                count(action.value)
            return func(*args, **kwargs)
        return run_action(action, self.axes, func, args, kwargs)


_CASTS = ("float", "double", "half", "bfloat16")  # verify turns some into others
# While a block is compiled, torch's functional tensors turn each of these into a call of ``to``.
_CONVERSIONS = (*_CASTS, "bool", "byte", "char", "int", "long", "cpu", "cuda")


def _alike(planned: str, name: str) -> bool:
    if planned == name or (planned in _CASTS and name in _CASTS):
        return True
    return planned in _CONVERSIONS and name == "to" and tracing.current() is not None


class Keyed(Emulate):
    """Run a module of which only the dropout calls are planned, whatever path its code takes."""

    def __init__(self, script: Script, axes: Axes) -> None:
        super().__init__(script, axes)
        calls = (i for i, name in enumerate(script.calls) if is_dropout(name))
        self.planned = [script.actions.get(i) for i in calls]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITE:
            return self.opened(func, args, kwargs)
        if not is_dropout(name_of(func)):
            return func(*args, **kwargs)
        action = self.planned[self.count] if self.count < len(self.planned) else None
        self.count += 1
        if action is None or action.name != name_of(func):
            return func(*args, **kwargs)
        return self._act(action, func, args, kwargs)

    def check_complete(self) -> None:
        """Accept any path."""


def obeying(
    script: Script, axes: Axes, capture: Callable[[Any, Any], None] | None = None
) -> Emulate:
    """Return the mode under which the module of ``script`` runs."""
    return Keyed(script, axes) if script.only_draws else Emulate(script, axes, capture)

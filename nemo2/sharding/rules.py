"""The one file that decides: which layout every torch call's result has, and what it costs.

Each rule looks at the layouts of a call's operands (global shapes) and returns the layout
of the results and the ``Action`` that the local run needs. Soundness rests on three facts:
a replicated value has the same and complete gradient on all ranks; a replicated operand
that meets a split one gets only a part of its gradient here, so it must ``vary``; and what
no rule covers is gathered, which is always right and shown in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ShardingError
from ..pytree import tree_flatten, tree_leaves, tree_unflatten
from ..pipeline.absent import Absent, is_absent, is_inplace, to_meta, user_line
from .actions import Action, Fix
from .layout import REPLICATED, Layout


@dataclass
class Operand:
    """One tensor argument of a call."""

    meta: Tensor
    layout: Layout
    leaves: tuple[int, ...]
    needs_grad: bool
    param: str | None
    steps: list[tuple[str, Any]] = field(default_factory=list)
    exempt: bool = False
    entry: Layout = REPLICATED

    def __post_init__(self) -> None:
        self.entry = self.layout

    @property
    def dim(self) -> int | None:
        return self.layout.dim

    @property
    def ndim(self) -> int:
        return self.meta.ndim

    def gather(self) -> None:
        if self.dim is not None:
            self.steps.append(("gather", self.dim))
            self.layout = REPLICATED

    def split(self, dim: int) -> None:
        if self.dim == dim:
            return
        self.gather()
        self.steps.append(("split", dim))
        self.layout = Layout(dim)


@dataclass
class Outcome:
    """What a rule decided: the layout of the results, and how the call runs."""

    layouts: Layout | Sequence[Layout] = REPLICATED
    kind: str = "call"
    value: Any = None
    soft: bool = False


class Call:
    """One torch call with its operands, as the rules see it."""

    def __init__(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: Any, degree: int
    ) -> None:
        self.name, self.func, self.args, self.kwargs, self.degree = name, func, args, kwargs, degree
        leaves, self.spec = tree_flatten((args, kwargs))
        self.leaves = leaves
        self.operands: list[Operand] = []
        self._by_id: dict[int, Operand] = {}
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor):
                if id(x) in self._by_id:
                    op = self._by_id[id(x)]
                    op.leaves = (*op.leaves, i)
                else:
                    self._by_id[id(x)] = op = _operand(x, i)
                    self.operands.append(op)

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def operand(self, position: int, name: str) -> Operand | None:
        value = self.arg(position, name)
        return self._by_id[id(value)] if isinstance(value, Tensor) else None

    def of(self, value: Tensor) -> Operand:
        return self._by_id[id(value)]

    @property
    def any_split(self) -> bool:
        return any(op.dim is not None for op in self.operands)

    def fresh(self) -> list[Any]:
        """Return the arguments with contiguous meta tensors, whose strides name their dims."""
        return [_fresh_meta(x) if isinstance(x, Tensor) else to_meta(x) for x in self.leaves]

    def rerun(self, leaves: list[Any]) -> Any:
        """Run the call on meta with ``leaves`` in the place of its arguments."""
        args, kwargs = tree_unflatten(self.spec, leaves)
        with torch._C.DisableTorchFunctionSubclass():
            return self.func(*args, **kwargs)


def _operand(x: Tensor, leaf: int) -> Operand:
    if is_absent(x):
        assert isinstance(x, Absent)
        return Operand(
            x.meta, x.tp_layout, (leaf,), x.needs_grad and x.meta.is_floating_point(), x.param
        )
    return Operand(to_meta(x), REPLICATED, (leaf,), bool(x.requires_grad), None)


def _fresh_meta(x: Tensor) -> Tensor:
    meta = to_meta(x)
    return torch.empty(meta.shape, dtype=meta.dtype, device="meta")


@dataclass(frozen=True)
class Decision:
    """The result of ``decide``: layouts per output leaf, the action, and partial gradients."""

    layouts: tuple[Layout, ...] | Layout
    action: Action | None
    partial_params: tuple[tuple[str, int], ...]


def decide(call: Call, out: Any) -> Decision:
    """Decide one call. ``out`` is its result on global shapes (a pytree of meta tensors)."""
    if not call.any_split and call.name != "constrain":
        return Decision(REPLICATED, None, ())
    if is_inplace(call.name) and call.operands[0].dim is not None and not _pointwise(call):
        raise _refuse(call, "writes in place into")
    rule = _RULES.get(call.name) or (_pointwise_rule if _pointwise(call) else _gather_rule)
    outcome = rule(call, out)
    varying = any(op.dim is not None for op in call.operands) or outcome.kind == "embedding"
    partial: list[tuple[str, int]] = []
    if varying:
        for op in call.operands:
            if op.dim is None and op.needs_grad and not op.exempt:
                if op.param is not None and not op.steps:
                    partial.append((op.param, op.leaves[0]))
                else:
                    op.steps.append(("vary", None))
    fixes = tuple(Fix(op.leaves, tuple(op.steps)) for op in call.operands if op.steps)
    plain = outcome.kind == "call" and not fixes
    action = (
        None
        if plain
        else Action(call.name, outcome.kind, fixes, outcome.value, outcome.soft and not fixes)
    )
    layouts = outcome.layouts if isinstance(outcome.layouts, Layout) else tuple(outcome.layouts)
    return Decision(layouts, action, tuple(partial))


def _refuse(call: Call, what: str) -> ShardingError:
    shown = ", ".join(
        f"{op.param or 'tensor'}{tuple(op.meta.shape)}:{op.layout}" for op in call.operands
    )
    return ShardingError(
        f"'{call.name}' {what} a tensor split over \"tp\" in a way that no rule covers{user_line()}\n"
        f"  operands: {shown}\n  options: write it out of place | annotate less of this module"
    )


# --- pointwise -------------------------------------------------------------------------

_ALSO_LOCAL = {
    "_to_copy",
    "clone",
    "detach",
    "alias",
    "lift_fresh",
    "copy_",
    "fill_",
    "zero_",
    "zeros_like",
    "ones_like",
} | {
    "empty_like",
    "full_like",
    "rand_like",
    "native_dropout",
    "bernoulli_",
    "contiguous",
    "expand",
}
_POINTWISE_NAMES = {
    "dropout",
    "dropout_",
    "contiguous",
    "clone",
    "detach",
    "detach_",
    "type_as",
    "to",
    "float",
    "half",
} | {
    "bfloat16",
    "double",
    "type",
    "data",
    "alpha_dropout",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "requires_grad_",
    "alias",
    "cuda",
    "cpu",
    "retain_grad",
}
_pointwise_cache: dict[tuple[str, int], bool] = {}


class _Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.local = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if torch.Tag.pointwise not in func.tags and name not in _ALSO_LOCAL:
            self.local = False
        return func(*args, **(kwargs or {}))


def _pointwise(call: Call) -> bool:
    """Say whether each element of the result depends only on the same element of the operands."""
    if call.name in _POINTWISE_NAMES:
        return True
    if call.name in _RULES or call.name == "__setitem__":
        return False
    key = (call.name, len(call.operands))
    if key not in _pointwise_cache:
        leaves = call.fresh()
        with _Ops() as ops:
            call.rerun(leaves)
        _pointwise_cache[key] = ops.local
    return _pointwise_cache[key]


def _pointwise_rule(call: Call, out: Any) -> Outcome:
    outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if not outs:
        return Outcome()
    ndim, shape = outs[0].ndim, outs[0].shape
    first = call.operands[0] if is_inplace(call.name) else None
    owner = first or next(op for op in call.operands if op.dim is not None)
    target = None if owner.dim is None else owner.dim + ndim - owner.ndim
    for op in call.operands:
        want = None if target is None else target - (ndim - op.ndim)
        if want is None or want < 0 or op.meta.shape[want] != shape[target]:  # type: ignore[index]
            op.gather()
        elif op.dim != want:
            op.split(want)
    return Outcome(Layout(target))


def _gather_rule(call: Call, out: Any) -> Outcome:
    for op in call.operands:
        op.gather()
    return Outcome()


# --- queries of sizes --------------------------------------------------------------------


def _query_rule(call: Call, out: Any) -> Outcome:
    return Outcome(kind="constant", value=out, soft=True)


def _passive_rule(call: Call, out: Any) -> Outcome:
    return Outcome()


# --- views ---------------------------------------------------------------------------------


def _image(source: torch.Size, dim: int, out: Tensor, degree: int) -> int | None:
    """Return the dim of ``out`` that carries ``dim`` of its contiguous source, if one does.

    In a contiguous source a dim is known by the memory range that it spans. A view keeps
    it split when one of its dims spans the same range and divides by the degree.
    """
    top = source[dim]
    for size in source[dim + 1 :]:
        top *= size
    for d, (size, step) in enumerate(zip(out.shape, out.stride(), strict=True)):
        if step and step * size == top and size % degree == 0:
            return d
    return None


def _view_rule(call: Call, out: Any) -> Outcome:
    source = call.operands[0]
    if source.dim is None or any(isinstance(a, torch.dtype) for a in call.args[1:]):
        return _pointwise_rule(call, out) if source.dim is not None else _gather_rule(call, out)
    leaves = call.fresh()
    view = call.rerun(leaves)
    outs = [x for x in tree_leaves(view) if isinstance(x, Tensor)]
    root = leaves[source.leaves[0]]
    dims = [
        _image(root.shape, source.dim, x, call.degree) if torch._C._is_alias_of(x, root) else None
        for x in outs
    ]
    if any(d is None for d in dims) or any(op.dim is not None for op in call.operands[1:]):
        return _gather_rule(call, out)
    layouts = [Layout(d) for d in dims]
    if len(outs) > 1 or call.name not in _SIZED_VIEWS:
        return Outcome(layouts)
    local = layouts[0].local_shape(tuple(outs[0].shape), call.degree)
    kind = "expand" if call.name in ("expand", "broadcast_to", "expand_as") else "reshape"
    for op in call.operands[1:]:
        op.exempt = True
    return Outcome(layouts, kind, local, soft=True)


_SIZED_VIEWS = {
    "view",
    "reshape",
    "expand",
    "unflatten",
    "broadcast_to",
    "view_as",
    "reshape_as",
    "expand_as",
}


def _repeat_interleave_rule(call: Call, out: Any) -> Outcome:
    x, repeats, dim = call.operands[0], call.arg(1, "repeats"), call.arg(2, "dim")
    if not isinstance(repeats, int) or dim is None or x.dim is None:
        return _gather_rule(call, out)
    return Outcome(x.layout)


# --- joins -----------------------------------------------------------------------------------


def _cat_rule(call: Call, out: Any) -> Outcome:
    dim = call.arg(1, "dim", 0) % out.ndim
    return _join(call, lambda d: None if d == dim else d)


def _stack_rule(call: Call, out: Any) -> Outcome:
    dim = call.arg(1, "dim", 0) % out.ndim
    return _join(call, lambda d: d if d < dim else d + 1)


def _join(call: Call, image: Callable[[int], int | None]) -> Outcome:
    source = next(op.dim for op in call.operands if op.dim is not None)
    target = image(source)
    if target is None:
        for op in call.operands:
            op.gather()
        return Outcome()
    for op in call.operands:
        op.split(source)
    return Outcome(Layout(target))


# --- along a dim --------------------------------------------------------------------------------


def _dims(value: Any, ndim: int) -> tuple[int, ...]:
    if value is None or (isinstance(value, (tuple, list)) and not value):
        return tuple(range(ndim))
    values = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(int(v) % max(ndim, 1) for v in values)


def _dim_arg(call: Call, position: int = 1) -> Any:
    value = call.arg(position, "dim", call.kwargs.get("axis"))
    return None if isinstance(value, Tensor) else value


def _along_rule(call: Call, out: Any) -> Outcome:
    x = call.operands[0]
    value = _dim_arg(call)
    value = -1 if value is None else value
    dims = _dims(value, x.ndim)
    for op in call.operands[1:]:
        op.gather()
    if x.dim in dims:
        x.gather()
    return Outcome(x.layout)


def _norm_rule(call: Call, out: Any) -> Outcome:
    x, shape = call.operands[0], call.arg(1, "normalized_shape")
    count = len(shape) if isinstance(shape, (tuple, list, torch.Size)) else 1
    for op in call.operands[1:]:
        op.gather()
    if x.dim is not None and x.dim >= x.ndim - count:
        x.gather()
    return Outcome(x.layout)


def _reduce_rule(call: Call, out: Any) -> Outcome:
    x = call.operands[0]
    if len(call.operands) > 1 or x.dim is None:
        return _gather_rule(call, out)
    value = _dim_arg(call)
    dims = _dims(value, x.ndim)
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    keep = outs[0].ndim == x.ndim
    if x.dim in dims:
        if call.name in ("sum", "mean"):
            return Outcome(REPLICATED, "partial", call.name)
        x.gather()
        return Outcome()
    dim = x.dim if keep else x.dim - sum(d < x.dim for d in dims)
    return Outcome(Layout(dim))


# --- contractions ---------------------------------------------------------------------------------


def _contract(call: Call, ins: list[tuple[Operand, str]], out: str) -> tuple[str | None, Layout]:
    """Lay out a contraction: returns the split letter and the layout of the result."""
    split = [(op, letters[op.dim]) for op, letters in ins if op.dim is not None]
    by_param = sorted(split, key=lambda pair: pair[0].param is None)
    letter = by_param[0][1]
    for op, own in split:
        if own != letter:
            op.gather()
    for op, letters in ins:
        if letter in letters:
            op.split(letters.index(letter))
    return letter, Layout(out.index(letter)) if letter in out else REPLICATED


def _letters(call: Call, a: Operand, b: Operand) -> tuple[str, str, str]:
    """Name the dims of ``a @ b``: batch dims from the right, then m, k, n. Size-1 dims get none."""
    batch_a, batch_b = a.meta.shape[:-2], b.meta.shape[:-2]
    n = max(len(batch_a), len(batch_b))
    names = "abcdefgh"[:n]
    la = "".join(names[n - len(batch_a) + i] if s > 1 else "." for i, s in enumerate(batch_a))
    lb = "".join(names[n - len(batch_b) + i] if s > 1 else "." for i, s in enumerate(batch_b))
    la += "mk" if a.ndim > 1 else "k"
    lb += "kn" if b.ndim > 1 else "k"
    return la, lb, names + ("m" if a.ndim > 1 else "") + ("n" if b.ndim > 1 else "")


def _matmul_rule(call: Call, out: Any) -> Outcome:
    a, b = call.of(call.args[0]), call.of(call.arg(1, "other", call.kwargs.get("mat2")))
    if call.name == "__rmatmul__":
        a, b = b, a
    la, lb, lo = _letters(call, a, b)
    letter, layout = _contract(call, [(a, la), (b, lb)], lo)
    return Outcome(layout, "partial", "sum") if letter == "k" else Outcome(layout)


def _linear_rule(call: Call, out: Any) -> Outcome:
    x, w, bias = call.operand(0, "input"), call.operand(1, "weight"), call.operand(2, "bias")
    assert x is not None and w is not None
    names = "abcdefgh"[: x.ndim - 1]
    letter, layout = (
        _contract(call, [(x, names + "k"), (w, "nk")], names + "n")
        if x.dim is not None or w.dim is not None
        else (
            "n",
            Layout(x.ndim - 1),
        )
    )
    if x.dim is None and w.dim is None:  # only the bias is split
        w.split(0)
    return _with_bias(bias, letter, layout, out.ndim, "linear")


def _addmm_rule(call: Call, out: Any) -> Outcome:
    bias, a, b = call.of(call.args[0]), call.of(call.arg(1, "mat1")), call.of(call.arg(2, "mat2"))
    if a.dim is None and b.dim is None:
        bias.gather()
        return Outcome()
    letter, layout = _contract(call, [(a, "mk"), (b, "kn")], "mn")
    return _with_bias(bias, letter, layout, 2, "addmm")


def _with_bias(
    bias: Operand | None, letter: str | None, layout: Layout, ndim: int, name: str
) -> Outcome:
    if letter == "k":
        if bias is not None:
            bias.gather()
            bias.exempt = True
        return Outcome(REPLICATED, "rowwise", name)
    if bias is not None and layout.dim is not None:
        want = layout.dim - (ndim - bias.ndim)
        if want >= 0 and bias.meta.shape[want] > 1:
            bias.split(want)
        else:
            bias.gather()
    return Outcome(layout)


def _einsum_rule(call: Call, out: Any) -> Outcome:
    equation = call.args[0]
    tensors = (
        call.args[1]
        if len(call.args) == 2 and isinstance(call.args[1], (list, tuple))
        else call.args[1:]
    )
    equation = equation.replace(" ", "") if isinstance(equation, str) else "."
    ins, arrow, result = equation.partition("->")
    terms = ins.split(",")
    if "." in equation or not arrow or any(len(set(t)) != len(t) for t in terms):
        return _gather_rule(call, out)
    pairs = [(call.of(t), letters) for t, letters in zip(tensors, terms, strict=True)]
    letter, layout = _contract(call, pairs, result)
    return Outcome(layout) if letter in result else Outcome(REPLICATED, "partial", "sum")


# --- lookups, attention, loss --------------------------------------------------------------------


def _embedding_rule(call: Call, out: Any) -> Outcome:
    ids, weight = call.operand(0, "input"), call.operand(1, "weight")
    assert ids is not None and weight is not None
    if call.arg(3, "max_norm") is not None or call.arg(5, "scale_grad_by_freq", False):
        return _gather_rule(call, out)
    ids.gather()
    if weight.dim == 0:
        return Outcome(REPLICATED, "embedding")
    return Outcome(Layout(out.ndim - 1)) if weight.dim == 1 else Outcome()


def _sdpa_rule(call: Call, out: Any) -> Outcome:
    q, k, v = call.operand(0, "query"), call.operand(1, "key"), call.operand(2, "value")
    mask = call.operand(3, "attn_mask")
    assert q is not None and k is not None and v is not None
    heads = q.ndim - 3
    if heads < 0 or any(op.dim not in (None, heads) for op in (q, k, v)):
        dims = {op.dim for op in (q, k, v)}
        if len(dims) == 1 and q.dim is not None and q.dim < heads and mask is None:
            return Outcome(q.layout)
        return _gather_rule(call, out)
    if all(op.dim is None for op in (q, k, v)) or q.meta.shape[heads] % call.degree:
        return _gather_rule(call, out)
    q.split(heads)
    kv, ratio = k.meta.shape[heads], q.meta.shape[heads] // max(k.meta.shape[heads], 1)
    for op in (k, v):
        if kv % call.degree == 0:
            op.split(heads)
        else:
            _select(op, heads, ratio, call.degree)
    if mask is not None:
        dim = heads - (q.ndim - mask.ndim)
        mask.split(dim) if dim >= 0 and mask.meta.shape[dim] > 1 else mask.gather()
    return Outcome(Layout(heads))


def _select(op: Operand, heads: int, ratio: int, degree: int) -> None:
    """Fewer or odd kv heads: each rank takes those of its query heads.

    Where whole ranks share one kv head it is selected; otherwise the heads are first
    repeated to one for each query head.
    """
    op.gather()
    if degree % op.meta.shape[heads] == 0:
        op.steps.append(("select", (heads, ratio)))
    else:
        op.steps += [("repeat", (heads, ratio)), ("split", heads)]
    op.exempt = True


def _cross_entropy_rule(call: Call, out: Any) -> Outcome:
    logits, target = call.operand(0, "input"), call.operand(1, "target")
    assert logits is not None and target is not None
    class_dim = 0 if logits.ndim == 1 else 1
    weight = call.operand(2, "weight")
    target.gather()
    if weight is not None:
        weight.gather()
        weight.exempt = True
    if logits.dim != class_dim or target.meta.is_floating_point():
        return _gather_rule(call, out)
    return Outcome(REPLICATED, "cross_entropy", logits.meta.shape[class_dim])


def _constrain_rule(call: Call, out: Any) -> Outcome:
    x, dim = call.operands[0], call.args[1]
    if dim is None:
        x.gather()
    elif x.meta.shape[dim] % call.degree:
        raise ShardingError(
            f'shard(activation of shape {tuple(x.meta.shape)}, "tp", dim={dim}): '
            f"{x.meta.shape[dim]} does not divide by tp={call.degree}{user_line()}"
        )
    else:
        x.split(dim)
    return Outcome(x.layout, "identity")


_SIZE_QUERIES = (
    "shape",
    "size",
    "numel",
    "nelement",
    "stride",
    "__len__",
    "storage_offset",
    "nbytes",
)
_PASSIVE = (
    "dtype",
    "device",
    "ndim",
    "dim",
    "requires_grad",
    "is_floating_point",
    "is_complex",
    "is_cuda",
    "grad_fn",
) + (
    (
        "is_meta",
        "layout",
        "is_sparse",
        "is_nested",
        "is_quantized",
        "is_contiguous",
        "is_leaf",
        "is_inference",
        "grad",
    )
    + (
        "is_cpu",
        "__hash__",
        "is_mkldnn",
        "names",
        "_version",
        "is_mps",
        "is_xpu",
        "is_signed",
        "is_conj",
        "is_neg",
    )
    + ("element_size", "data_ptr", "get_device", "is_same_size", "is_shared")
)


def is_query(name: str) -> bool:
    """Say whether a call only asks for sizes or properties, not for values."""
    return name in _SIZE_QUERIES or name in _PASSIVE


_RULES: dict[str, Callable[[Call, Any], Outcome]] = {
    **dict.fromkeys(_SIZE_QUERIES, _query_rule),
    **dict.fromkeys(_PASSIVE, _passive_rule),
    **dict.fromkeys(
        (
            "view",
            "reshape",
            "view_as",
            "reshape_as",
            "flatten",
            "unflatten",
            "transpose",
            "permute",
            "movedim",
            "moveaxis",
        )
        + (
            "swapaxes",
            "swapdims",
            "t",
            "T",
            "mT",
            "H",
            "mH",
            "unsqueeze",
            "squeeze",
            "expand",
            "expand_as",
            "select",
        )
        + (
            "narrow",
            "split",
            "chunk",
            "tensor_split",
            "split_with_sizes",
            "unbind",
            "__getitem__",
            "ravel",
            "broadcast_to",
        )
        + ("transpose_", "squeeze_", "unsqueeze_", "adjoint", "unsafe_chunk", "unsafe_split"),
        _view_rule,
    ),
    "repeat_interleave": _repeat_interleave_rule,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat_rule),
    "stack": _stack_rule,
    **dict.fromkeys(
        (
            "softmax",
            "log_softmax",
            "cumsum",
            "cumprod",
            "sort",
            "argsort",
            "glu",
            "softmin",
            "logcumsumexp",
        ),
        _along_rule,
    ),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm_rule),
    **dict.fromkeys(
        (
            "sum",
            "mean",
            "amax",
            "amin",
            "max",
            "min",
            "argmax",
            "argmin",
            "var",
            "std",
            "logsumexp",
            "prod",
            "any",
            "all",
        ),
        _reduce_rule,
    ),
    **dict.fromkeys(
        ("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "dot"), _matmul_rule
    ),
    "linear": _linear_rule,
    "addmm": _addmm_rule,
    "einsum": _einsum_rule,
    "embedding": _embedding_rule,
    "scaled_dot_product_attention": _sdpa_rule,
    "cross_entropy": _cross_entropy_rule,
    "constrain": _constrain_rule,
}

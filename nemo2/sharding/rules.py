"""The one file that decides: which layout every torch call's result has, and what it costs.

Each rule looks at the layouts of a call's operands over one axis (global shapes) and returns the
layout of the results and what the local run needs; ``decide.py`` puts the axes together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ShardingError
from ..pipeline.absent import is_inplace, user_line
from ..pytree import tensors
from .calls import Call, Operand, Outcome
from .contractions import (
    addmm_rule,
    cross_entropy_rule,
    einsum_rule,
    embedding_rule,
    grouped_mm_rule,
    linear_rule,
    matmul_rule,
    sdpa_rule,
)
from .layout import REPLICATED, Layout

Rule = Callable[[Call, Any], Outcome]


# --- pointwise -------------------------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ALSO_LOCAL = _words(
    "_to_copy clone detach alias lift_fresh copy_ fill_ zero_ native_dropout bernoulli_ contiguous"
    " expand empty_like zeros_like ones_like full_like rand_like hardswish log_sigmoid_forward"
    " mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits"
)
_POINTWISE_NAMES = _words(
    "dropout dropout_ alpha_dropout alpha_dropout_ dropout1d dropout2d dropout3d feature_dropout"
    " feature_dropout_ contiguous clone detach detach_ float half bfloat16 double"
    " int long bool type data requires_grad_ alias cuda cpu retain_grad"
)
_pointwise_cache: dict[Any, bool] = {}


class _Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.local = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if torch.Tag.pointwise not in func.tags and name not in _ALSO_LOCAL:
            self.local = False
        return func(*args, **(kwargs or {}))


def is_pointwise(call: Call) -> bool:
    """Say whether each element of the result depends only on the same element of the operands.

    It does if the call is made of elementwise kernels alone. That may hang on its arguments
    (a padding of zero, a view of the same shape), so all of them are part of the cache's key.
    """
    if call.name in _POINTWISE_NAMES:
        return True
    if call.name in _RULES or call.name == "__setitem__":
        return False
    operands = tuple((op.meta.shape, op.meta.dtype, op.leaves) for op in call.operands)
    others = repr([x for x in call.leaves if not isinstance(x, Tensor)])
    key = (call.name, operands, others, call.spec)
    if key not in _pointwise_cache:
        _pointwise_cache[key] = _is_elementwise(call)
    return _pointwise_cache[key]


def _is_elementwise(call: Call) -> bool:
    leaves = call.fresh()
    with _Ops() as ops:
        out = call.rerun(leaves)
    shapes = {tuple(x.shape) for x in tensors(out)}
    try:
        broadcast = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
            *(op.meta.shape for op in call.operands)
        )
    except RuntimeError:
        return False
    return ops.local and shapes <= {tuple(broadcast)}


def _pointwise_rule(call: Call, out: Any) -> Outcome:
    outs = tensors(out)
    if not outs:
        return Outcome()
    ndim, shape = outs[0].ndim, outs[0].shape
    first = call.operands[0] if is_inplace(call.name) else None
    owner = first or next(op for op in call.operands if op.dim is not None)
    target = None if owner.dim is None else owner.dim + ndim - owner.ndim
    for op in call.operands:
        want = None if target is None else target - (ndim - op.ndim)
        if target is None or want is None or want < 0 or op.meta.shape[want] != shape[target]:
            op.gather()
        else:
            op.split(owner.entry.at(want))
    return Outcome(owner.entry.at(target))


def _like_first_rule(call: Call, out: Any) -> Outcome:
    """The first operand converted to what the second is: only the first one's values count."""
    for op in call.operands[1:]:
        op.ignore()
    return Outcome(call.operands[0].layout)


def _constructor_rule(call: Call, out: Any) -> Outcome:
    """A constructor that takes the shape of a split tensor gives a whole one on each rank."""
    call.operands[0].ignore()
    return Outcome(REPLICATED, "constructor", tuple(call.operands[0].meta.shape))


# --- queries of sizes --------------------------------------------------------------------


def _query_rule(call: Call, out: Any) -> Outcome:
    _passive_rule(call, out)
    return Outcome(kind="constant", value=out, soft=True)


def _passive_rule(call: Call, out: Any) -> Outcome:
    for op in call.operands:
        op.ignore()
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
    if source.dim is None:
        return call.gather()
    if any(isinstance(a, torch.dtype) for a in (*call.args[1:], call.kwargs.get("dtype"))):
        return _pointwise_rule(call, out)
    leaves = call.fresh()
    root = leaves[source.leaves[0]]
    outs = tensors(call.rerun(leaves))
    cut = _cut(call, source, root, outs)
    if cut is not None:
        return Outcome(cut, "identity")
    pieces = _pieces(call, source, root, outs)
    if pieces is not None:
        return pieces
    layouts = [x for x in (_kept(call, source, root, x) for x in outs) if x is not None]
    sized = any(op.dim is not None for op in call.operands[1:])
    if not root.numel() or sized or len(layouts) < len(outs):
        return call.gather()
    whole = call.name == "narrow" and outs[0].shape == root.shape
    if len(outs) > 1 or not (whole or call.name in _SIZED_VIEWS):
        return Outcome(layouts)
    kind = "expand" if call.name in ("expand", "broadcast_to", "expand_as") else "reshape"
    for op in call.operands[1:]:
        op.ignore()
    return Outcome(layouts, kind, soft=True)


def _kept(call: Call, source: Operand, root: Tensor, out: Tensor) -> Layout | None:
    """Return the layout of one result, or None when the result must be whole."""
    assert source.dim is not None
    if not torch._C._is_alias_of(out, root):  # type: ignore[attr-defined]
        return None
    carried = _carried(root.shape, source.layout, out)
    if carried is None and not source.layout.plain and not any(source.layout.cut):
        carried = _image_of_parts(root.shape, source.layout, out, call.granularity)
    if carried is not None or not source.layout.plain:
        same = carried is None or out.shape[carried.dim or 0] == root.shape[source.dim]
        return carried if same or call.name not in ("__getitem__", "narrow") else None
    dim = _image(root.shape, source.dim, out, call.granularity)
    if dim is None or (call.name == "__getitem__" and out.shape[dim] != root.shape[source.dim]):
        return None  # strided: where it starts on each rank depends on the local size
    return Layout(dim)


def _carried(source: torch.Size, layout: Layout, out: Tensor) -> Layout | None:
    """Return the layout of a view in which the split (inner) dim is whole, if it is.

    Its elements lie one ``step`` apart. A dim of the view with the same step carries it: with
    the same number of elements, or flattened together with the dims before it.
    """
    assert layout.dim is not None
    step = 1
    for size in source[layout.dim + 1 :]:
        step *= size
    inner = source[layout.dim] // layout.outer
    for d, (size, stride) in enumerate(zip(out.shape, out.stride(), strict=True)):
        if layout.parts and stride == step and size == source[layout.dim]:
            return layout.at(d)
        if inner > 1 and stride == step and size % inner == 0 and not layout.parts:
            return Layout(d, size // inner, layout.cut)
    return None


def _image_of_parts(
    source: torch.Size, layout: Layout, out: Tensor, granularity: int
) -> Layout | None:
    """Return the layout of a view that takes the parts of a fused dim apart: into heads, say."""
    assert layout.dim is not None
    step = 1
    for size in source[layout.dim + 1 :]:
        step *= size
    total = source[layout.dim]
    for d, (size, stride) in enumerate(zip(out.shape, out.stride(), strict=True)):
        if stride <= step or stride % step:
            continue
        width = stride // step  # elements of the fused dim in one of this dim
        parts = [p // width for p in layout.pieces(total)]
        if any(p % width for p in layout.pieces(total)) or any(p % granularity for p in parts):
            continue
        if size == sum(parts):
            return Layout.fused(d, parts)
        if not layout.parts and size == parts[0]:
            return Layout(d)
    return None


_PIECES = ("split", "split_with_sizes", "chunk", "tensor_split", "__getitem__", "narrow")


def _pieces(call: Call, source: Operand, root: Tensor, outs: list[Tensor]) -> Outcome | None:
    """Return what takes a fused dim apart along its parts: ``qkv.split((dq, dk, dv), -1)``."""
    layout = source.layout
    if layout.dim is None or call.name not in _PIECES or not (layout.outer > 1 or layout.parts):
        return None
    dim, parts = layout.dim, layout.pieces(root.shape[layout.dim])
    edges = [sum(parts[:i]) for i in range(len(parts) + 1)]
    layouts, ranges = [], []
    for out in outs:
        other = [d for d in range(root.ndim) if d != dim]
        if out.ndim != root.ndim or out.stride() != root.stride():
            return None
        if any(out.shape[d] != root.shape[d] for d in other) or any(layout.cut):
            return None
        start = int(out.storage_offset()) // max(root.stride(dim), 1)
        end = start + out.shape[dim]
        if start not in edges or end not in edges or start == end:
            return None
        covered = parts[edges.index(start) : edges.index(end)]
        layouts.append(Layout.fused(dim, covered))
        ranges.append((start // call.degree, (end - start) // call.degree))
    if len(outs) == 1 and outs[0].shape == root.shape:
        return None
    single = call.name in ("__getitem__", "narrow")
    return Outcome(layouts, "pieces", (dim, tuple(ranges), single), soft=call.name == "chunk")


def _cut(call: Call, source: Operand, root: Tensor, outs: list[Tensor]) -> Layout | None:
    """Return the layout of ``x[:, :-1]``: all elements stay, those at the ends mean nothing.

    Over ``tp`` only for the shift by one of next-token losses: more would hold more memory than
    a gather of what is left.
    """
    dim = source.dim
    if dim is None or call.name not in ("__getitem__", "narrow") or len(outs) != 1:
        return None
    if call.axis == "tp" and source.other.dim == dim:
        return None  # one cut is counted once
    out, size = outs[0], root.shape[dim] // source.layout.outer
    if out.ndim != root.ndim or source.layout.outer > 1 or out.stride() != root.stride():
        return None
    if any(a != b for d, (a, b) in enumerate(zip(out.shape, root.shape, strict=True)) if d != dim):
        return None
    missing = size - out.shape[dim]
    if not 0 < missing <= (size // 2 if call.axis == "cp" else 1) or size < 4:
        return None
    start = int(out.storage_offset()) // max(root.stride(dim), 1)
    before, after = source.layout.cut
    return Layout(dim, 1, (before + start, after + missing - start))


# Views that name sizes, or whose meaning hangs on them; the local size takes their place.
_SIZED_VIEWS = _words(
    "view reshape expand unflatten broadcast_to view_as reshape_as expand_as squeeze"
)


def _complex_rule(call: Call, out: Any) -> Outcome:
    """Pairs of reals seen as complex numbers, or back: the pair is the last dim."""
    x = call.operands[0]
    if call.name == "view_as_complex" and x.dim == x.ndim - 1:
        x.gather()
    return Outcome(x.layout)


def _repeat_interleave_rule(call: Call, out: Any) -> Outcome:
    x, repeats, dim = call.operands[0], call.arg(1, "repeats"), call.arg(2, "dim")
    sized = call.kwargs.get("output_size") is not None
    if not isinstance(repeats, int) or dim is None or x.dim is None or sized:
        return call.gather()
    return Outcome(x.layout)


# --- joins -----------------------------------------------------------------------------------


def _cat_rule(call: Call, out: Any) -> Outcome:
    dim = call.arg(1, "dim", call.kwargs.get("axis", 0)) % out.ndim
    parts = [op for op in call.operands if tuple(op.meta.shape) != (0,)]
    if len(parts) == 1 and len(parts[0].leaves) == 1:  # a cache that was empty
        return Outcome(parts[0].layout)
    return _join(call, lambda d: None if d == dim else d)


def _stack_rule(call: Call, out: Any) -> Outcome:
    dim = call.arg(1, "dim", call.kwargs.get("axis", 0)) % out.ndim
    return _join(call, lambda d: d if d < dim else d + 1)


def _join(call: Call, image: Callable[[int], int | None]) -> Outcome:
    source = next(op.dim for op in call.operands if op.dim is not None)
    target = image(source)
    if target is None:
        return call.gather()
    for op in call.operands:
        if tuple(op.meta.shape) != (0,):  # torch joins an empty 1-D tensor with anything (caches)
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
    return None if isinstance(value, (Tensor, bool)) else value  # var(False) means unbiased=False


def _along_rule(call: Call, out: Any) -> Outcome:
    x = call.operands[0]
    value = _dim_arg(call)
    if value is None:
        if call.name in ("softmax", "log_softmax", "softmin"):
            return call.gather()  # an implicit dim
        value = -1
    dims = _dims(value, x.ndim)
    for op in call.operands[1:]:
        op.gather()
    if x.dim in dims:
        x.gather()
    return Outcome(x.layout)


def _topk_rule(call: Call, out: Any) -> Outcome:
    x = call.operands[0]
    if x.dim == int(call.arg(2, "dim", -1)) % x.ndim:
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
    if len(call.operands) > 1 and call.name in ("max", "min"):
        return _pointwise_rule(call, out)
    if len(call.operands) > 1 or x.dim is None:
        return call.gather()
    dims = _dims(_dim_arg(call, 2 if call.name in _NORMS else 1), x.ndim)
    outs = tensors(out)
    keep = outs[0].ndim == x.ndim
    if x.dim in dims:
        if call.name in ("sum", "mean") and x.layout.plain:
            return Outcome(REPLICATED, "partial", call.name)
        x.gather()
        return Outcome()
    dim = x.dim if keep else x.dim - sum(d < x.dim for d in dims)
    return Outcome(x.layout.at(dim))


def _normalize_rule(call: Call, out: Any) -> Outcome:
    x = call.operands[0]
    if len(call.operands) > 1 or x.dim in _dims(call.arg(2, "dim", 1), x.ndim):
        return call.gather()
    return Outcome(x.layout)


def _cosine_rule(call: Call, out: Any) -> Outcome:
    x, shapes = call.operands[0], {op.meta.shape for op in call.operands}
    (dim,) = _dims(call.arg(2, "dim", 1), x.ndim)
    if len(shapes) > 1 or len({op.layout for op in call.operands}) > 1 or x.dim in (None, dim):
        return call.gather()
    return Outcome(x.layout.at(x.dim - (dim < x.dim)))


# --- generation (inference/cache.py) ---


def _cache_update_rule(call: Call, out: Any) -> Outcome:
    """Keys or values take the length of the cache in their last dim but one."""
    x = call.operands[0]
    if x.dim == x.ndim - 2:
        x.gather()
    return Outcome(x.layout)


def _token_at_rule(call: Call, out: Any) -> Outcome:
    x, index = call.operands
    if x.dim != 2:
        x.gather()
    index.gather()
    return Outcome(x.layout if x.dim is None else x.layout.at(1))


# --- annotations and tables ---


def _constrain_rule(call: Call, out: Any) -> Outcome:
    x, dim = call.operands[0], call.args[1]
    if call.axis != "tp":
        if dim is None and not call.scene.in_block:
            x.gather()
        return Outcome(x.layout, "identity")
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


_SIZE_QUERIES = _words("shape size numel nelement stride __len__ storage_offset nbytes")
_PASSIVE = _words(
    "dtype device ndim dim requires_grad is_floating_point is_complex is_cuda grad_fn is_meta"
    " layout is_sparse is_nested is_quantized is_contiguous is_leaf is_inference grad is_cpu"
    " __hash__ is_mkldnn names _version is_mps is_xpu is_signed is_conj is_neg element_size"
    " data_ptr get_device is_same_size is_shared"
)
_VIEWS = _words(
    "view reshape view_as reshape_as flatten unflatten transpose permute movedim moveaxis"
    " swapaxes swapdims t T mT H mH unsqueeze squeeze expand expand_as select narrow split chunk"
    " tensor_split split_with_sizes unbind __getitem__ ravel broadcast_to transpose_ squeeze_"
    " unsqueeze_ adjoint unsafe_chunk unsafe_split"
)
_ALONG = _words("softmax log_softmax cumsum cumprod sort argsort glu softmin logcumsumexp")
_REDUCTIONS = _words("sum mean amax amin max min argmax argmin var std logsumexp prod any all")
_NORMS = _words("norm linalg_norm linalg_vector_norm")  # (x, order, dim)
_CONSTRUCTORS = _words(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like"
)


_KNOW_CUTS = {
    *_words(
        "linear addmm matmul __matmul__ grouped_mm cross_entropy to type_as softmax log_softmax"
    ),
    *_words("layer_norm rms_norm constrain topk"),
}


def knows_cuts(call: Call) -> bool:
    """Say whether a call's rule is right for layouts that are not plain."""
    view = call.name in _VIEWS
    known = call.name in _KNOW_CUTS or (call.name in _REDUCTIONS and len(call.operands) == 1)
    return view or known or is_query(call.name) or is_pointwise(call)


def rule_of(call: Call) -> Rule | None:
    return _RULES.get(call.name) or (_pointwise_rule if is_pointwise(call) else None)


def is_query(name: str) -> bool:
    """Say whether a call only asks for sizes or properties, not for values."""
    return name in _SIZE_QUERIES or name in _PASSIVE


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_SIZE_QUERIES, _query_rule),
    **dict.fromkeys(_PASSIVE, _passive_rule),
    **dict.fromkeys(("to", "type_as"), _like_first_rule),
    **dict.fromkeys(_CONSTRUCTORS, _constructor_rule),
    **dict.fromkeys(_VIEWS, _view_rule),
    **dict.fromkeys(("view_as_real", "view_as_complex"), _complex_rule),
    "repeat_interleave": _repeat_interleave_rule,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat_rule),
    "stack": _stack_rule,
    **dict.fromkeys(_ALONG, _along_rule),
    "topk": _topk_rule,
    "normalize": _normalize_rule,
    "cosine_similarity": _cosine_rule,
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm_rule),
    **dict.fromkeys((*_REDUCTIONS, *_NORMS), _reduce_rule),
    **dict.fromkeys(_words("matmul __matmul__ __rmatmul__ bmm mm mv dot"), matmul_rule),
    **dict.fromkeys(_words("grouped_mm _grouped_mm grouped_mm_fallback"), grouped_mm_rule),
    "linear": linear_rule,
    "addmm": addmm_rule,
    "einsum": einsum_rule,
    "embedding": embedding_rule,
    "scaled_dot_product_attention": sdpa_rule,
    "cross_entropy": cross_entropy_rule,
    "constrain": _constrain_rule,
    "cache_update": _cache_update_rule,
    "token_at": _token_at_rule,
}

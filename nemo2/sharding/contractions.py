"""Layout rules of contractions, lookups, attention and losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ShardingError
from ..pipeline.absent import user_line
from .calls import Call, Operand, Outcome
from .layout import REPLICATED, Layout

_PARTIAL = Outcome(REPLICATED, "partial", "sum")


# --- contractions ---------------------------------------------------------------------------------


def _contract(call: Call, ins: list[tuple[Operand, str]], out: str) -> tuple[str, Layout]:
    """Lay out a contraction whose dims have letters.

    Returns:
        the split letter, "" when all operands are gathered; and the layout of the result.
    """
    split = [(op, letters[op.dim]) for op, letters in ins if op.dim is not None]
    owner, letter = min(split, key=lambda pair: pair[0].param is None)
    twice = len({(id(op), own.find(letter)) for op, own in ins}) > len({id(op) for op, _ in ins})
    if twice or (letter not in out and any(owner.layout.cut)):
        call.gather()  # one tensor in two places that need different parts of it, or a sum of cuts
        return "", REPLICATED
    layout = owner.layout
    for op, own in split:
        if own != letter:
            op.gather()
    for op, letters in ins:
        if letter in letters and op.meta.shape[letters.index(letter)] > 1:
            op.split(layout.at(letters.index(letter)))
    return letter, layout.at(out.index(letter)) if letter in out else REPLICATED


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


def matmul_rule(call: Call, out: Any) -> Outcome:
    a, b = (call.of(x) for x in call.leaves if isinstance(x, Tensor))
    if call.name == "__rmatmul__":
        a, b = b, a
    la, lb, lo = _letters(call, a, b)
    letter, layout = _contract(call, [(a, la), (b, lb)], lo)
    return _PARTIAL if letter == "k" else Outcome(layout)


def linear_rule(call: Call, out: Any) -> Outcome:
    x, w, bias = call.tensor(0, "input"), call.tensor(1, "weight"), call.operand(2, "bias")
    if x.dim is None and w.dim is None:  # only the bias is split
        w.split(0)
    names = "abcdefgh"[: x.ndim - 1]
    letter, layout = _contract(call, [(x, names + "k"), (w, "nk")], names + "n")
    return _with_bias(bias, letter, layout, out.ndim, "linear")


def addmm_rule(call: Call, out: Any) -> Outcome:
    bias, a, b = call.operand(0, "input"), call.tensor(1, "mat1"), call.tensor(2, "mat2")
    if a.dim is None and b.dim is None:
        return call.gather()
    letter, layout = _contract(call, [(a, "mk"), (b, "kn")], "mn")
    return _with_bias(bias, letter, layout, 2, "addmm")


def _with_bias(bias: Operand | None, letter: str, layout: Layout, ndim: int, name: str) -> Outcome:
    if bias is not None and layout.replicated:
        bias.gather()
    if letter == "k":
        if bias is not None:
            bias.exempt = True  # added once, after the sum
        return Outcome(REPLICATED, "rowwise", name)
    if bias is not None and layout.dim is not None:
        want = layout.dim - (ndim - bias.ndim)
        if want >= 0 and bias.meta.shape[want] > 1:
            bias.split(layout.at(want))
        else:
            bias.gather()
    return Outcome(layout)


def grouped_mm_rule(call: Call, out: Any) -> Outcome:
    """Rows sorted by group times the matrix of their group: (rows, k), (groups, k, n)."""
    x, weight = call.tensor(0, "input"), call.tensor(1, "mat2")
    for op in call.operands[2:]:
        op.gather()  # where the groups end
    if x.ndim != 2 or weight.ndim != 3 or x.dim == 0 or weight.dim == 0:
        return call.gather()
    letter, layout = _contract(call, [(x, "mk"), (weight, "ekn")], "mn")
    return _PARTIAL if letter == "k" else Outcome(layout)


def einsum_rule(call: Call, out: Any) -> Outcome:
    equation = call.args[0]
    tensors = (
        call.args[1]
        if len(call.args) == 2 and isinstance(call.args[1], (list, tuple))
        else call.args[1:]
    )
    equation = equation.replace(" ", "") if isinstance(equation, str) else "."
    ins, arrow, result = equation.partition("->")
    pairs = [(call.of(t), term) for t, term in zip(tensors, ins.split(","), strict=False)]
    if "..." in equation and equation == equation.lower():
        pairs = [(op, _expand(term, op.ndim)) for op, term in pairs]
        result = _expand(result, len(out.shape))
    if not arrow or any("." in t or len(set(t)) != len(t) for _, t in pairs):
        return call.gather()
    letter, layout = _contract(call, pairs, result)
    return Outcome(layout) if letter in result or not letter else _PARTIAL


def _expand(term: str, ndim: int) -> str:
    """Spell out an ellipsis by capital letters, aligned at the right."""
    named = len(term.replace("...", ""))
    return term.replace("...", "ABCDEFGH"[8 - (ndim - named) :])


# --- lookups, attention, loss --------------------------------------------------------------------


def embedding_rule(call: Call, out: Any) -> Outcome:
    ids, weight = call.tensor(0, "input"), call.tensor(1, "weight")
    if call.arg(3, "max_norm") is not None or call.arg(5, "scale_grad_by_freq", False):
        return call.gather()
    ids.gather()
    if weight.dim == 0:
        return Outcome(REPLICATED, "embedding")
    return Outcome(Layout(out.ndim - 1)) if weight.dim == 1 else Outcome()


def sdpa_rule(call: Call, out: Any) -> Outcome:
    q, k, v = call.tensor(0, "query"), call.tensor(1, "key"), call.tensor(2, "value")
    mask = call.operand(3, "attn_mask")
    heads = q.ndim - 3
    dims = {op.dim for op in (q, k, v)}
    if len(dims) == 1 and q.dim is not None and q.dim < heads and mask is None:
        return Outcome(q.layout)
    if call.axis == "cp":
        return _context_attention(call, q, k, v, mask)
    if heads >= 0 and heads in dims:
        for op in (q, k, v):
            if op.dim not in (None, heads):
                op.gather()  # fewer kv heads than ranks, on activations split along the sequence
    if heads < 0 or any(op.dim not in (None, heads) for op in (q, k, v)):
        return call.gather()
    if any(op.ndim != q.ndim for op in (k, v)):
        return call.gather()
    count, kv = q.meta.shape[heads], k.meta.shape[heads]
    if count % call.degree or count % kv or v.meta.shape[heads] != kv:
        return call.gather()
    q.split(heads)
    for op in [k] if k is v else [k, v]:
        if kv % call.degree == 0:
            op.split(heads)
        else:
            _select(op, heads, count // kv, call.degree)
    if mask is not None:
        dim = heads - (q.ndim - mask.ndim)
        mask.split(dim) if dim >= 0 and mask.meta.shape[dim] > 1 else mask.gather()
    return Outcome(Layout(heads))


def _context_attention(
    call: Call, q: Operand, k: Operand, v: Operand, mask: Operand | None
) -> Outcome:
    """Attention over a split sequence: its own kind, carried out by ``attention.py``.

    Queries that are split and meet whole keys (of another sequence) need nothing: each rank
    has its rows. The mask is whole, and cut by rows and columns where it is used.
    """
    rows = q.ndim - 2
    causal = bool(call.arg(5, "is_causal", False))
    whole = k.dim is None and v.dim is None and not causal
    if mask is not None:
        mask.gather()
        mask.exempt = True
    if q.dim != rows or not (whole or (k.dim == rows and v.dim == rows)):
        return call.gather()
    if float(call.arg(4, "dropout_p", 0.0)) > 0.0:
        raise ShardingError(
            f"attention with dropout_p={call.arg(4, 'dropout_p')} over cp={call.degree}: kernels"
            f" draw their own numbers, which would differ from those of one device{user_line()}\n"
            "  options: dropout_p=0 in attention (dropout elsewhere is fine) | cp=1"
        )
    if call.scene.attention == "ulysses" and not whole:
        _check_heads(call, q)
    if mask is not None and mask.needs_grad:
        raise ShardingError(
            f"attention over cp={call.degree} with a mask that needs a gradient{user_line()}\n"
            "  options: a mask that is made without parameters | cp=1"
        )
    if whole:
        if mask is not None and mask.ndim >= 2 and mask.meta.shape[-2] > 1:
            mask.split(mask.ndim - 2)
        return Outcome(q.layout)
    return Outcome(q.layout, "attention", call.scene.attention)


def _check_heads(call: Call, q: Operand) -> None:
    """Refuse Ulysses where it cannot split the heads that one rank of ``tp`` has."""
    dim, tp = q.ndim - 3, call.scene.degrees[1]
    heads = q.meta.shape[dim] if dim >= 0 else 1
    own = heads // tp if q.other.dim == dim else heads
    if own % call.degree:
        shared = f" (of {heads} over tp={tp})" if own != heads else ""
        raise ShardingError(
            f"context_parallel='ulysses' splits heads: {own}{shared} do not divide by"
            f" cp={call.degree}{user_line()}\n"
            "  options: context_parallel='ring' or 'all_gather', which split no heads"
            " | a cp that divides them"
        )


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


def cross_entropy_rule(call: Call, out: Any) -> Outcome:
    logits, target = call.tensor(0, "input"), call.tensor(1, "target")
    class_dim = 0 if logits.ndim == 1 else 1
    weight = call.operand(2, "weight")
    target.gather()
    if weight is not None:
        weight.gather()
        weight.exempt = True
    if logits.dim is None or target.meta.is_floating_point():
        return call.gather()
    if logits.dim == class_dim and not logits.layout.plain:
        return call.gather()
    if logits.dim == class_dim:
        return Outcome(REPLICATED, "cross_entropy", logits.meta.shape[class_dim])
    target.exempt = True
    dim = logits.dim - (logits.dim > class_dim)
    return Outcome(REPLICATED, "cross_entropy", logits.layout.at(dim))

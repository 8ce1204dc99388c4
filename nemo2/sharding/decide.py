"""One torch call, all axes: what each axis's rule decided, put together into one action.

The rules (``rules.py``) look at one axis at a time. Soundness rests on three facts: a replicated
value has the same and complete gradient on all ranks of ``tp`` (and a part of it on each of
``cp``); a replicated operand that meets one split over ``tp`` gets only a part of its gradient
here, so it must ``vary``; and what no rule covers is gathered, which is always right and shown in
the plan. Inside pipeline blocks a gather over ``cp`` is refused: it would undo what ``cp`` is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import ShardingError
from ..pipeline.absent import is_inplace, user_line
from ..pytree import tensors
from .actions import Action, Fix
from .calls import Call, Decision, Operand, Outcome, refuse, shown
from .layout import REPLICATED, Layout, Sharding, local_shape
from .rules import is_pointwise, knows_cuts, rule_of

_SUMS = ("rowwise", "embedding", "partial")  # kinds that sum over an axis


@dataclass
class _Part:
    """What one axis needs of a call."""

    axis: str
    call: Call
    outcome: Outcome
    partial: list[tuple[str, int]]
    unusable: ShardingError | None = None

    @property
    def steps(self) -> bool:
        return any(op.steps for op in self.call.operands)

    @property
    def trivial(self) -> bool:
        return self.outcome.kind == "call" and not self.steps

    def layout(self, leaf: int) -> Layout:
        layouts = self.outcome.layouts
        return layouts if isinstance(layouts, Layout) else layouts[leaf]


def decide(calls: Sequence[Call], out: Any) -> Decision:
    """Decide a call, given as each axis sees it.

    Args:
        calls: one for each axis of more than one rank, outermost first.
        out: its result on global shapes (a pytree of meta tensors).
    """
    parts = [p for call in calls if (p := _decide_part(call, out)) is not None]
    if not parts:
        return Decision((), None, ())
    outs = tensors(out)
    layouts = tuple(_sharding(parts, leaf) for leaf in range(len(outs)))
    partial = tuple(found for p in parts for found in p.partial)
    unusable = next((p.unusable for p in parts if p.unusable is not None), None)
    return Decision(layouts, _action(parts, layouts, outs), partial, unusable)


def _sharding(parts: Sequence[_Part], leaf: int) -> Sharding:
    by_axis = {p.axis: p.layout(leaf) for p in parts}
    return by_axis.get("cp", REPLICATED), by_axis.get("tp", REPLICATED)


def _decide_part(call: Call, out: Any) -> _Part | None:
    if not call.any_split and call.name != "constrain":
        return None
    first = call.operands[0]
    alike = all(op.entry == first.entry or op.meta.numel() == 1 for op in call.operands)
    local = is_pointwise(call) and (first.layout.plain or alike)
    if is_inplace(call.name) and first.dim is not None and not local:
        raise refuse(call, "writes in place into")
    if isinstance(call.kwargs.get("out"), Tensor):
        raise refuse(call, "writes by out= with")
    rule = rule_of(call)
    cuts = any(not op.layout.plain for op in call.operands)
    known = rule is not None and (not cuts or knows_cuts(call))
    outcome = rule(call, out) if rule is not None and known else call.gather()
    if call.axis == "cp":
        mixing = _mixing(call)
        if mixing is None:
            return _Part(call.axis, call, outcome, [])
        if call.name not in ("__getitem__", "narrow"):
            raise mixing
        for op in call.operands:  # a cache keeps such slices that training never looks at
            op.steps.clear()
        return _Part(call.axis, call, Outcome(), [], mixing)
    if outcome.kind in _SUMS:
        outcome = _scatter(call, outcome, out)
    return _Part(call.axis, call, outcome, _vary(call, outcome))


def _vary(call: Call, outcome: Outcome) -> list[tuple[str, int]]:
    """Let replicated operands of a split call vary; return the parameters among them."""
    partial: list[tuple[str, int]] = []
    if any(op.dim is not None for op in call.operands) or outcome.kind == "embedding":
        for op in call.operands:
            if op.dim is None and op.needs_grad and not op.exempt:
                if op.param is not None and not op.steps:
                    partial.append((op.param, op.leaves[0]))
                else:
                    op.steps.append(("vary", None))
    return partial


def _scatter(call: Call, outcome: Outcome, out: Any) -> Outcome:
    """Leave a sum over ``tp`` split along the sequence, where sequence parallelism is on."""
    sequence, outs = call.scene.sequence, tensors(out)
    if not call.scene.scatter or len(sequence) != 1 or len(outs) != 1:
        return outcome
    layout = sequence[0]
    assert layout.dim is not None
    cp, tp = call.scene.degrees
    mean = outcome.kind == "partial" and outcome.value != "sum"
    if mean or outs[0].shape[layout.dim] // layout.outer % (cp * tp):
        return outcome
    biased = outcome.kind == "rowwise" and any(op.exempt for op in call.operands)
    if biased and layout.dim == outs[0].ndim - 1:
        return outcome  # the sequence is what the bias is as long as
    for op in call.operands:
        op.exempt = False  # a bias, added to a part of the tokens
    return replace(outcome, layouts=layout, scatter=layout)


def _mixing(call: Call) -> ShardingError | None:
    """Return the refusal of a call inside a block that needs the whole sequence."""
    gathered = any(step == "gather" for op in call.operands for step, _ in op.steps)
    if not gathered or not call.scene.in_block:
        return None
    return ShardingError(
        f"'{call.name}' inside a block needs the whole sequence, which cp={call.degree} splits"
        f"{user_line()}\n"
        f"  operands: {shown(call)}\n"
        "  options: F.scaled_dot_product_attention for attention | cp=1"
    )


def _action(
    parts: Sequence[_Part], layouts: Sequence[Sharding], outs: Sequence[Tensor]
) -> Action | None:
    fixes = _fixes(parts)
    busy = [p for p in parts if p.outcome.kind != "call"]
    kinds = {p.outcome.kind for p in busy}
    call = parts[0].call
    if not busy:
        return Action(call.name, fixes=fixes) if fixes else None
    if len(kinds) > 1:
        raise ShardingError(
            f"'{call.name}' is split over two axes in ways that do not go together{user_line()}\n"
            f"  operands: {shown(call)}\n  options: annotate less of this module"
        )
    kind, value, scatter = busy[0].outcome.kind, busy[0].outcome.value, None
    if kind in ("reshape", "expand"):
        degrees = call.scene.degrees
        value = local_shape(tuple(outs[0].shape), layouts[0], degrees)
    elif kind in ("partial", "rowwise"):
        value = (value, tuple(p.axis for p in busy))
    elif kind == "cross_entropy":
        value = _merge_losses(busy)
    for p in busy:
        scatter = p.outcome.scatter if p.outcome.scatter is not None else scatter
    soft = not fixes and all(p.outcome.soft or p.trivial for p in parts)
    return Action(call.name, kind, fixes, value, soft, scatter)


def _merge_losses(parts: Sequence[_Part]) -> Any:
    """Return (classes in all if an axis splits them, the axes that split the tokens and how)."""
    classes = next((p.outcome.value for p in parts if isinstance(p.outcome.value, int)), None)
    tokens = tuple((p.axis, p.outcome.value) for p in parts if isinstance(p.outcome.value, Layout))
    return classes, tokens


def _fixes(parts: Sequence[_Part]) -> tuple[Fix, ...]:
    """Join the steps of all axes for each operand: ``tp`` leaves first and enters last."""
    by_leaves: dict[tuple[int, ...], list[tuple[str, str, Any]]] = {}
    for p in reversed(parts):  # tp, then cp
        for op in p.call.operands:
            own = [(name, p.axis, arg) for name, arg in _fused(op)]
            before = by_leaves.get(op.leaves, [])
            inner = [s for s in before if s[0].startswith("gather")]
            after = before[len(inner) :]
            moved = any(s[2].dim == op.other.dim for s in own if isinstance(s[2], Layout))
            if p.axis == "cp" and moved and not inner and op.other.dim is not None:
                inner = [("gather", "tp", op.other)]  # tp holds parts of what cp joins
                after = [("split", "tp", op.other), *after]
            by_leaves[op.leaves] = [*inner, *own, *after]
    return tuple(Fix(leaves, tuple(steps)) for leaves, steps in by_leaves.items() if steps)


def _fused(op: Operand) -> list[tuple[str, Any]]:
    """Turn a gather whose result varies at once into one step: its backward is cheaper."""
    steps = op.steps
    if [name for name, _ in steps[:2]] == ["gather", "vary"]:
        return [("gather_vary", steps[0][1]), *steps[2:]]
    return steps

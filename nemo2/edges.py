"""Changes of layout at the edges of modules: where the split sequence begins, ends and is joined.

Context parallelism enters at the first block and ends after the last, or in the loss. A tensor
that several calls of one module gather is gathered once, where the module gets it, so that the
module's own code sees whole sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from .errors import PipelineError, ShardingError
from .lengths import Lengths
from .sharding.layout import AXES, Layout
from .sharding.rules import is_query
from .trace import Activation, Entry, Event, Input, Trace

Edge = tuple[str, int]


def context_entries(
    lengths: Lengths, block: str, cp: int, tp: int, balance: bool
) -> dict[Edge, tuple[Entry, ...]]:
    """Return what splits the hidden states over ``cp`` where the first block gets them.

    Args:
        tp: parts into which sequence parallelism splits what is left; 1 without it.

    Raises: ShardingError when no argument of the block has a sequence, or it does not divide.
    """
    first = next(a for a in lengths.trace.root.walk() if (a.module, a.ordinal) == (block, 0))
    dims = lengths.inputs.get((block, 0), {})
    able = [x for x in first.inputs if len(dims.get(x.leaf, ())) == 1 and x.floating]
    flat = [x for x in able if dims[x.leaf][0].outer > 1]
    if flat:
        raise ShardingError(
            f"cp={cp}: the first block '{block}' gets a flatten of batch and sequence, of shape"
            f" {flat[0].shape}\n  options: pass (batch, sequence, width) to the blocks | cp=1"
        )
    # Plain tensors (masks, rotary tables) keep their global meaning and are cut where they are
    # used; a plain hidden state is the input of a model that starts with its blocks.
    chosen = [x for x in able if x.absent] or [x for x in able if len(x.shape) > 2][:1]
    if not chosen:
        raise ShardingError(
            f"cp={cp}: no argument of the first block '{block}' has one dim that follows the"
            " length of the batch's sequence\n"
            "  options: pass hidden states of shape (batch, sequence, width) to the blocks | cp=1"
        )
    entries = tuple(_entry(x, dims[x.leaf][0].dim or 0, cp, tp, balance) for x in chosen)
    return {(block, 0): entries}


def _entry(x: Input, dim: int, cp: int, tp: int, balance: bool) -> Entry:
    size, parts = x.shape[dim], cp * (2 if balance else 1)
    if size % parts:
        fits = [n for n in range(1, min(size, 64) + 1) if size % (n * parts // cp) == 0]
        sizes = f"cp in {{{', '.join(map(str, fits))}}} | " if fits else ""
        balanced = f" ({parts} parts, to balance causal work)" if balance else ""
        plain = " | ContextParallel(balance=False)" if size % cp == 0 else ""
        raise ShardingError(
            f"the sequence of {size} does not divide by cp={cp}{balanced}: {size} % {parts} ="
            f" {size % parts}\n"
            f"  options: {sizes}a sequence of {-(-size // parts) * parts}{plain}"
        )
    axes = ("cp", "tp") if tp > 1 and size % (cp * tp) == 0 else ("cp",)
    steps = tuple(("split", axis, Layout(dim)) for axis in axes)
    return Entry(x.leaf, steps, x.shape, x.dtype, x.absent)


def exits_needed(trace: Trace, block: str) -> dict[Edge, tuple[str, ...]]:
    """Return over which axes the last block's output is to be gathered at once.

    Where code after the blocks would gather something larger than the hidden states (logits),
    it is better to gather those.
    """
    order = list(trace.root.walk())
    last = next((a for a in order if (a.module, a.ordinal) == (block, 0)), None)
    if last is None:
        return {}
    inside = set(map(id, last.walk()))
    born = {v.key: v.absent for v in trace.values}
    outs = [born[key] for key in last.outputs if key in born]
    if not outs:
        return {}
    hidden = max(prod(x.meta.shape) for x in outs)
    split = {a for x in outs for a, lay in zip(AXES, x.layouts, strict=True) if lay.dim is not None}
    end = max((e.number for a in last.walk() for e in a.events()), default=-1)
    found = {
        axis
        for a in order
        if id(a) not in inside
        for event in a.events()
        if event.number > end
        for axis, size in _gathers(event)
        if size > hidden
    }
    for x, layouts in zip(trace.output_shapes, trace.output_layouts, strict=True):
        if prod(x) > hidden:
            found |= {a for a, lay in zip(AXES, layouts, strict=True) if lay.dim is not None}
    axes = tuple(a for a in AXES if a in found & split)
    return {(block, 0): axes} if axes else {}


def _gathers(event: Event) -> Iterator[tuple[str, int]]:
    for fix in event.action.fixes if event.action is not None else ():
        index = event.operand_leaves.index(fix.leaves)
        for step, axis, _ in fix.steps:
            if step.startswith("gather"):
                yield axis, prod(event.global_shapes[index])


def shared_gathers(trace: Trace) -> dict[Edge, tuple[Entry, ...]]:
    """Return the gathers over ``tp`` that move to the edge of the module that needs the whole.

    A value moves to the outermost module that gets it as an argument, does not return it, and in
    which every use gathers it: more than one use, or one and a question for its size.
    """
    moved: dict[Edge, tuple[Entry, ...]] = {}
    _search(trace.root, moved)
    by_module: dict[str, set[tuple[Entry, ...]]] = {}
    for a in trace.root.walk():
        by_module.setdefault(a.module, set()).add(moved.get((a.module, a.ordinal), ()))
    return {edge: own for edge, own in moved.items() if len(by_module[edge[0]]) == 1}


def _search(activation: Activation, moved: dict[Edge, tuple[Entry, ...]]) -> None:
    for child in activation.children():
        if child.leaf:
            continue
        # What crosses to another stage is named by what made it, and no edge around blocks did.
        holds = child.block is None and any(a.block is not None for a in child.walk())
        able = () if holds else child.inputs
        entries = tuple(e for x in able if (e := _movable(child, x)) is not None)
        if entries:
            moved[child.module, child.ordinal] = entries
        else:
            _search(child, moved)


def _movable(activation: Activation, x: Input) -> Entry | None:
    if not x.absent or x.key is None or x.key in activation.outputs:
        return None
    if sum(y.key == x.key for y in activation.inputs) > 1:
        return None
    uses, asked, found = 0, 0, None
    for a in activation.walk():
        for event in a.events():
            for (key, _), leaves in zip(event.operands, event.operand_leaves, strict=True):
                if key != x.key:
                    continue
                if is_query(event.name):
                    asked += not a.leaf
                    continue
                gather = _whole_gather(event, leaves)
                if gather is None or (found is not None and found != gather):
                    return None
                uses, found = uses + 1, gather
                dtype = event.dtype
                grad = event.wants_grad[event.operand_leaves.index(leaves)]
    if found is None or uses + bool(asked) < 2 or dtype is None:
        return None
    return Entry(x.leaf, (found,), x.shape, dtype, grad)


def _whole_gather(event: Event, leaves: tuple[int, ...]) -> tuple[str, str, Layout] | None:
    """Return the one step of an operand, if it is a gather over ``tp`` whose result varies."""
    if event.action is None:
        return None
    steps: Sequence[tuple[str, str, Layout]] = next(
        (f.steps for f in event.action.fixes if f.leaves == leaves), ()
    )
    single = len(steps) == 1 and steps[0][0] == "gather_vary" and steps[0][1] == "tp"
    return steps[0] if single else None


def check_blocks(blocks: Sequence[str], cp: int) -> None:
    """Raise when context parallelism does not know where the split sequence begins."""
    if cp > 1 and not blocks:
        raise PipelineError(
            f"cp={cp}: the sequence is split inside a list of blocks, and none is annotated\n"
            '  options: shard(self.layers, "pp") on the ModuleList of blocks (pp=1 too) | cp=1'
        )

"""Which dims are the sequence: found by running the step with two lengths and comparing shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pytree import tree_flatten, tree_unflatten
from .sharding.layout import Layout
from .trace import Trace, paired


@dataclass(frozen=True)
class Lengths:
    """Where sizes follow the length of the sequence.

    Attributes:
        trace: of the whole batch, with every axis of one rank.
        calls: number of a torch call -> where in its first result it is, as layouts.
        inputs: (module, n-th call) -> leaf of its arguments -> where it is.
    """

    trace: Trace
    calls: Mapping[int, tuple[Layout, ...]]
    inputs: Mapping[tuple[str, int], Mapping[int, tuple[Layout, ...]]]


def find_lengths(batch: Any, record: Callable[[Any], Trace]) -> Lengths | None:
    """Return the sequence dims of a step, or None when its batch has no sequence to shorten.

    Args:
        record: plans the step on a batch, with every axis of one rank.
    """
    whole = record(batch)
    for missing, other in _shorter(batch):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                short = record(other)
        except Exception:  # the user's code needs what was cut
            continue
        found = _compare(whole, short, missing)
        if found is not None:
            return found
    return None


def _shorter(batch: Any) -> Iterator[tuple[int, Any]]:
    """Yield how much is missing, and the batch so cut: its first tensor's second dim, everywhere
    where that size is.

    At the end, then at the start: a padding mask that is full from there on may lead elsewhere.
    """
    leaves, spec = tree_flatten(batch)
    first = next((x for x in leaves if isinstance(x, Tensor) and x.ndim > 1), None)
    if first is None or first.shape[1] < 3:
        return
    size = first.shape[1]
    lengths = (size // 2, size - 1)
    for start, length in [(0, n) for n in lengths] + [(size - n, n) for n in lengths]:
        for everywhere in (True, False):  # a width may equal the length
            cut = [_cut(x, size, start, length, everywhere) for x in leaves]
            yield size - length, tree_unflatten(spec, cut)


def _cut(x: Any, size: int, start: int, length: int, everywhere: bool) -> Any:
    if not isinstance(x, Tensor):
        return x
    for dim in range(1, x.ndim if everywhere or x.dtype == torch.bool else min(2, x.ndim)):
        if x.shape[dim] == size:
            x = x.narrow(dim, start, length).contiguous()
    return x


def _compare(whole: Trace, short: Trace, missing: int) -> Lengths | None:
    """Return the dims that differ, if both runs made the same calls."""
    events = paired(whole, short)
    if events is None:
        return None
    calls = {}
    for one, other in events:
        if one.output_shapes and other.output_shapes:
            dims = _differing(one.output_shapes[0], other.output_shapes[0], missing)
            if dims:
                calls[one.number] = dims
    inputs: dict[tuple[str, int], dict[int, tuple[Layout, ...]]] = {}
    for this, that in zip(whole.root.walk(), short.root.walk(), strict=True):
        own = {x.leaf: x.shape for x in that.inputs}
        found = {x.leaf: _differing(x.shape, own.get(x.leaf, ()), missing) for x in this.inputs}
        inputs[this.module, this.ordinal] = {leaf: dims for leaf, dims in found.items() if dims}
    return Lengths(whole, calls, inputs) if calls else None


def _differing(a: tuple[int, ...], b: tuple[int, ...], missing: int) -> tuple[Layout, ...]:
    """Return the dims that differ; one that lost ``n * missing`` is a flatten of ``(n, sequence)``.

    Sizes that follow the length in another way (patches) count as sequences of their own.
    """
    pairs = [(d, x, x - y) for d, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
    return tuple(
        Layout(d, lost // missing if lost % missing == 0 and x % (lost // missing) == 0 else 1)
        for d, x, lost in pairs
    )

"""Spreading blocks over stages so that no stage is slower than it must be."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor, nn

from ..options import Pipeline
from ..places import within
from .timetable import most_held, step_time


def block_costs(
    model: nn.Module, blocks: Sequence[str], size: Callable[[Tensor], int]
) -> list[int]:
    """Estimate what each block costs a token, with what the first and last stage run besides.

    A weight of two or more dims costs its number of elements, as a matrix product takes two FLOPs
    a token for each (a convolution takes more, a mixture's expert less: what is alike in all
    blocks does not matter). A table that is looked up costs nothing, so an embedding is free and
    a head tied to it costs where the head is. What is registered before the blocks counts with
    the first one, what comes after with the last, because those never leave the end stages.

    Args:
        size: elements of a parameter that one rank multiplies with.
    """
    if not blocks:
        return []
    costs = [0] * len(blocks)
    block, index = "", 0
    for name, module in model.named_modules(remove_duplicate=False):
        if index < len(blocks) and name == blocks[index]:
            block, index = name, index + 1
        inside = bool(block) and within(name, block)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        weights = [p for p in module._parameters.values() if p is not None and p.ndim > 1]
        where = index - 1 if inside else -1 if index else 0
        costs[where] += sum(size(w) for w in weights)
    return costs


def spread(costs: Sequence[int], stages: int) -> list[int]:
    """Return how many of the blocks, in order, each stage takes: at least one.

    No other split has a smaller largest cost of a stage. Among those that have the same, numbers
    are as even as possible; what is left over goes to middle stages first (the first stage holds
    most activations, the last computes the loss).

    >>> spread([1] * 7, 4)
    [2, 2, 2, 1]
    >>> spread([1, 1, 1, 1, 1, 4], 2)  # a head as heavy as three blocks
    [4, 2]
    """
    totals = [0]
    for cost in costs:
        totals.append(totals[-1] + cost)

    def fits(limit: int) -> bool:
        used, start = 0, 0
        while start < len(costs) and used <= stages:
            end = start
            while end < len(costs) and totals[end + 1] - totals[start] <= limit:
                end += 1
            used, start = used + 1, end
        return used <= stages

    lowest = max(costs)
    limit = lowest + bisect_left(range(totals[-1] - lowest), True, key=lambda x: fits(lowest + x))

    @cache
    def best(start: int, left: int) -> tuple[int, int, int, tuple[int, ...]] | None:
        """Return (sum of squares, last, first, minus the counts) of the best split of the rest."""
        if left == 0:
            return (0, 0, 0, ()) if start == len(costs) else None
        found = None
        for end in range(start + 1, len(costs) - left + 2):
            if totals[end] - totals[start] > limit:
                break
            rest = best(end, left - 1)
            if rest is not None:
                count = end - start
                last = rest[1] if left > 1 else count
                first = count if left == stages else 0
                made = (rest[0] + count**2, last, first, (-count, *rest[3]))
                found = made if found is None else min(found, made)
        return found

    split = best(0, stages)
    assert split is not None
    return [-count for count in split[3]]


def spread_interleaved(costs: Sequence[int], pp: int, pipeline: Pipeline) -> list[int]:
    """Return how many of the blocks, in order, each virtual stage takes: at least one.

    Found by running through the schedule: from the split that ``spread`` gives, single blocks move
    to other stages while the step gets shorter, or as long a step keeps fewer activations. Moves
    off the busiest ranks, and to later stages, are tried first. No rank keeps more than a quarter
    more activations than with ``spread``'s split.

    >>> spread_interleaved([3] * 7 + [11], 2, Pipeline(8, "interleaved", 2))  # a heavy head
    [1, 2, 4, 1]
    """
    first = counts = spread(costs, pp * pipeline.virtual_stages)
    # Longer steps repeat what a few rounds of microbatches show.
    rounds = max(1, pipeline.microbatches // pp)
    microbatches = pp * min(rounds, _ROUNDS)
    tries = _TURNS // (2 * microbatches * len(counts))
    held = most_held(counts, pp, microbatches)
    now, most = (_time(costs, counts, pp, microbatches), held), held + held // 4
    moves = _moves(costs, counts, pp)
    while moves and tries:
        source, target = moves.pop(0)
        changed = list(counts)
        changed[source] -= 1
        changed[target] += 1
        held, tries = most_held(changed, pp, microbatches), tries - 1
        if held <= most and (price := (_time(costs, changed, pp, microbatches), held)) < now:
            now, counts = price, changed
            moves = _moves(costs, counts, pp)
    if rounds > _ROUNDS and _time(costs, counts, pp, pp * rounds) > _time(
        costs, first, pp, pp * rounds
    ):
        return first
    return counts


_ROUNDS, _TURNS = 4, 1_000_000  # the most forwards and backwards gone through: a second or two


def _time(costs: Sequence[int], counts: Sequence[int], pp: int, microbatches: int) -> int:
    return step_time(_of_stages(costs, counts), pp, microbatches)


def _moves(costs: Sequence[int], counts: Sequence[int], pp: int) -> list[tuple[int, int]]:
    """Return the pairs of stages, from and to, between which a block can move."""
    stages = _of_stages(costs, counts)
    load = [sum(stages[rank::pp]) for rank in range(pp)]
    pairs = itertools.permutations(range(len(counts)), 2)
    found = [(source, target) for source, target in pairs if counts[source] > 1]
    return sorted(found, key=lambda x: (load[x[1] % pp] - load[x[0] % pp], x[0] - x[1]))


def _of_stages(costs: Sequence[int], counts: Sequence[int]) -> list[int]:
    ends = list(itertools.accumulate(counts))
    return [sum(costs[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def bubble_share(pp: int, pipeline: Pipeline) -> float:
    """Return the share of a step in which a pipeline rank waits, if all stages take as long.

    Of ``virtual_stages * microbatches`` forwards and backwards of a stage, a rank waits for as
    many as ``pp - 1`` take. Transfers take nothing.
    Source: arXiv 2104.04473, section 2.2, where it is divided by the time of the work alone.

    >>> bubble_share(4, Pipeline(microbatches=9))
    0.25
    """
    return (pp - 1) / (pipeline.virtual_stages * pipeline.microbatches + pp - 1)

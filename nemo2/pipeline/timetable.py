"""How long a step takes under a pipeline schedule, found by running through it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=256)
def turns(rank: int, pp: int, chunks: int, microbatches: int) -> Sequence[tuple[bool, int, int]]:
    """Return what a rank runs in turn under interleaved 1F1B: (forward or not, chunk, microbatch).

    Microbatches go through a chunk in groups of ``pp``, which must divide them.
    Source: megatron-core's ``get_schedule_table`` and ``get_pp_rank_microbatches``; arXiv
    2104.04473, section 2.2.
    """
    total = chunks * microbatches
    table = [
        (chunk, microbatch)
        for first in range(0, microbatches, pp)
        for chunk in range(chunks)
        for microbatch in range(first, first + pp)
    ]
    warmup = min((pp - rank - 1) * 2 + (chunks - 1) * pp, total)
    forwards = [(True, *x) for x in table]
    backwards = [(False, chunks - 1 - chunk, microbatch) for chunk, microbatch in table]
    made = forwards[:warmup]
    for pair in zip(forwards[warmup:], backwards, strict=False):
        made += pair
    return made + backwards[total - warmup :]


def step_time(costs: Sequence[int], pp: int, microbatches: int) -> int:
    """Return when the last rank has ended, in units of ``costs``.

    Args:
        costs: of the forward of each virtual stage; stage i is on rank i % pp. A backward takes
            twice as long, a transfer nothing.
    """
    last = len(costs) - 1
    left = [iter(turns(rank, pp, len(costs) // pp, microbatches)) for rank in range(pp)]
    following = [next(turn) for turn in left]
    clock = [0] * pp
    # When the input of a stage's forwards and backwards arrives; what is missing has not yet.
    inputs: dict[tuple[bool, int, int], int] = {(True, 0, i): 0 for i in range(microbatches)}
    running = list(range(pp))
    while running:
        for rank in running:
            forward, chunk, microbatch = following[rank]
            stage = chunk * pp + rank
            since = inputs.pop((forward, stage, microbatch), None)
            while since is not None:
                clock[rank] = max(clock[rank], since) + costs[stage] * (1 if forward else 2)
                if forward:
                    goes = (True, stage + 1) if stage < last else (False, stage)
                else:
                    goes = False, stage - 1
                inputs[(*goes, microbatch)] = clock[rank]
                following[rank] = next(left[rank], (False, -1, 0))
                forward, chunk, microbatch = following[rank]
                stage = chunk * pp + rank
                since = inputs.pop((forward, stage, microbatch), None) if chunk >= 0 else None
        running = [rank for rank in running if following[rank][1] >= 0]
    return max(clock)


def most_held(counts: Sequence[int], pp: int, microbatches: int) -> int:
    """Return of how many blocks a rank keeps the activations of a microbatch at once, at most."""
    most = 0
    for rank in range(pp):
        held = 0
        for forward, chunk, _ in turns(rank, pp, len(counts) // pp, microbatches):
            held += counts[chunk * pp + rank] * (1 if forward else -1)
            most = max(most, held)
    return most

"""Blocks over stages: no split is better, and what is outside the blocks counts where it runs."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nemo2
from nemo2 import Pipeline, PipelineError, shard
from nemo2.pipeline import timetable
from nemo2.pipeline.balance import block_costs, spread, spread_interleaved
from tests.models import GPT, VOCAB, WIDTH


def every_split(blocks: int, stages: int) -> list[list[int]]:
    cuts = itertools.combinations(range(1, blocks), stages - 1)
    return [[b - a for a, b in itertools.pairwise((0, *cut, blocks))] for cut in cuts]


def slowest(costs: list[int], counts: list[int]) -> int:
    ends = list(itertools.accumulate(counts))
    return max(sum(costs[end - count : end]) for end, count in zip(ends, counts, strict=True))


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=9), st.data())
def test_no_split_is_better_and_none_as_good_is_more_even(costs: list[int], data: st.DataObject):
    stages = data.draw(st.integers(1, len(costs)))
    found = spread(costs, stages)
    assert found in every_split(len(costs), stages)
    best = min(slowest(costs, s) for s in every_split(len(costs), stages))
    assert slowest(costs, found) == best
    as_good = [s for s in every_split(len(costs), stages) if slowest(costs, s) == best]
    assert sum(n * n for n in found) == min(sum(n * n for n in s) for s in as_good)


@pytest.mark.parametrize(
    ("blocks", "stages", "expected"),
    [(5, 2, [3, 2]), (7, 4, [2, 2, 2, 1]), (5, 4, [1, 2, 1, 1]), (6, 4, [1, 2, 2, 1])],
)
def test_what_is_left_over_goes_to_middle_stages(blocks: int, stages: int, expected: list[int]):
    assert spread([10**9] * blocks, stages) == expected


def test_many_stages_take_no_time():
    counts = spread([3 * 10**9] * 127 + [7 * 10**9], 64)
    assert sorted(counts) == [1, *[2] * 62, 3]
    assert counts[-1] == 1


@pytest.mark.parametrize(("pp", "chunks", "microbatches"), [(2, 2, 4), (4, 2, 8), (3, 4, 3)])
def test_the_timetable_is_megatrons(pp: int, chunks: int, microbatches: int):
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    table = schedules.get_schedule_table(microbatches, chunks, pp)
    for rank in range(pp):
        sizes = {
            "get_pipeline_model_parallel_world_size": pp,
            "get_pipeline_model_parallel_rank": rank,
            "get_virtual_pipeline_model_parallel_world_size": chunks,
        }
        with mock.patch.multiple(parallel_state, **{k: lambda v=v: v for k, v in sizes.items()}):
            found = schedules.get_pp_rank_microbatches(microbatches, chunks, pp)
        backwards = [(chunks - 1 - chunk, microbatch) for microbatch, chunk in table]
        want = [(True, chunk, microbatch) for microbatch, chunk in table[: found[2]]]
        for i, (microbatch, chunk) in enumerate(table[found[2] :]):
            want += [(True, chunk, microbatch), (False, *backwards[i])]
        want += [(False, *x) for x in backwards[len(table) - found[2] :]]
        assert timetable.turns(rank, pp, chunks, microbatches) == want


def test_a_step_by_hand():
    """Two ranks, two chunks of one unit each, two microbatches.

    Rank 1 starts at 1 and has nothing to wait for until its last forward, then for no backward.
    """
    assert timetable.step_time([1, 1, 1, 1], 2, 2) == 1 + 4 * 3 + 2
    assert timetable.step_time([1, 1, 1, 3], 2, 2) > 1 + (1 + 3) * 3 * 2
    assert timetable.most_held([1, 1, 1, 1], 2, 2) == 4
    assert timetable.most_held([1, 1, 2, 1], 2, 2) == 6


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 5), min_size=4, max_size=8), st.integers(1, 4))
def test_no_moved_block_makes_a_step_shorter_and_keeps_few_activations(
    costs: list[int], rounds: int
):
    pipeline = Pipeline(2 * rounds, "interleaved", 2)
    found = spread_interleaved(costs, 2, pipeline)
    assert found in every_split(len(costs), 4)

    def time(counts: list[int]) -> int:
        ends = list(itertools.accumulate(counts))
        stages = [sum(costs[end - n : end]) for end, n in zip(ends, counts, strict=True)]
        return timetable.step_time(stages, 2, 2 * rounds)

    def held(counts: list[int]) -> int:
        return timetable.most_held(counts, 2, 2 * rounds)

    assert time(found) <= time(spread(costs, 4))
    assert 4 * held(found) <= 5 * held(spread(costs, 4))
    for i, j in itertools.permutations(range(4), 2):
        moved = [n + (k == j) - (k == i) for k, n in enumerate(found)]
        if min(moved) and time(moved) < time(found):
            assert 4 * held(moved) > 5 * held(spread(costs, 4))


@pytest.mark.parametrize(
    ("layers", "pp", "head", "share"),
    [(8, 2, 266, 0.88), (16, 4, 266, 0.95), (16, 4, 100, 0.95), (16, 4, 0, 1.0)],
)
def test_ranks_rather_than_their_chunks_are_balanced(layers: int, pp: int, head: int, share: float):
    """A head makes the last chunk the largest whatever is done; its rank can take less else."""
    costs, pipeline = [100] * (layers - 1) + [100 + head], Pipeline(4 * pp, "interleaved", 2)
    found, even = spread_interleaved(costs, pp, pipeline), spread(costs, 2 * pp)
    times = []
    for counts in (found, even):
        stages = [100 * n for n in counts]
        stages[-1] += head
        times.append(timetable.step_time(stages, pp, 4 * pp))
    assert times[0] <= share * times[1]
    assert head or found == even


def names(model: nn.Module) -> list[str]:
    return [f"layers.{i}" for i in range(len(model.layers))]


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_costs_and_the_embedding_does_not(tied: bool):
    model = GPT(4, tied=tied)
    block = sum(p.numel() for p in model.layers[0].parameters() if p.ndim > 1)
    costs = block_costs(model, names(model), lambda p: p.numel())
    assert costs == [block, block, block, block + VOCAB * WIDTH]


class Heavy(nn.Module):
    """Blocks between projections and a head that weigh ``before`` and ``after`` blocks."""

    def __init__(self, layers: int, before: int, after: int) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 8)
        self.first = nn.ModuleList(nn.Linear(8, 8) for _ in range(before))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(after))
        shard(self.layers, "pp")


@pytest.mark.parametrize(
    ("before", "after", "mesh", "pipeline", "expected"),
    [
        (0, 0, "pp=2", nemo2.Pipeline(), [4, 4]),
        (0, 2, "pp=2", nemo2.Pipeline(), [5, 3]),
        (2, 0, "pp=2", nemo2.Pipeline(), [3, 5]),
        (2, 2, "pp=4", nemo2.Pipeline(), [1, 3, 3, 1]),
        (0, 6, "pp=3", nemo2.Pipeline(), [3, 4, 1]),
        (0, 2, "pp=2", nemo2.Pipeline(2, "interleaved", 2), [1, 3, 3, 1]),
        (0, 2, "pp=2", nemo2.Pipeline(2, "interleaved", 2, (1, 1, 1, 5)), [1, 1, 1, 5]),
        (2, 2, "pp=1", nemo2.Pipeline(), [8]),
    ],
)
def test_embedding_and_head_do_not_slow_their_stages(before, after, mesh, pipeline, expected):
    plan = nemo2.plan(Heavy(8, before, after), mesh, pipeline=pipeline)
    assert [s.count for s in plan.stages] == expected


def test_a_weight_that_tensor_parallelism_splits_costs_a_part():
    model = Heavy(8, 0, 4)
    assert [s.count for s in nemo2.plan(model, "pp=2,tp=2").stages] == [6, 2]
    for layer in model.head:
        shard(layer.weight, "tp", dim=0)
    assert [s.count for s in nemo2.plan(model, "pp=2,tp=2").stages] == [5, 3]


def test_more_stages_than_blocks_are_refused_with_sizes_that_work():
    with pytest.raises(PipelineError, match=r"3 blocks over pp=4 stages: .*\n.*pp in \[1, 2, 3\]"):
        nemo2.plan(GPT(), "pp=4")
    five = r"5 blocks over pp=2 stages with virtual_stages=3.*\n.*virtual_stages=2 \| .*pp in \[1\]"
    with pytest.raises(PipelineError, match=five):
        nemo2.plan(GPT(5), "pp=2", pipeline=nemo2.Pipeline(2, "interleaved", 3))


def test_plans_on_meta():
    with torch.device("meta"):
        model = Heavy(8, 0, 2)
    assert [s.count for s in nemo2.plan(model, "pp=2").stages] == [5, 3]

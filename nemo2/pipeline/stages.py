"""Which blocks and parameters each pipeline stage holds, and what crosses between stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PipelineError
from ..sharding.layout import local_shape
from ..trace import Trace


@dataclass(frozen=True)
class StagePlan:
    """One stage: the range of blocks that it runs."""

    index: int
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Crossing:
    """A value that one stage sends to the next, for one microbatch.

    Attributes:
        key: how each stage finds it: ``("out", module, n-th call, leaf)`` or ``("call", n, leaf)``.
        shape: global shape; ``local_shape``: what travels on one rank.
    """

    key: tuple[Any, ...]
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


def block_names(model: nn.Module, lists: Sequence[str], pp: int) -> tuple[str, ...]:
    """Return the names of the pipeline blocks of ``model``, in list order."""
    if not lists:
        if pp > 1:
            raise PipelineError(
                f"cannot split the model over pp={pp} stages: no list of blocks is annotated\n"
                '  options: shard(self.layers, "pp") on the ModuleList of blocks | pp=1'
            )
        return ()
    if len(lists) > 1:
        raise PipelineError(
            f'several lists of blocks are annotated "pp": {", ".join(lists)}\n'
            "  options: annotate one of them (the others then run on the stage of their neighbours)"
        )
    container = model.get_submodule(lists[0])
    prefix = f"{lists[0]}." if lists[0] else ""
    return tuple(prefix + name for name, _ in container.named_children())


def split_blocks(
    blocks: int, pp: int, layers_per_stage: Sequence[int] | None
) -> tuple[StagePlan, ...]:
    """Spread blocks over ``pp`` stages; what does not divide goes to middle stages first."""
    if pp == 1:
        return (StagePlan(0, 0, blocks - 1),)
    if layers_per_stage is not None:
        counts = list(layers_per_stage)
        if len(counts) != pp or sum(counts) != blocks or any(c < 1 for c in counts):
            raise PipelineError(
                f"layers_per_stage={tuple(layers_per_stage)} does not fit"
                f" {blocks} blocks on pp={pp} stages\n"
                f"  it needs {pp} numbers >= 1 whose sum is {blocks}"
            )
    else:
        if blocks < pp:
            raise PipelineError(
                f"cannot split {blocks} blocks over pp={pp} stages: each stage needs one\n"
                f"  options: pp in {list(range(1, blocks + 1))}"
            )
        counts = [blocks // pp] * pp
        favoured = [*range(1, pp - 1), 0, pp - 1]
        for stage in favoured[: blocks % pp]:
            counts[stage] += 1
    stages, first = [], 0
    for index, count in enumerate(counts):
        stages.append(StagePlan(index, first, first + count - 1))
        first += count
    return tuple(stages)


def stage_of(position: int, stages: Sequence[StagePlan]) -> int:
    """Return the stage of a position among the blocks (-1 is before the first block)."""
    return next((s.index for s in stages if position <= s.last), stages[-1].index)


def expected_stages(
    model: nn.Module, names: Sequence[str], blocks: Sequence[str], stages: Sequence[StagePlan]
) -> tuple[int, ...]:
    """Say which stages hold a parameter known under ``names``, by where it is registered.

    Parameters of a block go with it; others to the first stage when their module comes
    before the blocks in the model, to the last when after. The step's plan checks it.
    """
    if len(stages) == 1:
        return (0,)
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    start = min(order[b] for b in blocks)
    found = set()
    for name in names:
        owner = name.rpartition(".")[0]
        block = next(
            (i for i, b in enumerate(blocks) if owner == b or owner.startswith(b + ".")), None
        )
        if block is not None:
            found.add(stage_of(block, stages))
        else:
            found.add(0 if order[owner] < start else stages[-1].index)
    return tuple(sorted(found))


def crossings(trace: Trace, stages: Sequence[StagePlan]) -> tuple[tuple[Crossing, ...], ...]:
    """Return, for each boundary between two stages, the values that must be sent over it."""
    boundaries: list[list[Crossing]] = [[] for _ in stages[1:]]
    for value in trace.values:
        used = {stage_of(p, stages) for p in value.uses}
        born = stage_of(value.born, stages)
        meta = value.absent.meta
        shape = tuple(meta.shape)
        crossing = Crossing(
            value.key,
            shape,
            local_shape(shape, value.absent.layouts, trace.degrees),
            meta.dtype,
            bool(value.absent.needs_grad and meta.is_floating_point()),
        )
        for boundary in range(born, max(used, default=born)):
            boundaries[boundary].append(crossing)
    return tuple(tuple(b) for b in boundaries)

"""Which blocks and parameters each pipeline stage holds, and what crosses between stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PipelineError
from ..mesh.sizes import MeshSizes
from ..options import Pipeline
from ..places import within
from ..sharding.layout import local_shape
from ..trace import Trace
from .balance import spread, spread_interleaved


@dataclass(frozen=True)
class StagePlan:
    """One stage: the range of blocks that it runs, and the pipeline rank that runs it.

    With interleaving a rank runs several (virtual) stages: stage ``c * pp + r`` is its chunk c.
    """

    index: int
    first: int
    last: int
    rank: int = 0

    @property
    def count(self) -> int:
        return self.last - self.first + 1

    def holds(self, block: int) -> bool:
        return self.first <= block <= self.last


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


def block_names(model: nn.Module, lists: Sequence[str], sizes: MeshSizes) -> tuple[str, ...]:
    """Return the names of the blocks of ``model``, in list order.

    Raises: PipelineError for several lists, which only meshes without pp and cp take; for blocks
        that are containers, which nobody calls; and on pp > 1 when there are none.
    """
    if not lists and sizes.pp > 1:
        raise PipelineError(
            f"cannot split the model over pp={sizes.pp} stages: no list of blocks is annotated\n"
            '  options: shard(self.layers, "pp") on the ModuleList of blocks | pp=1'
        )
    nested = any(f"{a}.".startswith(f"{b}.") for a in lists for b in lists if a != b)
    if len(lists) > 1 and (sizes.pp * sizes.cp > 1 or nested or "" in lists):
        raise PipelineError(
            f'several lists of blocks are annotated "pp": {", ".join(lists)}\n'
            "  options: annotate one of them (what is called before the first of its blocks, or"
            " after the last, runs with it) | shard(the_other, None) | pp=1 and cp=1"
        )
    blocks = []
    for prefix in lists:
        for name, block in model.get_submodule(prefix).named_children():
            if not is_called(block):
                raise PipelineError(
                    f"'{prefix}' is annotated \"pp\", and its blocks are {type(block).__name__}"
                    " containers, which have no forward and are never called\n"
                    "  options: make a block a module with a forward of its own"
                )
            blocks.append(f"{prefix}.{name}" if prefix else name)
    return tuple(blocks)


def is_called(module: nn.Module) -> bool:
    """Say whether a module has a forward; containers have none."""
    return not isinstance(
        module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    )


def split_blocks(costs: Sequence[int], pp: int, pipeline: Pipeline) -> tuple[StagePlan, ...]:
    """Spread blocks over ``pp`` ranks as ``balance.py`` does, unless ``layers_per_stage`` says.

    Raises: PipelineError when there are more stages than blocks, or when the numbers given do
        not fit.
    """
    if pp == 1:
        return (StagePlan(0, 0, len(costs) - 1),)
    blocks, stages = len(costs), pp * pipeline.virtual_stages
    given = pipeline.layers_per_stage
    virtual = f" with virtual_stages={pipeline.virtual_stages}" if stages > pp else ""
    if given is not None and (len(given) != stages or sum(given) != blocks or min(given) < 1):
        raise PipelineError(
            f"layers_per_stage={tuple(given)} does not fit {blocks} blocks on pp={pp}"
            f" stages{virtual}\n  it needs {stages} numbers >= 1 whose sum is {blocks}"
        )
    if blocks < stages:
        raise PipelineError(
            f"cannot split {blocks} blocks over pp={pp} stages{virtual}: each stage needs one\n"
            f"  options: {_sizes_that_work(blocks, pp, pipeline.virtual_stages)}"
        )
    starts = [0]
    found = given or (
        spread(costs, pp) if stages == pp else spread_interleaved(costs, pp, pipeline)
    )
    for count in found:
        starts.append(starts[-1] + count)
    return tuple(StagePlan(i, starts[i], starts[i + 1] - 1, i % pp) for i in range(stages))


def _sizes_that_work(blocks: int, pp: int, virtual_stages: int) -> str:
    options = []
    if virtual_stages > 1:
        options += [f"virtual_stages={v}" for v in range(blocks // pp, 1, -1)]
        options += [f"schedule='1f1b' with pp in {list(range(1, blocks + 1))}"]
        fits = list(range(1, blocks // virtual_stages + 1))
        return " | ".join([*options, *([f"pp in {fits}"] if fits else [])])
    return f"pp in {list(range(1, blocks + 1))}"


def check_microbatches(microbatches: int, pp: int) -> None:
    """Raise PipelineError unless interleaved 1F1B can train with this many microbatches."""
    if microbatches % pp:
        below = microbatches // pp * pp
        fits = [n for n in (below - pp, below, below + pp, below + 2 * pp) if n > 0]
        raise PipelineError(
            f"interleaved 1F1B on pp={pp} runs rounds of {pp} microbatches, and {microbatches} is"
            f" no multiple of {pp}\n"
            f"  options: microbatches in {fits} | schedule='1f1b', which takes any number"
        )


def stage_of(position: int, stages: Sequence[StagePlan]) -> int:
    """Return the stage of a position among the blocks (-1 is before the first block)."""
    return next((s.index for s in stages if position <= s.last), stages[-1].index)


def block_of(name: str, blocks: Sequence[str]) -> int | None:
    """Return which block holds the parameter or module called ``name``, if one does."""
    return next((i for i, b in enumerate(blocks) if within(name, b)), None)


def ranks_of(indices: Iterable[int], stages: Sequence[StagePlan]) -> tuple[int, ...]:
    """Return the pipeline ranks that run these stages, in the order of the stages."""
    return tuple(dict.fromkeys(stages[i].rank for i in sorted(indices)))


def module_order(model: nn.Module) -> dict[str, int]:
    """Return where each module, by all of its names, comes in the model."""
    return {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}


def expected_stages(
    order: Mapping[str, int],
    names: Sequence[str],
    blocks: Sequence[str],
    stages: Sequence[StagePlan],
) -> tuple[int, ...]:
    """Say for each of ``names`` which stage holds that parameter, by where it is registered.

    Parameters of a block go with it; others to the first stage when their module comes
    before the blocks in the model (in ``order``), to the last when after. The step's plan
    checks it.
    """
    if len(stages) == 1:
        return (0,) * len(names)
    start = min(order[b] for b in blocks)
    found = []
    for name in names:
        owner = name.rpartition(".")[0]
        block = block_of(owner, blocks)
        if block is not None:
            found.append(stage_of(block, stages))
        else:
            found.append(0 if order[owner] < start else stages[-1].index)
    return tuple(found)


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

"""The options of ``parallelize``: small frozen dataclasses, one for each owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import Nemo2Error, PipelineError
from .mesh.sizes import MeshSizes


@dataclass(frozen=True)
class Pipeline:
    """How a step is cut into microbatches and scheduled over stages.

    On a mesh without ``pp`` there is one stage, whatever the schedule.

    Args:
        microbatches: parts of each dp coordinate's batch; its batch size must divide by it.
        schedule: ``"1f1b"``, or ``"interleaved"``: each rank runs several stages, which lie
            apart in the model, so that less of a step is spent waiting, for more transfers
            (overlapped) and more activations held. It trains with a multiple of ``pp``
            microbatches. What a step does before it calls the model, it does once a stage.
        virtual_stages: stages of each rank: 1 with ``"1f1b"``, 2 or more with
            ``"interleaved"``. Stage ``c * pp + r`` is chunk ``c`` of rank ``r``.
        layers_per_stage: number of blocks of each stage in the model's order, ``pp`` (or
            ``pp * virtual_stages``) numbers; ``None`` spreads them so that the slowest stage
            is as fast as possible, embedding and head counted.

    Raises: PipelineError for numbers that are not positive integers, and for a schedule and
        ``virtual_stages`` that contradict each other.
    """

    microbatches: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    layers_per_stage: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("microbatches", "virtual_stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise PipelineError(f"Pipeline({name}={value!r}): give an integer >= 1")
        if self.schedule == "1f1b" and self.virtual_stages > 1:
            raise PipelineError(
                f"Pipeline(schedule='1f1b', virtual_stages={self.virtual_stages}): 1F1B runs one"
                " stage on each rank\n"
                "  options: schedule='interleaved' | virtual_stages=1"
            )
        if self.schedule == "interleaved" and self.virtual_stages == 1:
            raise PipelineError(
                "Pipeline(schedule='interleaved', virtual_stages=1): with one stage on each rank"
                " there is nothing to interleave\n"
                "  options: virtual_stages=2 (or more) | schedule='1f1b'"
            )


@dataclass(frozen=True)
class DataParallel:
    """How parameters, gradients and optimizer state live over ``dp`` (and ``cp``).

    Gradients are reduced once a step, while the last microbatch runs backward; with
    ``reshard=True`` once a microbatch.

    Args:
        kind: ``"ddp"`` keeps all on every rank and all-reduces gradients in buckets. ``"fsdp"``
            splits all (FSDP2): a rank keeps its shard, and gathers a block to use it.
            ``"zero1"`` is ``"fsdp"`` with ``reshard=False``: the optimizer state is split,
            parameters and gradients are whole for the time of a step.
        replicate: number of replicas of the shards (hybrid shard); divides dp * cp. The ranks
            of a replica are neighbours. Shards are gathered and gradients reduce-scattered
            within a replica, then all-reduced over the replicas.
        reshard: when the ranks of ``"fsdp"`` free gathered parameters. ``False``: at the end of
            the step. ``True`` asks for memory: after each forward and each backward of a block,
            and unreduced gradients are not kept from one microbatch to the next; then all dp
            ranks must run the same blocks. ``"auto"``: as ``True`` for one microbatch without
            pipelining, unless the step reads values before it has called all blocks, so that
            ranks may skip some; else as ``False``.

    Parameters of a block may go unused on some ranks under all kinds.
    """

    kind: str = "fsdp"
    replicate: int = 1
    reshard: bool | str = "auto"

    def shards(self, sizes: MeshSizes) -> int:
        """Return over how many ranks a parameter is split."""
        return 1 if self.kind == "ddp" else sizes.dp * sizes.cp // self.replicate

    def keeps(self, sizes: MeshSizes, pipeline: Pipeline) -> bool:
        """Say whether gathered parameters stay until the end of a step."""
        if self.kind == "zero1" or self.reshard is False:
            return True
        return self.reshard == "auto" and (pipeline.microbatches > 1 or sizes.pp > 1)


@dataclass(frozen=True)
class ContextParallel:
    """How attention runs over ``cp``, which splits the sequence inside the blocks.

    Args:
        method: ``"ring"`` passes keys and values from rank to rank, ``"all_gather"`` gathers
            them, ``"ulysses"`` splits heads instead of the sequence for the time of the attention.
        balance: each rank holds one part from the start and one from the end of the sequence, so
            that causal attention is the same work for all.
    """

    method: str = "ring"
    balance: bool = True


@dataclass(frozen=True)
class Compile:
    """How blocks are compiled.

    Args:
        backend: ``"inductor"``, or ``"aot_eager"``, which runs a block's graph as it is, to look
            for errors.
        async_tp: join the collectives of tensor parallelism that nothing hides to the products
            beside them, so that rows travel while others are multiplied. Needs inductor, the
            sequence split over ``tp``, and GPUs that read each other's memory.
    """

    backend: str = "inductor"
    async_tp: bool = False


@dataclass(frozen=True)
class Options:
    """All options of one plan, resolved.

    Attributes:
        sequence_parallel: whether activations between split regions are split over ``tp`` along
            the sequence; ``None`` is on where a sequence is found.
        precision: ``"bf16"`` computes in bfloat16: a run casts float parameters once a step and
            float tensors of the batch. What users, optimizers and checkpoints see stays as it
            was made (float32), and gradients are accumulated over microbatches and reduced over
            ranks in it. Buffers keep their dtype, as under FSDP2.
        remat: ``"full"`` keeps the inputs of each block of the list annotated with ``"pp"``, and
            runs the block again in backward. ``"selective"`` keeps the results of its matrix
            products, too, and so repeats attention and elementwise work.
        compile: how the blocks of the list annotated with ``"pp"`` are compiled; or None.
    """

    data_parallel: DataParallel = DataParallel()
    pipeline: Pipeline = Pipeline()
    context_parallel: ContextParallel = ContextParallel()
    sequence_parallel: bool | None = None
    precision: str | None = None
    remat: str | None = None
    compile: Compile | None = None

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which a run computes with what is held, or given, as ``dtype``."""
        lowered = self.precision == "bf16" and dtype.is_floating_point
        return torch.bfloat16 if lowered else dtype

    def cast(self, x: Any) -> Any:
        """Return a leaf of a batch as a run gets it."""
        return x.to(self.compute_dtype(x.dtype)) if isinstance(x, torch.Tensor) else x

    @staticmethod
    def resolve(
        sizes: MeshSizes,
        data_parallel: str | DataParallel = "fsdp",
        pipeline: Pipeline = Pipeline(),
        context_parallel: str | ContextParallel = "ring",
        sequence_parallel: bool | None = None,
        precision: str | None = None,
        remat: str | None = None,
        compile: bool | str | Compile = False,
        **others: Any,
    ) -> Options:
        """Check the options of ``parallelize`` for ``sizes``.

        Raises: Nemo2Error listing every option that is unknown, each with what works instead.
        """
        dp = DataParallel(data_parallel) if isinstance(data_parallel, str) else data_parallel
        cp = (
            ContextParallel(context_parallel)
            if isinstance(context_parallel, str)
            else context_parallel
        )
        problems = _kinds(dp, cp, pipeline)
        if not problems:  # else there is nothing to look into
            problems = _unknown(cp, pipeline, others) + _data_parallel(sizes, dp)
            problems += _memory(precision, remat)
            problems += _compile(sizes, compile, sequence_parallel)
        if problems:
            raise Nemo2Error("parallelize:\n" + "\n".join(f"  {p}" for p in problems))
        how = _compile_of(compile)
        return Options(dp, pipeline, cp, sequence_parallel, precision, remat, how)


_KNOWN = (
    "data_parallel",
    "pipeline",
    "context_parallel",
    "sequence_parallel",
    "precision",
    "remat",
    "compile",
)


def _kinds(dp: Any, cp: Any, pipeline: Any) -> list[str]:
    """Return what is said of options that are no option objects."""
    given = (
        ("data_parallel", dp, DataParallel, "'fsdp', 'zero1', 'ddp' or DataParallel(...)"),
        ("pipeline", pipeline, Pipeline, "Pipeline(microbatches=4)"),
        ("context_parallel", cp, ContextParallel, "'ring', 'all_gather', 'ulysses'"),
    )
    return [
        f"{name}={x!r}; it is {what}" for name, x, kind, what in given if not isinstance(x, kind)
    ]


def _unknown(cp: ContextParallel, pipeline: Pipeline, others: dict[str, Any]) -> list[str]:
    problems = [f"unknown option {name!r}; options: {', '.join(_KNOWN)}" for name in others]
    if cp.method not in ("ring", "all_gather", "ulysses"):
        problems.append(
            f"context_parallel={cp.method!r} is unknown; methods: ring, all_gather, ulysses"
        )
    if pipeline.schedule not in ("1f1b", "interleaved"):
        problems.append(f"schedule={pipeline.schedule!r} is unknown; schedules: 1f1b, interleaved")
    return problems


def _memory(precision: Any, remat: Any) -> list[str]:
    problems = []
    if precision not in (None, "bf16"):
        problems.append(
            f"precision={precision!r} is unknown; precisions: 'bf16' (computes in bfloat16, with"
            " float32 masters), None (dtypes as they are)"
        )
    if remat not in (None, "full", "selective"):
        problems.append(f"remat={remat!r} is unknown; kinds: 'full', 'selective', None")
    return problems


def _compile_of(compile: Any) -> Any:
    if isinstance(compile, str):
        return Compile(compile)
    return Compile() if compile is True else compile or None


def _compile(sizes: MeshSizes, compile: Any, sequence_parallel: bool | None) -> list[str]:
    how = _compile_of(compile)
    if how is None:
        return []
    if not isinstance(how, Compile) or how.backend not in ("inductor", "aot_eager"):
        return [
            f"compile={compile!r} is unknown; True ('inductor'), 'aot_eager' (a block's graph as"
            " it is, without a compiler), False, Compile(...)"
        ]
    if how.async_tp and how.backend != "inductor":
        return [f"{how} needs backend='inductor', which rewrites the graph"]
    if how.async_tp and sizes.tp > 1 and sequence_parallel is False:
        return [
            "Compile(async_tp=True) works on gathers and sums of parts of the sequence; it needs"
            " sequence_parallel=True (or None), not False"
        ]
    return []


def _data_parallel(sizes: MeshSizes, dp: DataParallel) -> list[str]:
    problems = []
    if dp.kind not in ("ddp", "zero1", "fsdp"):
        problems.append(f"data_parallel={dp.kind!r} is unknown; kinds: ddp, zero1, fsdp")
    ranks = sizes.dp * sizes.cp
    counts = isinstance(dp.replicate, int) and not isinstance(dp.replicate, bool)
    if not counts or dp.replicate < 1 or ranks % dp.replicate:
        fits = [n for n in range(1, ranks + 1) if ranks % n == 0]
        problems.append(
            f"DataParallel(replicate={dp.replicate!r}) does not divide"
            f" dp * cp = {sizes.dp} * {sizes.cp}; replicate in {fits}"
        )
    elif dp.kind == "ddp" and dp.replicate != 1:
        problems.append(
            f"DataParallel('ddp', replicate={dp.replicate}): 'ddp' replicates over all of dp;"
            " use replicate=1, or 'fsdp' or 'zero1' for shards within replicas"
        )
    if dp.reshard not in (True, False, "auto") or not isinstance(dp.reshard, (bool, str)):
        problems.append(
            f"DataParallel(reshard={dp.reshard!r}) is unknown; reshard: True, False, 'auto'"
        )
    elif dp.reshard != "auto" and dp.kind == "ddp":
        problems.append(f"DataParallel('ddp', reshard={dp.reshard}): 'ddp' gathers nothing; 'fsdp'")
    elif dp.reshard is True and dp.kind == "zero1":
        problems.append(
            "DataParallel('zero1', reshard=True): 'zero1' keeps parameters whole during a step;"
            " use 'fsdp' to free them"
        )
    return problems

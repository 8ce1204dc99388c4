"""The options of ``parallelize``: small frozen dataclasses, one for each owner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """How parameters, gradients and optimizer state live over ``dp``.

    Args:
        kind: ``"ddp"`` keeps all on every rank; ``"fsdp"`` splits all (FSDP2); ``"zero1"``
            is not built yet.
        replicate: number of replicas of the shards (hybrid shard); 1 until it is built.
        reshard: free gathered parameters between microbatches; only ``"auto"`` (keep them
            over the microbatches of a step) until it is built.
    """

    kind: str = "fsdp"
    replicate: int = 1
    reshard: bool | str = "auto"


@dataclass(frozen=True)
class ContextParallel:
    """How attention runs over ``cp``; not built yet, ``cp`` must be 1."""

    method: str = "ring"
    balance: bool = True


@dataclass(frozen=True)
class Options:
    """All options of one plan, resolved."""

    data_parallel: DataParallel = DataParallel()
    pipeline: Pipeline = Pipeline()

    @staticmethod
    def resolve(
        sizes: MeshSizes,
        data_parallel: str | DataParallel = "fsdp",
        pipeline: Pipeline = Pipeline(),
        context_parallel: str | ContextParallel = "ring",
        **others: Any,
    ) -> Options:
        """Check the options of ``parallelize`` for ``sizes``.

        Raises: Nemo2Error listing every option that is unknown or not built yet, each with
            what works instead.
        """
        dp = DataParallel(data_parallel) if isinstance(data_parallel, str) else data_parallel
        cp = (
            ContextParallel(context_parallel)
            if isinstance(context_parallel, str)
            else context_parallel
        )
        problems = _unknown(dp, cp, pipeline, others) + _not_built(sizes, dp, others)
        if problems:
            raise Nemo2Error("parallelize:\n" + "\n".join(f"  {p}" for p in problems))
        return Options(dp, pipeline)


_LATER = {
    "sequence_parallel": (
        None,
        False,
        "activations stay whole between tensor-parallel regions; use None or False",
    ),
    "precision": (
        None,
        None,
        "dtypes are kept as they are; use None, or model.to(torch.bfloat16) before",
    ),
    "remat": (None, None, "use None, or the model's own activation checkpointing"),
    "compile": (False, False, "use False"),
}


def _unknown(
    dp: DataParallel, cp: ContextParallel, pipeline: Pipeline, others: dict[str, Any]
) -> list[str]:
    problems = [
        f"unknown option {name!r}; options: {', '.join(_LATER)}"
        for name in others
        if name not in _LATER
    ]
    if dp.kind not in ("ddp", "zero1", "fsdp"):
        problems.append(f"data_parallel={dp.kind!r} is unknown; kinds: ddp, zero1, fsdp")
    if cp.method not in ("ring", "all_gather", "ulysses"):
        problems.append(
            f"context_parallel={cp.method!r} is unknown; methods: ring, all_gather, ulysses"
        )
    if pipeline.schedule not in ("1f1b", "interleaved"):
        problems.append(f"schedule={pipeline.schedule!r} is unknown; schedules: 1f1b, interleaved")
    return problems


def _not_built(sizes: MeshSizes, dp: DataParallel, others: dict[str, Any]) -> list[str]:
    problems = []
    for name, (default, also, works) in _LATER.items():
        if others.get(name, default) not in (default, also):
            problems.append(f"{name}={others[name]!r} is not built yet: {works}")
    if sizes.cp > 1:
        problems.append(
            f"cp={sizes.cp}: context parallelism is not built yet; use cp=1 and more tp, pp or dp"
        )
    if dp.kind == "zero1":
        problems.append(
            "data_parallel='zero1' is not built yet; 'fsdp' also splits the optimizer state,"
            " 'ddp' keeps all"
        )
    if dp.replicate != 1:
        problems.append(f"DataParallel(replicate={dp.replicate}) is not built yet; use replicate=1")
    if dp.reshard != "auto":
        problems.append(
            f"DataParallel(reshard={dp.reshard!r}) is not built yet; use reshard='auto'"
        )
    return problems

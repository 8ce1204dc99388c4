"""The adapter to Megatron's pipeline schedules: the only file that imports megatron.

``run_schedule`` runs stage programs in megatron-core's own ``forward_backward_no_pipelining`` (one
rank), 1F1B or interleaved 1F1B, with our communicators, which know the planned boundaries, and
explicit process groups: ``megatron.core.parallel_state`` stays uninitialised. Megatron is imported
at the first run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode

from nemo2.errors import PipelineError
from nemo2.pipeline.exchange import (
    Chunk,
    Exchange,
    InterleavedExchange,
    LossFunction,
    Stage,
    StageProgram,
)
from nemo2.pipeline.stages import check_microbatches

__all__ = ["SCHEDULES", "Chunk", "Groups", "StageProgram", "run_schedule"]

# What Megatron calls each schedule when there is more than one rank.
SCHEDULES = {
    "1f1b": "forward_backward_pipelining_without_interleaving",
    "interleaved": "forward_backward_pipelining_with_interleaving",
}
_ONE_STAGE = "forward_backward_no_pipelining"


@dataclass(frozen=True)
class Groups:
    """The process groups that Megatron asks for beside ``pp``; None stands for a single rank.

    No schedule communicates over them here: shapes come from the boundaries, and gradients are
    reduced by their owner.
    """

    tp: ProcessGroup | None = None
    cp: ProcessGroup | None = None
    dp_cp: ProcessGroup | None = None


def run_schedule(
    chunks: Sequence[Chunk],
    *,
    microbatches: int,
    pp_group: ProcessGroup | None,
    pp_rank: int,
    pp_size: int,
    device: torch.device,
    forward_only: bool,
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
    groups: Groups | None = None,
    schedule: str = "1f1b",
) -> list[Any]:
    """Run all microbatches of one step and return what the last stage's program returned.

    In training each ``.grad`` gains the sum over microbatches of the derivative of the program's
    scalar: not divided by any count, not multiplied by the context-parallel degree. Grad mode is
    the caller's. An exception of a program leaves unchanged; the other ranks are left waiting.

    Args:
        chunks: the stages of this rank: one, or with "interleaved" stages ``pp_rank``,
            ``pp_rank + pp_size``, ... of ``len(chunks) * pp_size``.
        microbatches: how many; the same on every rank. With 1F1B it may be fewer than the
            stages; interleaved it must be a multiple of ``pp_size``.
        pp_group: the ranks in order; None when ``pp_size`` is 1.
        device: where the boundary tensors live.
        no_sync: entered around everything but the last backward, to keep data-parallel gradient
            reduction out of it. Not when forward only.
        schedule: a key of SCHEDULES; ignored with one rank.

    Returns:
        On the last rank one entry per microbatch: a detached copy of the scalar, or the object
        itself when forward only. [] elsewhere.

    Communication: per boundary and microbatch one send forward (two where tensors without
    gradient go beside those with), and in training one back if any tensor requires grad.
    Interleaved, they overlap with the computation.
    Raises: PipelineError for counts, schedules or program outputs that do not fit.
    Source: 1F1B is PipeDream-Flush, section 2.2.1 of arXiv:2104.04473; interleaved 2.2.2.
    """
    _check(microbatches, schedule, pp_size)
    count = len(chunks) * pp_size
    assert count == pp_size or (schedule == "interleaved" and pp_size > 1)
    stages = []
    for i, chunk in enumerate(chunks):
        index = i * pp_size + pp_rank
        assert (index == 0) == (chunk.incoming is None), "only the first stage receives nothing"
        assert (index == count - 1) == (chunk.outgoing is None), "only the last sends nothing on"
        parts = (chunk.program, chunk.incoming, chunk.outgoing)
        stages.append(Stage(*parts, index, device, forward_only))
    megatron = _load()
    quiet = _Quiet(None if forward_only else no_sync, stages)
    config = _config(megatron, pp_size, stages, quiet)
    communicator = None
    if pp_size > 1:
        assert pp_group is not None
        assert (pp_group.rank(), pp_group.size()) == (pp_rank, pp_size)
        communicator = _communicator(megatron, pp_group, config, stages, microbatches)
    results = _execute(
        getattr(megatron.schedules, SCHEDULES[schedule] if pp_size > 1 else _ONE_STAGE),
        [_Model(config, megatron.model_type, stage) for stage in stages],
        quiet,
        num_microbatches=microbatches,
        p2p_communicator=communicator,
        pg_collection=_collection(megatron, pp_group, groups or Groups()),
    )
    if communicator is not None:
        communicator.finish()
    return results


def _execute(
    function: Callable[..., list[Any]], models: list[_Model], quiet: _Quiet, **arguments: Any
) -> list[Any]:
    """Call a schedule of Megatron's, with the user's code outside of our workarounds."""
    stage = models[0].stage
    with ExitStack() as stack:
        stack.push(quiet.__exit__)  # 1F1B does not leave no_sync when something raises
        cuda_here = stack.enter_context(_CudaHere(stage.device))

        def forward_step(_iterator: None, model: _Model) -> tuple[Tensor, LossFunction]:
            cuda_here.leave()
            quiet.begin()
            return model.stage.forward()

        several = len(models) > 1
        return function(
            forward_step_func=forward_step,
            model=models if several else models[0],
            data_iterator=[None] * len(models) if several else None,
            seq_length=1,  # what Megatron derives from these two, our communicator does not use
            micro_batch_size=1,
            forward_only=stage.forward_only,
            **arguments,
        )
    raise AssertionError("quiet.__exit__ suppresses nothing")


def _check(microbatches: int, schedule: str, pp_size: int) -> None:
    if microbatches < 1:
        raise PipelineError(
            f"cannot run {microbatches} microbatches\n  options: a positive number of microbatches"
        )
    if schedule not in SCHEDULES:
        raise PipelineError(
            f"no pipeline schedule {schedule!r}\n  options: {', '.join(map(repr, SCHEDULES))}"
        )
    if schedule == "interleaved":
        check_microbatches(microbatches, pp_size)


class _CudaHere(TorchFunctionMode):
    """Makes ``device="cuda"`` mean another device until left, once.

    Megatron's schedules allocate a token counter on "cuda" before the first forward step, and
    nothing after it. Left there for good, so that the user's forwards and backwards do not run
    under it. On CUDA it is never entered.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.active = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs = {**kwargs, "device": self.device}
        return func(*args, **kwargs)

    def __enter__(self) -> _CudaHere:
        if self.device.type != "cuda":
            super().__enter__()  # type: ignore[no-untyped-call]
            self.active = True
        return self

    def __exit__(self, *exc: Any) -> None:
        self.leave()

    def leave(self) -> None:
        if self.active:
            self.active = False
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Quiet:
    """Enters a ``no_sync`` at the first forward step after Megatron wanted it, leaves it once.

    Later than Megatron enters it so that it is not entered for nothing (one microbatch without
    pipelining), nor inside ``_CudaHere``. And not before the rank's last backward: Megatron wants
    to leave it at the last backward of each of the rank's stages, the last stage's first.
    """

    def __init__(
        self,
        no_sync: Callable[[], AbstractContextManager[Any]] | None,
        stages: Sequence[Stage],
    ) -> None:
        self.no_sync, self.stages = no_sync, stages
        self.wanted = False
        self.times_left = 0
        self.inner: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        self.wanted = self.no_sync is not None

    def begin(self) -> None:
        if self.wanted and self.inner is None and self.no_sync is not None:
            self.inner = self.no_sync()
            self.inner.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.times_left += 1
        if kind is None and any(s.requires_grad for s in self.stages[: -self.times_left]):
            return
        self.wanted = False
        inner, self.inner = self.inner, None
        if inner is not None:
            inner.__exit__(kind, value, traceback)


class _Model(nn.Module):
    """What Megatron takes for the model, or for one chunk of it."""

    def __init__(self, config: Any, model_type: Any, stage: Stage) -> None:
        super().__init__()
        self.config, self.model_type, self.stage = config, model_type, stage

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Ignore the buffers: the stage unpacks them itself."""


class _Alone:
    """A process group of one rank, as far as Megatron looks at ``tp`` and ``cp``."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class _Megatron(NamedTuple):
    """What is used of megatron-core."""

    schedules: Any
    communicators: tuple[Any, Any]
    config: Any
    collection: Any
    model_type: Any


@cache
def _load() -> _Megatron:
    """Import megatron-core, about 3 s, without its warnings about optional kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.enums import ModelType
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer import multi_token_prediction

    del multi_token_prediction  # the first forward step imports it, and that warns, too
    kinds = (Exchange, InterleavedExchange)
    one, several = (type(f"Boundary{kind.__name__}", (kind, P2PCommunicator), {}) for kind in kinds)
    return _Megatron(
        schedules,
        (one, several),
        ModelParallelConfig,
        ProcessGroupCollection,
        ModelType.encoder_or_decoder,
    )


def _config(megatron: _Megatron, pp_size: int, stages: Sequence[Stage], quiet: _Quiet) -> Any:
    several = len(stages) > 1
    config = megatron.config(
        pipeline_model_parallel_size=pp_size,
        virtual_pipeline_model_parallel_size=len(stages) if several else None,
        pipeline_dtype=torch.float32,  # our communicator does not use it
        overlap_p2p_comm=several,  # Megatron's 1F1B has no overlap
        batch_p2p_comm=not several,
        no_sync_func=lambda: quiet,
        deallocate_pipeline_outputs=True,  # a sent buffer is needed for its graph only
    )
    # The schedules read these, though only TransformerConfig declares them.
    config.calculate_per_token_loss = True
    config.hidden_size = 1
    config.fine_grained_activation_offloading = False
    return config


def _communicator(
    megatron: _Megatron,
    pp_group: ProcessGroup,
    config: Any,
    stages: Sequence[Stage],
    microbatches: int,
) -> Any:
    one, several = megatron.communicators
    if len(stages) == 1:
        communicator = one(pp_group, config)
        communicator.serve(stages[0])
        return communicator
    communicator = several(pp_group, config)
    group = config.microbatch_group_size_per_vp_stage
    table = megatron.schedules.get_schedule_table(microbatches, len(stages), group)
    communicator.serve(stages, [chunk for _, chunk in table])
    return communicator


def _collection(megatron: _Megatron, pp_group: ProcessGroup | None, groups: Groups) -> Any:
    return megatron.collection(
        pp=pp_group or _Alone(),
        tp=groups.tp or _Alone(),
        cp=groups.cp or _Alone(),
        dp_cp=groups.dp_cp or _Alone(),
        embd=None,
        pos_embd=None,
    )

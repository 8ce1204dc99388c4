"""The adapter to Megatron's pipeline schedules: the only file that imports megatron.

``run_schedule`` runs a stage program in megatron-core's own ``forward_backward_no_pipelining`` (one
stage) or 1F1B, with our communicator, which knows the planned boundaries, and explicit process
groups: ``megatron.core.parallel_state`` stays uninitialised. Megatron is imported at the first run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode

from nemo2.errors import PipelineError
from nemo2.pipeline.boundary import Boundary
from nemo2.pipeline.exchange import Exchange, LossFunction, Stage, StageProgram

__all__ = ["SCHEDULES", "Groups", "StageProgram", "run_schedule"]

# What Megatron calls each schedule when there is more than one stage.
SCHEDULES = {"1f1b": "forward_backward_pipelining_without_interleaving"}
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
    program: StageProgram,
    *,
    microbatches: int,
    pp_group: ProcessGroup | None,
    pp_rank: int,
    pp_size: int,
    device: torch.device,
    incoming: Boundary | None,
    outgoing: Boundary | None,
    forward_only: bool,
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
    groups: Groups | None = None,
    schedule: str = "1f1b",
) -> list[Any]:
    """Run all microbatches of one step and return what the last stage's program returned.

    In training each ``.grad`` gains the sum over microbatches of the derivative of the program's
    scalar: not divided by any count, not multiplied by the context-parallel degree. Grad mode is
    the caller's. An exception of the program leaves unchanged; the other stages are left waiting.

    Args:
        microbatches: how many; may be fewer than the stages. The same on every stage.
        pp_group: the stages in order; None when ``pp_size`` is 1.
        device: where the boundary tensors live.
        incoming, outgoing: what the previous stage sends, None on the first stage, and what the
            next stage receives, None on the last.
        no_sync: entered around everything but the last backward, to keep data-parallel gradient
            reduction out of it. Not when forward only.
        schedule: a key of SCHEDULES; ignored with one stage.

    Returns:
        On the last stage one entry per microbatch: a detached copy of the scalar, or the object
        itself when forward only. [] elsewhere.

    Communication: per boundary and microbatch one send forward (two where tensors without
    gradient go beside those with), and in training one back if any tensor requires grad.
    Raises: PipelineError for counts, schedules or program outputs that do not fit.
    Source: 1F1B is PipeDream-Flush, section 2.2.1 of arXiv:2104.04473.
    """
    _check(microbatches, schedule)
    assert (pp_rank == 0) == (incoming is None), "the first stage alone has no incoming boundary"
    assert (pp_rank == pp_size - 1) == (outgoing is None), "the last stage alone sends nothing on"
    megatron = _load()
    quiet = _Quiet(None if forward_only else no_sync)
    config = _config(megatron, pp_size, incoming, quiet)
    stage = Stage(program, device, pp_rank, incoming, outgoing, forward_only)
    if pp_size > 1:
        assert pp_group is not None
        assert (pp_group.rank(), pp_group.size()) == (pp_rank, pp_size)
    return _execute(
        getattr(megatron.schedules, SCHEDULES[schedule] if pp_size > 1 else _ONE_STAGE),
        stage,
        quiet,
        model=_Chunk(config, megatron.model_type),
        num_microbatches=microbatches,
        p2p_communicator=_communicator(megatron, pp_group if pp_size > 1 else None, config, stage),
        pg_collection=_collection(megatron, pp_group, groups or Groups()),
    )


def _execute(
    function: Callable[..., list[Any]], stage: Stage, quiet: _Quiet, **arguments: Any
) -> list[Any]:
    """Call a schedule of Megatron's, with the user's code outside of our workarounds."""
    with ExitStack() as stack:
        stack.push(quiet.__exit__)  # 1F1B does not leave no_sync when something raises
        cuda_here = stack.enter_context(_CudaHere(stage.device))

        def forward_step(_iterator: None, _chunk: _Chunk) -> tuple[Tensor, LossFunction]:
            cuda_here.leave()
            quiet.begin()
            return stage.forward()

        return function(
            forward_step_func=forward_step,
            data_iterator=None,
            seq_length=1,  # what Megatron derives from these two, our communicator does not use
            micro_batch_size=1,
            forward_only=stage.forward_only,
            **arguments,
        )
    raise AssertionError("quiet.__exit__ suppresses nothing")


def _check(microbatches: int, schedule: str) -> None:
    if microbatches < 1:
        raise PipelineError(
            f"cannot run {microbatches} microbatches\n  options: a positive number of microbatches"
        )
    if schedule not in SCHEDULES:
        raise PipelineError(
            f"no pipeline schedule {schedule!r}\n  options: {', '.join(map(repr, SCHEDULES))}"
        )


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
    pipelining), nor inside ``_CudaHere``.
    """

    def __init__(self, no_sync: Callable[[], AbstractContextManager[Any]] | None) -> None:
        self.no_sync = no_sync
        self.wanted = False
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
        self.wanted = False
        inner, self.inner = self.inner, None
        if inner is not None:
            inner.__exit__(kind, value, traceback)


@dataclass
class _Chunk:
    """What Megatron takes for the model."""

    config: Any
    model_type: Any

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
    communicator: Any
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
    communicator = type("BoundaryCommunicator", (Exchange, P2PCommunicator), {})
    return _Megatron(
        schedules,
        communicator,
        ModelParallelConfig,
        ProcessGroupCollection,
        ModelType.encoder_or_decoder,
    )


def _config(megatron: _Megatron, pp_size: int, incoming: Boundary | None, quiet: _Quiet) -> Any:
    config = megatron.config(
        pipeline_model_parallel_size=pp_size,
        pipeline_dtype=incoming.buffer_dtype if incoming is not None else torch.float32,
        no_sync_func=lambda: quiet,
        deallocate_pipeline_outputs=True,  # a sent buffer is needed for its graph only
    )
    # The schedules read these, though only TransformerConfig declares them.
    config.calculate_per_token_loss = True
    config.hidden_size = 1
    config.fine_grained_activation_offloading = False
    return config


def _communicator(
    megatron: _Megatron, pp_group: ProcessGroup | None, config: Any, stage: Stage
) -> Any:
    if pp_group is None:
        return None
    communicator = megatron.communicator(pp_group, config)
    communicator.stage = stage
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

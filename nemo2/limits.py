"""What is refused before anything runs: a step that its mesh does not allow, what is no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import Nemo2Error, PipelineError
from .pipeline.stages import crossings, stage_of
from .pytree import tree_map
from .trace import Trace

if TYPE_CHECKING:
    from .plan import Plan


def check_limits(plan: Plan, trace: Trace) -> None:
    """Raise PipelineError for what the trace shows and the mesh does not allow."""
    if plan.sizes.pp > 1:
        _check_escapes(plan, trace)
        _check_checkpoints(plan, trace)
    _check_router(plan, trace)


def check_same_path(plan: Plan, one: Trace, two: Trace) -> None:
    """Raise PipelineError when two runs of a step on the same batch called other blocks."""
    before, after = (trace.blocks_called(plan.blocks) for trace in (one, two))
    if before != after:
        odd = sorted(set(before) ^ set(after)) or sorted(set(before))
        raise PipelineError(
            f"the step was run twice on the same batch, and only once called"
            f" {', '.join(repr(plan.blocks[i]) for i in odd[:4])}\n"
            "  options: call every block once a step (no random skipping)"
        )


def skipped(name: str, planned: str | None) -> PipelineError:
    """Return the error of a run that calls another block than was planned."""
    expected = f"'{planned}' was planned" if planned else "none was planned"
    return PipelineError(
        f"block '{name}' is called where {expected}: which blocks a step calls must depend only"
        " on shapes and on train/eval\n"
        "  options: call every block once a step (no random skipping)"
    )


def _check_escapes(plan: Plan, trace: Trace) -> None:
    for block, position, line in sorted(trace.notes.escaped):
        if stage_of(block, plan.stages) != stage_of(position, plan.stages):
            raise PipelineError(
                f"a value made inside block '{plan.blocks[block]}' is used on another stage, and"
                f" the block does not return it (a hook, or an attribute, kept it){line}\n"
                "  options: return it from the block | pp=1"
            )


def _check_checkpoints(plan: Plan, trace: Trace) -> None:
    for stage, values in zip(plan.stages[1:], crossings(trace, plan.stages), strict=True):
        if stage.first in trace.notes.reentrant and any(v.requires_grad for v in values):
            raise PipelineError(
                f"the first block of stage {stage.index}, '{plan.blocks[stage.first]}', is called"
                " in a reentrant activation checkpoint, which would lose the gradients of earlier"
                " stages\n  options: checkpoint(..., use_reentrant=False)"
            )


def _check_router(plan: Plan, trace: Trace) -> None:
    parts = plan.sizes.dp * plan.sizes.cp * plan.options.pipeline.microbatches
    if trace.notes.router_logits and parts > 1:
        raise PipelineError(
            "output_router_logits=True adds an auxiliary loss that is no mean over samples: the"
            f" mean of {parts} parts (dp={plan.sizes.dp}, cp={plan.sizes.cp},"
            f" microbatches={plan.options.pipeline.microbatches}) is not that of the whole batch\n"
            "  options: output_router_logits=False | dp=1, cp=1 and one microbatch"
        )


def check_module(model: Any, asked: str) -> None:
    """Refuse what is no module of one device; ``asked`` is the function that was given it."""
    from .model import ParallelModel

    if isinstance(model, ParallelModel):
        raise Nemo2Error(
            f"{asked}: this model is parallel already\n  options: pass the unsplit module"
        )
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise Nemo2Error(
            f"{asked}: the model must be an nn.Module, it is {got}\n"
            f"  options: {asked}(Model(...), ...)"
        )
    if hasattr(model, "_orig_mod"):
        raise Nemo2Error(
            f"{asked}: this model was compiled by torch.compile before\n"
            "  options: the plain module and parallelize(..., compile=True)"
        )


def check_parallel(model: Any, asked: str) -> None:
    """Refuse what ``parallelize`` has not made; ``asked`` is the function that was given it."""
    from .model import ParallelModel

    if not isinstance(model, ParallelModel):
        raise Nemo2Error(
            f"{asked}: the model must come from nemo2.parallelize, it is a {type(model).__name__}\n"
            f"  options: {asked}(loss_fn, nemo2.parallelize(model, mesh))"
        )


def without_gradients(output: Any) -> Any:
    """Return what a parallel model's forward gives: like one device's, but backward says no."""
    made = torch.empty(0, requires_grad=True)

    def guarded(x: Any) -> Any:
        floating = isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
        if not floating:
            return x
        return _ForwardOnly.apply(x, made)  # type: ignore[no-untyped-call]

    return tree_map(guarded, output)


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, made: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise Nemo2Error(
            "calling a parallel model runs it forward only, and keeps nothing for gradients\n"
            "  options: model.backward(loss_fn, batch), then optimizer.step() |"
            " nemo2.value_and_grad(loss_fn, model)(params, batch) | torch.no_grad() for inference"
        )

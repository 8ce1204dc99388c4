"""Running a LightningModule's steps in the schedule of a ``ParallelModel``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import Nemo2Error
from ..model import ParallelModel
from ..pipeline.identity import identity
from ..pipeline.microbatch import first_microbatch, plan_batch
from ..pipeline.runner import Step
from ..pytree import tree_flatten, tree_unflatten
from ..sharding.reduce import gradient, norm_of
from ..sharding.storage import local_of
from .logs import LogCapture


def training_step(parallel: ParallelModel, batch: Any, args: Sequence[Any]) -> Tensor:
    """Run forward and backward of all microbatches; return the global loss.

    The gradients wait beside the parameters: Lightning zeroes ``.grad`` only after this, and
    then calls backward on the loss, which delivers them.
    """
    module = parallel.module
    assert isinstance(module, LightningModule)
    logs = LogCapture(module, parallel)

    def step(module: nn.Module, part: Any) -> Any:
        with logs.microbatch():
            return loss_of(module.training_step(part, *args))  # type: ignore[operator]

    loss, _ = parallel.run_backward(step, batch, key=identity(module.training_step))
    logs.replay()
    return _Deliver.apply(loss.requires_grad_(), parallel)  # type: ignore[no-any-return,no-untyped-call]


def evaluation_step(parallel: ParallelModel, name: str, batch: Any, args: Sequence[Any]) -> Any:
    """Run ``validation_step``, ``test_step`` or ``predict_step`` forward only.

    Returns:
        what the step returned, on the last stage; None elsewhere. On all stages that of
        ``predict_step``, and what a hook of the user takes: ``on_validation_batch_end``.
    """
    module = parallel.module
    assert isinstance(module, LightningModule)
    logs = LogCapture(module, parallel)

    def step(module: nn.Module, part: Any) -> Any:
        with logs.microbatch():
            return getattr(module, name)(part, *args)

    predicting, key = name == "predict_step", (name, *args[1:])
    count = _microbatches(parallel, batch)
    # Not in inference mode: what FSDP allocates here is used again in training.
    with torch.inference_mode(False), torch.no_grad():
        if predicting and count > 1 and not _joins(parallel, step, batch, count, key):
            count = 1
        results = parallel.run_forward(step, batch, key=key, microbatches=count)
    logs.replay()
    result = _merge(results) if results and parallel.runner.last else None
    return parallel.from_last_stage(result) if predicting or _taken(module, name) else result


def _taken(module: LightningModule, name: str) -> bool:
    """Say whether the user's code takes what a step returned; Lightning's own callbacks do not."""
    hook = f"on_{name.removesuffix('_step')}_batch_end"
    callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    return is_overridden(hook, module) or any(
        is_overridden(hook, c, Callback) and not type(c).__module__.startswith("lightning.")
        for c in callbacks
    )


def loss_of(result: Any) -> Any:
    """Return the loss, or (sum, count), from what ``training_step`` returned."""
    if isinstance(result, Mapping):
        result = result.get("loss")
    if result is None:
        raise Nemo2Error(
            "training_step returned no loss, but a step cannot be skipped on one rank alone\n"
            "  options: return the loss | return {'loss': loss, ...} | return (sum, count)"
        )
    return result


def clip_by_norm(parallel: ParallelModel, params: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients of ``params`` so that their norm over all axes is at most ``max_norm``.

    Communication: one all-reduce of a scalar over the world.
    """
    chosen = {id(p) for p in params}
    grads = {
        n: p.grad for n, p in parallel.params.items() if p.grad is not None and id(p) in chosen
    }
    norm = norm_of(grads, parallel.storage, parallel.groups)
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    if grads:
        torch._foreach_mul_([local_of(g) for g in grads.values()], scale)
    return norm


def clip_by_value(params: Iterable[Tensor], limit: float) -> None:
    """Clamp each element of the gradients of ``params`` to ``[-limit, limit]``."""
    for p in params:
        if p.grad is not None:
            local_of(p.grad).clamp_(-limit, limit)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class _Deliver(torch.autograd.Function):
    """The identity on the loss; its backward adds the gradients of the schedule to ``.grad``.

    They are scaled by the gradient that arrives, so that what is done to the loss in between
    (Lightning divides it by ``accumulate_grad_batches``) is done to them.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, parallel: ParallelModel) -> Tensor:
        ctx.parallel = parallel
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *scales: Any) -> Any:
        parallel: ParallelModel = ctx.parallel
        (scale,) = scales
        entries = [(e, g) for e in parallel.storage if (g := gradient(e)) is not None]
        with torch.no_grad():
            if entries:
                torch._foreach_mul_([g for _, g in entries], scale.detach())
            for entry, grad in entries:
                if entry.view.grad is None:
                    entry.view.grad = entry.wrap(grad, parallel.storage.mesh)
                else:
                    local_of(entry.view.grad).add_(grad)
                entry.compute.grad = None
        return scale, None


def _microbatches(parallel: ParallelModel, batch: Any) -> int:
    """Return the pipeline's number of microbatches, or 1 if the batch does not divide by it."""
    wanted = parallel.plan.options.pipeline.microbatches
    if wanted == 1 or len(parallel.plan.stages) == 1:
        return 1
    try:
        plan_batch(batch, wanted)
    except Nemo2Error:
        return 1
    return wanted


def _joins(parallel: ParallelModel, step: Step, batch: Any, count: int, key: Any) -> bool:
    """Say whether the results of microbatches, joined along their first dim, are the batch's.

    They are where the plan shows tensors whose first dim, and no other, follows the batch's size.
    """
    size = plan_batch(batch, count).size
    parts = (batch, first_microbatch(batch, count))
    plans = [parallel.plan_forward(step, part, key=key, plan=parallel.plan) for part in parts]
    traces = [made.trace for made in plans if made is not None and made.trace.complete]
    if len(traces) < len(plans):
        return False
    whole, part = (tree_flatten(trace.output) for trace in traces)
    if whole[1] != part[1] or not all(isinstance(x, Tensor) and x.ndim for x in whole[0]):
        return False
    return all(
        a[0] == size and b == (size // count, *a[1:])
        for a, b in zip(*(t.output_shapes for t in traces), strict=True)
    )


def _merge(results: list[Any]) -> Any:
    """Join the microbatches' results: means of scalars, other tensors along their first dim."""
    if len(results) == 1:
        return results[0]
    flat = [tree_flatten(r) for r in results]
    leaves = []
    for same in zip(*(leaves for leaves, _ in flat), strict=True):
        if not isinstance(same[0], Tensor):
            leaves.append(same[0])
        elif same[0].ndim == 0:
            leaves.append(torch.stack(same).double().mean().to(same[0].dtype))
        else:
            leaves.append(torch.cat(same))
    return tree_unflatten(flat[0][1], leaves)

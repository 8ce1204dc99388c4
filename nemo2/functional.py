"""``value_and_grad`` and ``grad``: the JAX way to differentiate a parallel model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import Nemo2Error
from .limits import check_parallel

if TYPE_CHECKING:
    from .model import ParallelModel

LossFn = Callable[[nn.Module, Any], Any]


def value_and_grad(
    loss_fn: LossFn, model: ParallelModel, *, has_aux: bool = False
) -> Callable[..., Any]:
    """Return ``fn(params, batch, *, step=0) -> (loss, grads)``, pure in the parameters.

    Args:
        loss_fn: ``loss_fn(module, batch)`` gets the user's own module; returns a mean, or
            ``(sum, count)``; with ``has_aux``, that and anything else as a pair.
        model: from ``parallelize``; its parameters are as before after every call.

    Returns:
        a function of ``params`` (name -> DTensor, as ``model.params``), this dp coordinate's
        ``batch`` and the number of the ``step`` (it seeds dropout). Its loss is the global
        value on every rank; its grads have the names and placements of ``params``, zeros
        where the loss does not depend on one. With ``has_aux`` the value is
        ``(loss, [aux of each microbatch])``, those of this dp coordinate, on every stage.

    Communication: that of one training step.
    """

    from .sharding.reduce import gradient

    check_parallel(model, "value_and_grad")

    def fn(params: Mapping[str, Tensor], batch: Any, *, step: int = 0) -> Any:
        with _using(model, params):
            loss, aux = model.run_backward(loss_fn, batch, step=step, has_aux=has_aux)
            grads = {}
            for entry in model.storage:
                grad = gradient(entry)
                grad = torch.zeros_like(entry.local) if grad is None else grad
                grads[entry.name] = entry.wrap(grad, model.storage.mesh)
                entry.compute.grad = None
        if has_aux:
            return (loss, model.from_last_stage(aux if model.runner.last else None)), grads
        return loss, grads

    return fn


def grad(loss_fn: LossFn, model: ParallelModel, *, has_aux: bool = False) -> Callable[..., Any]:
    """Return ``fn(params, batch, *, step=0) -> grads``; see ``value_and_grad``.

    With ``has_aux``, ``fn`` returns ``(grads, aux)``.
    """
    both = value_and_grad(loss_fn, model, has_aux=has_aux)

    def fn(params: Mapping[str, Tensor], batch: Any, *, step: int = 0) -> Any:
        value, grads = both(params, batch, step=step)
        return (grads, value[1]) if has_aux else grads

    return fn


def global_norm(grads: Mapping[str, Tensor], model: ParallelModel) -> Tensor:
    """Return the 2-norm of ``grads`` over all axes, shared parameters counted once.

    Args:
        grads: name -> DTensor, this rank's, as ``value_and_grad`` returns them.

    Communication: one all-reduce of a scalar over the world.
    """
    from .sharding.reduce import norm_of

    return norm_of(grads, model.storage, model.groups)


@contextmanager
def _using(model: ParallelModel, params: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with the values of ``params`` in the model's memory, and put its own back."""
    from .sharding.storage import local_of

    _check(model, params)
    saved: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for entry in model.storage:
            given, own = local_of(params[entry.name]), entry.local
            if given.data_ptr() != own.data_ptr() or given.shape != own.shape:
                saved.append((own, own.clone()))
                own.copy_(given)
    try:
        yield
    finally:
        with torch.no_grad():
            for own, before in saved:
                own.copy_(before)


def _check(model: ParallelModel, params: Mapping[str, Tensor]) -> None:
    wanted = model.params
    missing, extra = sorted(wanted.keys() - params.keys()), sorted(params.keys() - wanted.keys())
    problems = [f"missing: {missing}"] if missing else []
    problems += [f"not parameters of this rank: {extra}"] if extra else []
    for name in wanted.keys() & params.keys():
        own, given = wanted[name], params[name]
        if _layout(own) != _layout(given):
            problems.append(f"'{name}': shape or placements differ from model.params['{name}']")
    if problems:
        raise Nemo2Error(
            "params do not fit the model:\n"
            + "\n".join(f"  {p}" for p in problems)
            + "\n  options: pass model.params, or a tree of the same names and placements"
        )


def _layout(x: Tensor) -> tuple[tuple[int, ...], Any]:
    return tuple(x.shape), getattr(x, "placements", None)

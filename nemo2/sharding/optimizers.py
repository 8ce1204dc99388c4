"""torch's elementwise optimizers step on local shards, without DTensor's dispatch.

What users see stays as it is: parameters, gradients and state are DTensors before and after a
step. Inside ``optimizer.step`` the shards stand in for them, so that fused and foreach kernels get
plain tensors (a tenth of the host time). Optimizers that look at more than one element at a time,
and those with hooks of the user, which may look at parameters, step through DTensor.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import Nemo2Error

if TYPE_CHECKING:
    from .storage import Storage

ELEMENTWISE = frozenset(
    {
        optim.Adadelta,
        optim.Adagrad,
        optim.Adam,
        optim.AdamW,
        optim.Adamax,
        optim.ASGD,
        optim.NAdam,
        optim.RAdam,
        optim.RMSprop,
        optim.Rprop,
        optim.SGD,
    }
)
_SCALARS = ("step", "eta", "mu", "mu_product")  # state that is no part of a parameter

# Parameters that models have given -> over how many pipeline ranks the others are spread.
_views: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
# Optimizer -> what its shards stand for: (group, place in it, parameter, its state).
_lent: MutableMapping[Optimizer, list[tuple[int, int, Any, dict[str, Any]]]] = WeakIdKeyDictionary()
_handles: list[Any] = []


def step_on_shards(storage: Storage, pp: int) -> None:
    """Let optimizers of the parameters of ``storage`` step on their shards.

    Args:
        pp: how many pipeline ranks the model has.
    """
    for entry in storage:
        if isinstance(entry.view, DTensor):
            _views[entry.view] = pp
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_before))
        _handles.append(register_optimizer_step_post_hook(_after))


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _give_back(optimizer)  # a step that raised has left its shards
    _check(optimizer)
    if not _fits(optimizer):
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        _lend(optimizer)
        return None

    def evaluated() -> Any:  # the user's code sees DTensors
        loss = closure()
        _lend(optimizer)
        return loss

    return (optimizer, evaluated), {}


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _give_back(optimizer)


def _check(optimizer: Optimizer) -> None:
    """Refuse what would step otherwise than on one device, or cannot."""
    if not isinstance(optimizer, (optim.LBFGS, optim.Adafactor)):
        return
    params = (p for group in optimizer.param_groups for p in group["params"])
    mine = next((p for p in params if p in _views), None)
    if mine is None:
        return
    if isinstance(optimizer, optim.LBFGS) and _views[mine] > 1:
        raise Nemo2Error(
            "LBFGS multiplies vectors of all parameters, and each pipeline rank has those of its"
            f" own stages: pp={_views[mine]}\n  options: pp=1 | AdamW, or another optimizer that"
            " looks at one parameter at a time"
        )
    if isinstance(optimizer, optim.Adafactor) and mine.device_mesh.size() > 1:
        raise Nemo2Error(
            "torch's Adafactor does not take parameters that are split: DTensor refuses its"
            " powers in place\n  options: AdamW, or another of torch's optimizers | a mesh of"
            " pp alone"
        )


def _fits(optimizer: Optimizer) -> bool:
    return (
        type(optimizer) in ELEMENTWISE
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and not any(group.get("differentiable") for group in optimizer.param_groups)
        and any(p in _views for group in optimizer.param_groups for p in group["params"])
    )


def _lend(optimizer: Optimizer) -> None:
    """Put the shards in the places of the parameters, with their gradients and state."""
    if optimizer not in _lent:  # after a step that raised its state may still be saved
        optimizer.register_state_dict_pre_hook(_give_back)
    lent = _lent[optimizer] = []
    for g, group in enumerate(optimizer.param_groups):
        for i, view in enumerate(group["params"]):
            if view not in _views:
                continue
            local = nn.Parameter(view._local_tensor.detach(), requires_grad=view.requires_grad)
            if view.grad is not None:
                local.grad = view.grad._local_tensor
            group["params"][i] = local
            state = optimizer.state.pop(view, {})
            lent.append((g, i, view, state))
            if state:
                optimizer.state[local] = {k: _part(v) for k, v in state.items()}


def _give_back(optimizer: Optimizer) -> None:
    """Put the parameters back, and make DTensors of the state that belongs to them."""
    lent = _lent.get(optimizer, [])
    for g, i, view, before in lent:
        params = optimizer.param_groups[g]["params"]
        local, params[i] = params[i], view
        after = optimizer.state.pop(local, None)
        if after is not None:
            optimizer.state[view] = {
                k: before[k] if k in before and _part(before[k]) is v else _whole(k, v, view)
                for k, v in after.items()
            }
    lent.clear()


def _part(value: Any) -> Any:
    return value._local_tensor if isinstance(value, DTensor) else value


def _whole(name: str, value: Any, view: DTensor) -> Any:
    """Return a part of a parameter's state as users see it."""
    if not isinstance(value, Tensor) or name in _SCALARS:
        return value
    return DTensor.from_local(
        value,
        view.device_mesh,
        view.placements,
        run_check=False,
        shape=view.shape,
        stride=view.stride(),
    )

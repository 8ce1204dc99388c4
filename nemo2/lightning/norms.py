"""The gradient norm of each parameter, as Lightning's ``grad_norm`` gives it on one device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch.distributed.tensor import DTensor

from ..errors import Nemo2Error
from ..inside import model_around


def grad_norm(
    module: LightningModule, norm_type: float | str = 2.0, group_separator: str = "/"
) -> dict[str, float]:
    """Return the norm of each parameter's gradient, and that of all of them.

    For ``lightning.pytorch.utilities.grad_norm``, which reads one rank's shards. Called on all
    ranks, where gradients are complete: in ``on_before_optimizer_step``.

    Args:
        norm_type: of ``torch.linalg.vector_norm``: 2, 1, inf ...
        group_separator: between the kind of norm and the name.

    Returns:
        ``grad_2.0_norm/<name>`` and ``grad_2.0_norm_total``, the same on every rank.

    Communication: a reduction for each split parameter, one all-gather of objects over ``pp``.
    Raises: Nemo2Error for a norm that is not positive, and outside of a fit.
    """
    order = float(norm_type)
    if not order > 0:
        raise Nemo2Error(f"grad_norm: norm_type must be > 0 (or inf), got {norm_type}")
    around = model_around(module)
    if around is None:
        raise Nemo2Error(
            f"grad_norm: {type(module).__name__} is not on a mesh\n"
            "  options: lightning.pytorch.utilities.grad_norm | call it in on_before_optimizer_step"
        )
    parallel, _ = around
    own = {}
    for entry in parallel.storage:
        grad = entry.view.grad
        if grad is not None:
            norm = torch.linalg.vector_norm(grad, order)
            own[entry.name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    stages: list[Any] = [own] * parallel.groups.sizes.pp
    if len(stages) > 1:
        dist.all_gather_object(stages, own, group=parallel.groups.pp)
    found = {name: norm for stage in reversed(stages) for name, norm in stage.items()}
    names = [p.name for p in parallel.plan.params if p.name in found]
    kind = f"grad_{order}_norm"
    norms = {f"{kind}{group_separator}{name}": found[name] for name in names}
    values = torch.tensor([found[name] for name in names], dtype=torch.float64)
    total = float(torch.linalg.vector_norm(values, order)) if names else 0.0
    return norms | {f"{kind}_total": total}

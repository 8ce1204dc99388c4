"""Fused projections: parameters whose parts are split one by one over ``tp``.

A rank holds its slice of each part, so what all ranks hold, one after the other, is the original
parameter with its rows in another order. The DTensor of such a parameter has that *rank order*;
state dicts have the original one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import ParamPlan


def is_fused(param: ParamPlan) -> bool:
    return param.tp_dim is not None and param.parts is not None and len(param.parts) > 1


def in_rank_order(full: Tensor, param: ParamPlan, tp: int) -> Tensor:
    """Return a parameter, given in its original order, as its ranks hold it."""
    if not is_fused(param):
        return full
    assert param.tp_dim is not None
    assert param.parts is not None
    slices = [p.chunk(tp, param.tp_dim) for p in full.split_with_sizes(param.parts, param.tp_dim)]
    return torch.cat([part[rank] for rank in range(tp) for part in slices], param.tp_dim)


def in_original_order(held: Tensor, param: ParamPlan, tp: int) -> Tensor:
    """Return a parameter, given as its ranks hold it, in its original order."""
    if not is_fused(param):
        return held
    assert param.tp_dim is not None
    assert param.parts is not None
    sizes = [p // tp for p in param.parts]
    slices = [r.split_with_sizes(sizes, param.tp_dim) for r in held.chunk(tp, param.tp_dim)]
    return torch.cat([own[i] for i in range(len(sizes)) for own in slices], param.tp_dim)

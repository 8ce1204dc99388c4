"""What runs differently while a block is traced for a compiler.

A traced block becomes a graph of operations on its inputs. Collectives must then be operations that
return new tensors, and the keys of dropout, which differ in each microbatch, must be an input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .dropout import Site


class Tracing:
    """One run of a block's forward on stand-ins.

    Attributes:
        keys: (n, 3) int64, an input of the graph: ``dropout.row_of`` each dropout call, or None
            while they are counted.
        sites: the dropout calls so far, in order.
    """

    def __init__(self, keys: Tensor | None = None) -> None:
        self.keys = keys
        self.sites: list[Site] = []

    def next_key(self, site: Site, device: torch.device) -> Tensor:
        """Return the key, first sample and stride of the next dropout call, (3,) int64."""
        self.sites.append(site)
        if self.keys is None:
            return torch.zeros(3, dtype=torch.int64, device=device)
        return self.keys[len(self.sites) - 1]


_running: list[Tracing] = []


@contextmanager
def tracing(state: Tracing) -> Iterator[None]:
    """Trace what runs inside."""
    _running.append(state)
    try:
        yield
    finally:
        _running.pop()


def current() -> Tracing | None:
    """Return the trace that is running, or None."""
    return _running[-1] if _running else None


# The operations below are torch's functional collectives; a compiler knows them and may move them.
_ops: Any = torch.ops._c10d_functional


def _name(group: dist.ProcessGroup | None) -> str:
    assert group is not None
    name: str = group.group_name
    return name


def all_reduce(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    out: Tensor = _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", _name(group)))
    return out


def all_gather(x: Tensor, group: dist.ProcessGroup | None, degree: int) -> Tensor:
    """Return the parts of all ranks joined along dim 0."""
    made = _ops.all_gather_into_tensor(x, degree, _name(group))
    out: Tensor = _ops.wait_tensor(made)
    return out


def reduce_scatter(x: Tensor, group: dist.ProcessGroup | None, degree: int) -> Tensor:
    """Return this rank's part along dim 0 of the sum."""
    made = _ops.reduce_scatter_tensor(x, "sum", degree, _name(group))
    out: Tensor = _ops.wait_tensor(made)
    return out


def all_to_all(x: Tensor, group: dist.ProcessGroup | None, degree: int) -> Tensor:
    """Exchange equal parts along dim 0."""
    sizes = [x.shape[0] // degree] * degree
    made = _ops.all_to_all_single(x, sizes, sizes, _name(group))
    out: Tensor = _ops.wait_tensor(made)
    return out

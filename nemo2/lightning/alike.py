"""Ranks that work on one batch together are given the same one; a step says when they are not."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint.plain import bytes_of
from ..errors import Nemo2Error
from ..mesh.groups import MeshGroups
from ..pytree import tree_leaves

_LOOKED_AT = 4096  # elements of a tensor


class Alike:
    """Compares what the ranks of a ``dp`` coordinate are given, in the 1st, 2nd, 4th, 8th ... step.

    Data that is dealt out is the same on them by itself. That of a sampler or a stream that goes by
    the rank in the world is not, nor are samples changed at random by generators that differ.
    """

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}

    def check(self, groups: MeshGroups, name: str, batch: Any) -> None:
        """See that this step's batch is that of all ranks of this ``dp`` coordinate.

        Args:
            name: of the method of the LightningModule that is given it.

        Communication: in the steps compared an all-reduce of 2 dp numbers over the world.
        Raises: Nemo2Error on all ranks alike.
        """
        count = self._steps[name] = self._steps.get(name, 0) + 1
        if groups.sizes.world == groups.sizes.dp or count & (count - 1):
            return
        own = fingerprint(batch)
        bounds = torch.full((groups.sizes.dp, 2), -(1 << 40), dtype=torch.int64)
        bounds[groups.dp_rank] = torch.tensor([own, -own])
        bounds = bounds.to(groups.device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=groups.world)
        differ = [dp for dp, (most, least) in enumerate(bounds.tolist()) if most != -least]
        if differ:
            raise Nemo2Error(
                f"{name}, step {count - 1}: the ranks of dp coordinate"
                f" {', '.join(map(str, differ))} were given different batches; they work on one"
                " batch together, each on its part of the model\n"
                "  options: leave the samples of a map-style dataset to the Trainer, which deals"
                " them out over dp | a sampler or stream of your own by dp coordinate, not by"
                " rank: trainer.strategy.distributed_sampler_kwargs | for samples changed at"
                " random: L.seed_everything(seed, workers=True)"
            )


def fingerprint(batch: Any) -> int:
    """Return a number of 32 bits that differs for batches that differ, but for rare cases.

    Of a large tensor only some elements are looked at.
    """
    made = 0
    for x in tree_leaves(batch):
        made = zlib.crc32(_bytes(x), made)
    return made


def _bytes(x: Any) -> bytes:
    if isinstance(x, Tensor):
        if x.is_nested:
            return b"nested"
        said = f"{x.dtype} {tuple(x.shape)}".encode()
        if x.layout != torch.strided or x.is_quantized:
            return said
        flat = x.detach().resolve_conj().resolve_neg().reshape(-1)
        return said + bytes(bytes_of(flat[:: flat.numel() // _LOOKED_AT + 1].cpu()))
    if isinstance(x, np.ndarray) and x.dtype != object:
        return f"{x.dtype} {x.shape}".encode() + x.ravel()[:: x.size // _LOOKED_AT + 1].tobytes()
    if isinstance(x, (bool, int, float, complex, str, bytes, type(None))):
        return repr(x).encode()
    return type(x).__name__.encode()

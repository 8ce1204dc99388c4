"""One measurement: a shape on a mesh, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo2.mesh import MeshSizes

from .shapes import SHAPES, Shape

Step = Callable[[Tensor], Tensor]  # the global batch (batch, sequence + 1) to the mean loss


@dataclass(frozen=True)
class Case:
    """What every peer is given.

    Attributes:
        name: of a shape in ``SHAPES``.
        sizes: of the mesh.
        schedule, virtual_stages: of the pipeline.
        compile: whether blocks are compiled.
        reshard: whether gathered parameters are freed after each use.
        context, async_tp: nemo2's method of context parallelism, and ``Compile(async_tp=)``.
        lr: of AdamW.
    """

    name: str
    sizes: MeshSizes
    device: torch.device
    schedule: str = "1f1b"
    virtual_stages: int = 1
    compile: bool = True
    reshard: bool = False
    context: str = "ring"
    async_tp: bool = False
    lr: float = 3e-4

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]

    @property
    def dtype(self) -> torch.dtype:
        """What blocks compute in; on a CPU float32, so that losses can be compared."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def microbatches(self) -> int:
        """Parts of each data-parallel rank's batch: one sequence each."""
        return self.shape.batch // self.sizes.dp

    def part(self, ids: Tensor, rank: int) -> Tensor:
        """Return the sequences of one data-parallel coordinate."""
        return ids.chunk(self.sizes.dp)[rank]

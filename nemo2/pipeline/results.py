"""What the last stage has, on every stage: objects through the host, tensors from device to device.

A tensor in a pickled object would be read from the device, so that the host waits for all that was
asked of it, and come back on the sender's device. So objects are pickled without their tensors.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mesh.groups import MeshGroups
from .boundary import Boundary, Parcel, TensorSpec, pack, unpack


def from_last_stage(value: Any, groups: MeshGroups) -> Any:
    """Return the last stage's ``value``, which pickle must know how to write, on every stage.

    Communication: over ``pp`` one broadcast of an object, and one of its tensors, if it has any.
    """
    source = dist.get_global_rank(groups.pp, groups.sizes.pp - 1)
    own = groups.rank == source
    written = _Pickler.write(value, groups.device) if own else (b"", [])
    specs = [TensorSpec(tuple(x.shape), x.dtype, requires_grad=False) for x in written[1]]
    box: list[Any] = [(written[0], specs)]
    # On the host where there is a way, which torch finds by itself.
    dist.broadcast_object_list(box, src=source, group=groups.pp)
    data, specs = box[0]
    tensors: tuple[Tensor, ...] = ()
    if specs:
        boundary = Boundary(tuple(specs))
        if own:
            parcel = pack(boundary, written[1], groups.device)
        else:
            parcel = Parcel.empty(boundary, groups.device)
        ((_, raw),) = parcel.messages()
        dist.broadcast(raw, src=source, group=groups.pp)
        # Copies: who keeps one of them does not keep the others' memory.
        tensors = tuple(x.clone() for x in unpack(boundary, parcel, groups.device))
    return value if own else _Unpickler.read(data, tensors)


class _Pickler(pickle.Pickler):
    """Leaves out the tensors of a device."""

    device: torch.device
    tensors: list[Tensor]

    @classmethod
    def write(cls, value: Any, device: torch.device) -> tuple[bytes, list[Tensor]]:
        made = io.BytesIO()
        pickler = cls(made)
        pickler.device, pickler.tensors = device, []
        pickler.dump(value)
        return made.getvalue(), pickler.tensors

    def persistent_id(self, x: Any) -> int | None:
        if type(x) not in (Tensor, nn.Parameter) or x.device != self.device:
            return None
        if x.layout != torch.strided or x.is_quantized:
            return None
        self.tensors.append(x.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    tensors: tuple[Tensor, ...]

    @classmethod
    def read(cls, data: bytes, tensors: tuple[Tensor, ...]) -> Any:
        reader = cls(io.BytesIO(data))
        reader.tensors = tensors
        return reader.load()

    def persistent_load(self, index: Any) -> Any:
        return self.tensors[index]

"""What one rank writes of a model and its optimizers: boxes of whole tensors, each of them once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..errors import CheckpointError
from ..sharding.slices import Box
from .index import MODEL, OPTIMIZER, TensorInfo
from .plain import encode
from .target import Item, Target

# How an optimizer computes is a choice of the machine, and stays what it is there.
OWN_OPTIONS = ("foreach", "fused", "capturable", "differentiable")
# State of torch's optimizers that is one number for a parameter, whatever its shape.
_SCALARS = ("step", "mu_product", "eta", "mu")


@dataclass(frozen=True)
class Shard:
    """A box of the tensor ``name``, and this rank's memory of it."""

    name: str
    box: Box
    held: Tensor


@dataclass
class Content:
    """What a rank says of a checkpoint and writes into it.

    Attributes:
        tensors: those of this rank's stage, whole, also where other ranks write them.
        shards: what this rank writes.
        optimizers: of each, its class, its groups (``options``; ``params`` of this rank), and
            the ``state`` of its parameters: numbers, or how a tensor is laid out.
    """

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    optimizers: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, item: Item, local: Tensor, turn: int) -> None:
        """Add a tensor laid out as ``item``; the ranks with copies of a part take turns."""
        self.tensors[name] = TensorInfo(local.dtype, item.shape)
        if item.copy == turn % item.copies:
            for part in item.parts:
                if part.box.numel:
                    held = local[Box(part.at, part.box.shape).slices or ...]
                    self.shards.append(Shard(name, part.box, held))

    def add_whole(self, name: str, tensor: Tensor, first: bool) -> None:
        """Add a tensor that is the same on all ranks that have it; the first of them writes it."""
        self.tensors[name] = TensorInfo(tensor.dtype, tuple(tensor.shape))
        if first and tensor.numel():
            self.shards.append(Shard(name, Box.whole(tensor.shape), tensor))


def content_of(
    target: Target, optimizers: Sequence[Optimizer], only: Mapping[str, Any] | None = None
) -> Content:
    """Return what this rank writes.

    Args:
        only: the names of the model's tensors on this rank's stage to save; None for all.

    Raises: CheckpointError for optimizer state that cannot be saved; this rank alone may see it.
    """
    content = Content()
    for turn, item in enumerate(target.items):
        mine = item.local is not None and item.owner == target.stage
        if mine and (only is None or item.name in only):
            assert item.local is not None
            content.add(MODEL + item.name, item, item.local, turn)
    for number, optimizer in enumerate(optimizers):
        content.optimizers.append(_optimizer_content(content, target, optimizer, number))
    return content


def params_of(target: Target, optimizer: Optimizer) -> dict[str, tuple[Item, int]]:
    """Return name -> item and the number of its group, of the parameters of an optimizer.

    Raises: CheckpointError for parameters that the model does not have.
    """
    by_param = {id(item.param): item for item in target.items if item.param is not None}
    found, strangers = {}, 0
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            item = by_param.get(id(param))
            if item is None:
                strangers += 1
            else:
                found[item.name] = item, number
    if strangers:
        raise CheckpointError(
            f"{type(optimizer).__name__} has {strangers} parameters that"
            f" {type(target.module).__name__} does not have\n"
            "  options: make the optimizer of model.parameters(), after parallelize"
        )
    return found


def like_its_parameter(key: str, value: Any, item: Item) -> bool:
    """Say whether state is a tensor with an element for each one of the parameter."""
    if isinstance(item.param, DTensor):
        return isinstance(value, DTensor)
    alike = isinstance(value, Tensor) and value.shape == item.shape
    return alike and not (key in _SCALARS and not item.shape)


def laid_out_as(value: DTensor, item: Item) -> bool:
    """Say whether a tensor is split over ranks as its parameter is."""
    same = value.shape == item.shape and value._local_tensor.shape == _local_shape(item)
    return same and value.placements == getattr(item.param, "placements", None)


def _optimizer_content(
    content: Content, target: Target, optimizer: Optimizer, number: int
) -> dict[str, Any]:
    params = params_of(target, optimizer)
    groups = []
    for g, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in group.items() if k not in ("params", *OWN_OPTIONS)}
        names = [name for name, (_, of) in params.items() if of == g]
        groups.append({"params": names, "options": encode(options, f"parameter group {g}")})
    state: dict[str, dict[str, Any]] = {}
    turns = {item.name: turn for turn, item in enumerate(target.items)}
    for name, (item, _) in params.items():
        if item.owner == target.stage:
            assert item.param is not None
            for key, value in optimizer.state.get(item.param, {}).items():
                where = f"{OPTIMIZER}{number}.{name}.{key}", turns[name], target.writes
                made = _add_state(content, item, key, value, where)
                state.setdefault(name, {})[key] = made
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def _add_state(
    content: Content, item: Item, key: str, value: Any, where: tuple[str, int, bool]
) -> Any:
    """Add one value of an optimizer's state; return what JSON says of it.

    Args:
        where: its name in the checkpoint, whose turn it is, whether this rank is the stage's first.
    """
    name, turn, first = where
    if not isinstance(value, Tensor):
        return encode(value, f"the state '{key}' of '{item.name}'")
    like = like_its_parameter(key, value, item)
    if isinstance(value, DTensor):
        if not laid_out_as(value, item):
            raise CheckpointError(
                f"the optimizer's '{key}' of '{item.name}' has shape {tuple(value.shape)} and is"
                f" split as {value.placements}: not as its parameter, {item.shape}\n"
                "  options: an optimizer that keeps a value for each element or for all of them"
            )
        value = value._local_tensor
    if like:
        content.add(name, item, value.detach(), turn)
    else:
        content.add_whole(name, value.detach(), first)
    return {"$like": like}


def _local_shape(item: Item) -> torch.Size:
    assert item.local is not None
    return item.local.shape

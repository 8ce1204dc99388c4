"""Tensors that plain data keeps under parameters' names, laid out as they are.

An average of the weights is ``{name: DTensor}``, and each stage has other names. So these tensors
are stored as those of the model are, can be loaded on any mesh, and are put back into the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from .index import BESIDE, Index
from .shards import Content, laid_out_as
from .target import Item, Target

_Path = tuple[str, ...]


def take_out(data: Any, target: Target, content: Content) -> Any:
    """Return plain data without such tensors, which are added to ``content``.

    Dicts on the way must be the same on all ranks but for these names.
    """
    items = {name: (turn, item) for turn, item in enumerate(target.items) for name in item.names}

    def taken(path: _Path, tensor: DTensor) -> bool:
        turn, item = items.get(path[-1], (0, None))
        if item is None or item.local is None or not laid_out_as(tensor, item):
            return False
        if item.owner == target.stage:
            content.add(_name(path), item, tensor._local_tensor.detach(), turn)
        return True

    return _without(data, (), taken)


def _without(data: Any, path: _Path, taken: Callable[[_Path, DTensor], bool]) -> Any:
    if not isinstance(data, Mapping):
        return data
    return {
        key: _without(value, (*path, key), taken) if isinstance(key, str) else value
        for key, value in data.items()
        if not (isinstance(value, DTensor) and taken((*path, key), value))
    }


def _name(path: _Path) -> str:
    return f"{BESIDE}{json.dumps(path[:-1])}{path[-1]}"


def stored_beside(index: Index, target: Target) -> Iterator[tuple[str, _Path, Item]]:
    """Yield the name of each such tensor, where it goes in the data, and the parameter it is like.

    Only of parameters that the model has; under the name that a tied one has on this stage.
    """
    items = {name: item for item in target.items for name in item.names}
    here = {id(param): name for name, param in target.module.named_parameters()}
    for name in index.tensors:
        if name.startswith(BESIDE):
            text = name.removeprefix(BESIDE)
            path, end = json.JSONDecoder().raw_decode(text)
            if text[end:] in items:
                item, key = items[text[end:]], text[end:]
                if key == item.name:
                    key = here.get(id(item.param), key)
                yield name, (*path, key), item


def put_in(data: Any, found: Mapping[_Path, Tensor]) -> None:
    """Put tensors back into the data."""
    for path, tensor in found.items():
        inner = data
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = tensor

"""Plain data as JSON and back: what callbacks, loops, schedulers and users keep beside tensors.

JSON has no tuples, no keys but strings, no tensors. Such values are written as an object with one
key that begins with ``$``, so that reading gives back what was written, and executes nothing.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import CheckpointError

_LARGEST = 1 << 24  # bytes of a tensor in JSON


def encode(value: Any, where: str) -> Any:
    """Return ``value`` as JSON can hold it.

    Subclasses of dict, list and tuple become plain ones; tensors are moved to cpu.

    Args:
        where: what to call it in errors.

    Raises: CheckpointError that lists every part that is not plain data.

    >>> encode({"best": (1, 2.5), 3: None}, "extra")
    {'$dict': [['best', {'$tuple': [1, 2.5]}], [3, None]]}
    """
    problems: list[str] = []
    made = _encode(value, where, problems)
    if problems:
        raise CheckpointError(
            "a checkpoint holds plain data beside the tensors: numbers, texts, lists, tuples, sets,"
            " dicts, paths, small tensors\n  "
            + "\n  ".join(problems)
            + "\n  options: leave it out (save_hyperparameters(ignore=[...]), state_dict()) |"
            " say it in plain data | a buffer of the model for large tensors"
        )
    return made


def decode(made: Any) -> Any:
    """Return what ``encode`` was given.

    >>> decode(encode({"best": (1, 2.5), 3: None}, "extra"))
    {'best': (1, 2.5), 3: None}
    """
    if isinstance(made, list):
        return [decode(x) for x in made]
    if not isinstance(made, dict):
        return made
    if len(made) == 1:
        ((key, value),) = made.items()
        if key in _READ:
            return _READ[key](value)
    return {key: decode(value) for key, value in made.items()}


def _encode(x: Any, where: str, problems: list[str]) -> Any:
    if x is None or isinstance(x, bool):
        return x
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, str):
        return str.__str__(x)
    if isinstance(x, int):
        return int(x)
    if isinstance(x, float):
        return float(x) if math.isfinite(x) else {"$float": repr(float(x))}
    if isinstance(x, Mapping):
        return _encode_dict(x, where, problems)
    if isinstance(x, (list, tuple, set, frozenset)):
        made = [_encode(v, f"{where}[{i}]", problems) for i, v in enumerate(x)]
        tag = {tuple: "$tuple", set: "$set", frozenset: "$frozenset"}
        kind = next((name for base, name in tag.items() if isinstance(x, base)), None)
        return made if kind is None else {kind: made}
    if isinstance(x, (Tensor, np.ndarray)):
        return _encode_array(x, where, problems)
    if isinstance(x, bytes):
        return {"$bytes": base64.b64encode(x).decode()}
    if isinstance(x, PurePath):
        return {"$path": str(x)}
    if isinstance(x, torch.dtype):
        return {"$dtype": str(x).removeprefix("torch.")}
    if isinstance(x, complex):
        return {"$complex": [repr(x.real), repr(x.imag)]}
    problems.append(f"{where} is a {type(x).__module__}.{type(x).__qualname__}")
    return None


def _encode_dict(x: Mapping[Any, Any], where: str, problems: list[str]) -> Any:
    pairs = [(k, _encode(v, f"{where}[{k!r}]", problems)) for k, v in x.items()]
    if all(isinstance(k, str) and not k.startswith("$") for k, _ in pairs):
        return {str.__str__(k): v for k, v in pairs}
    return {"$dict": [[_encode(k, f"a key of {where}", problems), v] for k, v in pairs]}


def _encode_array(x: Tensor | np.ndarray[Any, Any], where: str, problems: list[str]) -> Any:
    if isinstance(x, DTensor):
        problems.append(f"{where} is a DTensor that is not under a parameter's name, split as it")
        return None
    tensor = x.detach().cpu() if isinstance(x, Tensor) else None
    try:
        tensor = torch.from_numpy(np.array(x)) if tensor is None else tensor
    except TypeError:
        problems.append(f"{where} is an array of {getattr(x, 'dtype', '?')}")
        return None
    if tensor.numel() * tensor.itemsize > _LARGEST:
        problems.append(f"{where} is a tensor of {tensor.numel() * tensor.itemsize} bytes")
        return None
    data = base64.b64encode(bytes_of(tensor)).decode()
    dtype = str(tensor.dtype).removeprefix("torch.")
    tag = "$tensor" if isinstance(x, Tensor) else "$array"
    return {tag: [dtype, list(tensor.shape), data]}


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on cpu, without a copy when it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _tensor(made: list[Any]) -> Tensor:
    name, shape, data = made
    read = bytearray(base64.b64decode(data))
    dtype = getattr(torch, name)
    if not read:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(read, dtype=torch.uint8).clone().view(dtype).reshape(shape)


_READ: dict[str, Any] = {
    "$tuple": lambda x: tuple(map(decode, x)),
    "$set": lambda x: set(map(decode, x)),
    "$frozenset": lambda x: frozenset(map(decode, x)),
    "$dict": lambda x: {decode(k): decode(v) for k, v in x},
    "$tensor": _tensor,
    "$array": lambda x: _tensor(x).numpy(),
    "$float": float,
    "$complex": lambda x: complex(float(x[0]), float(x[1])),
    "$bytes": base64.b64decode,
    "$path": Path,
    "$dtype": lambda x: getattr(torch, x),
}

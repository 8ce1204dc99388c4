"""What torch calls give on shapes alone, remembered.

A model repeats its blocks, and a plan runs the step several times: most calls have been made
before, with other tensors of the same shapes. On meta many of them run through torch's
decompositions in Python (0.1 to 1 ms each); a call that is remembered costs a look-up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pytree import tree_flatten, tree_unflatten


class Shaped(NamedTuple):
    """A tensor without data that owns its memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def on_meta(func: Callable[..., Any], leaves: list[Any], spec: Any, *, pure: bool) -> Any:
    """Return what ``func`` gives for arguments on meta; its result may be one seen before.

    Args:
        leaves: of its arguments ``(args, kwargs)``, whose structure is ``spec``.
        pure: whether it changes nothing. Results that share memory with an argument are
            always made anew, so that writes in place into views can be followed.
    """
    key = tuple([_key(x) for x in leaves])
    if pure and None not in key and _is_torch(func) and _hashable(key):
        known = _result(func, spec, key, torch.get_default_dtype())
        if known is not None:
            return tree_unflatten(known[1], [_made(x) for x in known[0]])
    args, kwargs = tree_unflatten(spec, leaves)
    return func(*args, **kwargs)


def _key(x: Any) -> Any:
    """Return what a call depends on in one of its arguments; None where that is not known."""
    if not isinstance(x, Tensor):
        return type(x), x  # 1, 1.0 and True are equal, and not the same
    if x.layout is not torch.strided or x.is_complex() or x.requires_grad:
        return None
    return Shaped(tuple(x.shape), x.stride(), x.dtype)


def _is_torch(func: Callable[..., Any]) -> bool:
    """Say whether ``func`` is the same in every step: no function that user code has made."""
    return not isinstance(func, FunctionType) or func.__module__.startswith(("torch", "nemo2"))


def _hashable(key: tuple[Any, ...]) -> bool:
    try:
        hash(key)
    except TypeError:  # slices
        return False
    return True


@lru_cache(maxsize=8192)
def _result(
    func: Callable[..., Any], spec: Any, key: tuple[Any, ...], dtype: torch.dtype
) -> tuple[list[Any], Any] | None:
    """Return the leaves and the structure of a result, or None if it shares memory.

    Args:
        dtype: torch's default one; results may depend on it.
    """
    leaves = [_made(x) if type(x) is Shaped else x[1] for x in key]
    args, kwargs = tree_unflatten(spec, leaves)
    made, structure = tree_flatten(func(*args, **kwargs))
    given = {memory(x) for x in leaves if isinstance(x, Tensor)}
    own = [memory(x) for x in made if isinstance(x, Tensor)]
    kept = [_key(x) if isinstance(x, Tensor) else x for x in made]
    shared = given.intersection(own) or len({*own}) < len(own)
    strange = any(isinstance(x, Tensor) and k is None for x, k in zip(made, kept, strict=True))
    return None if shared or strange else (kept, structure)


def _made(x: Any) -> Any:
    return x.empty() if type(x) is Shaped else x


def memory(meta: Tensor) -> int:
    """Return what identifies the memory of a tensor that is alive: views share their base's."""
    return int(meta.untyped_storage()._cdata)

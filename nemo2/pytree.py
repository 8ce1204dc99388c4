"""Trees of tensors, by optree, with the containers that models return opened on first sight.

Dataclasses and dict subclasses (the outputs of Hugging Face models) are leaves to optree;
here they are registered, in this library's own namespace, the first time one is met.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterable
from functools import cache, lru_cache
from typing import Any

import optree
import torch
from torch import Tensor

NAMESPACE = "nemo2"


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of ``tree``, ``None`` included."""
    return tree_flatten(tree)[0]


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return the leaves of ``tree``, ``None`` included, and its structure."""
    if _is_leaf(tree):
        return [tree], _leaf_spec()
    if type(tree) is tuple and len(tree) == 2 and type(tree[1]) is dict and not tree[1]:
        args = tree[0]  # that of a call, mostly
        if type(args) is tuple and all(_is_leaf(x) for x in args):
            return list(args), _call_spec(len(args))
    return _flatten(tree)


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    while True:
        leaves, spec = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
        new = {type(x) for x in leaves if _is_container(x)}
        if not new:
            return leaves, spec
        for cls in new:
            _register(cls)


def _is_leaf(x: Any) -> bool:
    """Say whether ``x`` is a leaf to optree, whatever is registered."""
    cls: Any = type(x)
    return _is_leaf_type(cls)


@lru_cache(maxsize=1024)
def _is_leaf_type(cls: type) -> bool:
    return issubclass(cls, (Tensor, int, float, str, torch.dtype, torch.device, type(None)))


@cache
def _leaf_spec() -> Any:
    return _flatten(0)[1]


@cache
def _call_spec(count: int) -> Any:
    """Return the structure of the arguments of a call, ``count`` leaves by position."""
    return _flatten(((0,) * count, {}))[1]


def tree_unflatten(spec: Any, leaves: Iterable[Any]) -> Any:
    """Return the tree of structure ``spec`` with ``leaves``."""
    return optree.tree_unflatten(spec, leaves)


def tree_map(func: Callable[[Any], Any], tree: Any) -> Any:
    """Return ``tree`` with ``func`` applied to each leaf, ``None`` included."""
    if _is_leaf(tree):
        return func(tree)
    leaves, spec = tree_flatten(tree)
    return optree.tree_unflatten(spec, [func(x) for x in leaves])


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of ``tree``."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


@lru_cache(maxsize=1024)
def _may_contain(cls: type) -> bool:
    if issubclass(cls, (Tensor, type, str, int, float)):
        return False
    return issubclass(cls, dict) or dataclasses.is_dataclass(cls)


def _is_container(x: Any) -> bool:
    cls: Any = type(x)
    if not _may_contain(cls):
        return False
    if isinstance(x, dict):
        return True
    return any(isinstance(v, (Tensor, dict, tuple, list)) for v in vars(x).values())


def _register(cls: type) -> None:
    if issubclass(cls, dict):
        flatten, unflatten = _flatten_mapping, _unflatten_mapping(cls)
    else:
        flatten, unflatten = _flatten_dataclass, _unflatten_dataclass
    optree.register_pytree_node(cls, flatten, unflatten, namespace=NAMESPACE)


def _flatten_mapping(x: Any) -> tuple[tuple[Any, ...], Any, tuple[Hashable, ...]]:
    keys = tuple(x.keys())
    return tuple(dict.__getitem__(x, k) for k in keys), keys, keys


def _unflatten_mapping(cls: type) -> Callable[[Any, Any], Any]:
    def unflatten(keys: Any, children: Any) -> Any:
        return cls(**dict(zip(keys, children, strict=True)))

    return unflatten


def _flatten_dataclass(x: Any) -> tuple[tuple[Any, ...], Any, tuple[str, ...]]:
    names = tuple(f.name for f in dataclasses.fields(x))
    return tuple(getattr(x, n) for n in names), x, names


def _unflatten_dataclass(like: Any, children: Any) -> Any:
    out = copy.copy(like)
    for field, child in zip(dataclasses.fields(like), children, strict=True):
        object.__setattr__(out, field.name, child)
    return out

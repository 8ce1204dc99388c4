"""Absent tensors: a shape, a dtype and a device, but no data.

What depends on a parameter of another stage is absent. An operation on an absent tensor
runs on meta and gives an absent tensor; once the value has arrived (``bind``), every use
of the same Python variable is a use of the received tensor.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..errors import PipelineError
from ..pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from ..sharding.layout import WHOLE, Sharding
from .shapes import on_meta

REAL_CONSTRUCTORS = {
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "randint_like",
} | {
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_tensor",
}
_VALUE_READS = {
    "item",
    "tolist",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__complex__",
    "__array__",
} | {
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "unique",
    "unique_consecutive",
}
_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d"} | {
    "alpha_dropout",
    "feature_dropout",
    "feature_alpha_dropout",
}
_IDENTITIES = {"dropout_", "requires_grad_", "retain_grad", "cuda", "cpu"}


class NeedsValueError(PipelineError):
    """User code needs the value of an absent tensor."""


class Absent(Tensor):
    """A tensor whose value lives on another rank, or is not known yet while planning.

    Attributes (all set by nemo2):
        meta: a meta tensor of the same shape, strides and dtype, on which operations run.
        home: the device that user code sees.
        layouts: layout over ``cp`` and over ``tp``; only the plan reads it.
        entered: whether its gradient over ``tp`` is summed where it was gathered; plan only.
        param: the parameter's name when this stands for a parameter, else ``None``.
        bound: the received tensor that takes its place, once there.
        needs_grad: whether a gradient flows back through it; plan only.
        key: the name under which the plan knows this value; plan only.
        unusable: the refusal that its first use raises; plan only.
    """

    meta: Tensor
    home: torch.device
    layouts: Sharding
    entered: bool
    param: str | None
    bound: Tensor | None
    needs_grad: bool
    key: Any
    unusable: Exception | None

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device) -> Absent:
        out: Absent = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            dtype=meta.dtype,
            device=device,
            requires_grad=False,
        )
        out.meta, out.home = meta, device
        out.layouts, out.entered, out.param = WHOLE, False, None
        out.bound, out.needs_grad, out.key, out.unusable = None, True, None, None
        return out

    @staticmethod
    def like(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Absent:
        with torch._C.DisableTorchFunction():
            return Absent(torch.empty(shape, dtype=dtype, device="meta"), device)

    def bind(self, value: Tensor) -> None:
        """Let ``value`` stand for this tensor from now on."""
        self.bound = value

    # mypy drops the names of arguments of dunder methods, and then misses this keyword.
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Absent(shape={tuple(self.meta.shape)}, dtype={self.meta.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Absent:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NeedsValueError(f"cannot pickle {self!r}: its value lives on another pipeline stage")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        args, kwargs = resolve((args, kwargs))
        if not any(is_absent(x) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        return absent_call(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NeedsValueError(
            f"{func} needs the value of a tensor that lives on another stage{user_line()}"
        )


def is_absent(x: Any) -> TypeGuard[Absent]:
    return type(x) is Absent


def resolve(tree: Any) -> Any:
    """Put the received tensors in the place of the bound absent ones in ``tree``."""
    if type(tree) in (Tensor, nn.Parameter):
        return tree
    leaves, spec = tree_flatten(tree)
    if not any(type(x) is Absent for x in leaves):
        return tree
    return tree_unflatten(
        spec, [x.bound if type(x) is Absent and x.bound is not None else x for x in leaves]
    )


@lru_cache(maxsize=4096)
def name_of(func: Callable[..., Any]) -> str:
    """Return one name for one torch operation: ``add``, ``shape``, ``__getitem__``."""
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        owner = getattr(getattr(func, "__self__", None), "__name__", "?")
        return owner if name == "__get__" else f"{owner}.{name}"
    return str(name)


@lru_cache(maxsize=4096)
def is_inplace(name: str) -> bool:
    return (
        name == "__setitem__"
        or (name.endswith("_") and not name.endswith("__"))
        or (
            name.startswith("__i")
            and name
            not in (
                "__index__",
                "__int__",
                "__invert__",
                "__iter__",
            )
        )
    )


def user_line() -> str:
    """Return where in the user's code the present call was made, for an error message."""
    here = [f for f in traceback.extract_stack(sys._getframe(1)) if _is_user_file(f.filename)]
    return f"\n  at {here[-1].filename}:{here[-1].lineno}: {here[-1].line}" if here else ""


_LIBRARIES = ("torch", "nemo2", "optree", "megatron", "lightning", "einops")


def _is_user_file(filename: str) -> bool:
    loaded = [sys.modules[name] for name in _LIBRARIES if name in sys.modules]
    roots = tuple(f"{path}{os.sep}" for module in loaded for path in module.__path__)
    return not filename.startswith(("<frozen", *roots))


def absent_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on shapes alone; what comes out depends on absent values and is absent.

    Raises: PipelineError where the call needs a value: reading one, or writing an absent
        value into a real tensor in place. The message names the user's line.
    """
    name = name_of(func)
    first = args[0] if args else None
    if func in (torch.autograd.grad, Tensor.backward):
        raise NeedsValueError(
            "torch.autograd inside of the step differentiates values that are not there when the"
            f" step is planned{user_line()}\n"
            "  options: a mesh of one device | a loss without gradients of gradients"
        )
    if name in _VALUE_READS:
        raise NeedsValueError(
            f"'{name}' reads the value of a tensor that depends on parameters, and may be on"
            f" another rank{user_line()}\n"
            "  options: compute it from the batch, move it into a block or after the last block"
        )
    if name in _IDENTITIES and isinstance(first, Absent):
        return first
    if name in _DROPOUTS and isinstance(first, Absent):
        return Absent(first.meta, first.home)
    if is_inplace(name) and isinstance(first, Tensor) and not is_absent(first):
        raise NeedsValueError(
            f"'{name}' writes a value that depends on parameters, and may be on another rank, into"
            f" a real tensor{user_line()}\n"
            "  options: build the result out of place (torch.cat, torch.where), or inside a block |"
            " use_cache=False, if it is a cache"
        )
    device = next(x.home for x in tree_leaves((args, kwargs)) if type(x) is Absent)
    if name == "device":
        return device
    if name == "get_device":
        return -1 if device.index is None else device.index
    if name == "requires_grad" and isinstance(first, Absent):
        return first.needs_grad
    if name in ("is_cuda", "is_cpu", "is_meta"):
        return device.type == name[3:]
    if name in ("to", "type") and is_absent(first):
        args, kwargs, device = _without_device(args, kwargs, device)
    if name in REAL_CONSTRUCTORS:
        kwargs = {"device": device, **kwargs}
        return func(*to_meta(args), **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        try:
            shaped: Any = _SHAPES.get(name, func)
            pure = not is_inplace(name) and "." not in name  # a dot: an attribute is set
            leaves, spec = tree_flatten((args, kwargs))
            out = on_meta(shaped, [_meta_of(x) for x in leaves], spec, pure=pure)
        except NeedsValueError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            if "meta" in str(error).lower():
                raise NeedsValueError(
                    f"'{name}' needs a value that is not on this stage{user_line()}"
                ) from error
            raise
    if is_inplace(name):
        return first
    return tree_map(lambda x: Absent(x, device) if isinstance(x, Tensor) else x, out)


def _grouped_mm(x: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
    """Rows of ``x`` (rows, k) times the matrix of their group in ``weight`` (groups, k, n)."""
    if x.ndim != 2 or weight.ndim != 3:
        raise NotImplementedError("grouped_mm on meta: rows of 2 dims and weights of 3")
    return x.new_empty(x.shape[0], weight.shape[2])


def _bincount(x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """``minlength`` counts (no value of ``x`` is larger): without it their number is a value."""
    if minlength < 1:
        raise NotImplementedError("bincount on meta: minlength must say how many counts")
    dtype = torch.int64 if weights is None else weights.dtype
    if weights is not None and dtype != torch.float32:
        dtype = torch.float64
    return torch.empty(minlength, dtype=dtype, device="meta")


# torch knows their shapes on meta for some dtypes only, or not at all
_SHAPES = {
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped_mm),
    "bincount": _bincount,
}


def _without_device(
    args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any], torch.device]:
    """Take the device out of the arguments of ``Tensor.to``: meta stays meta."""
    kept = []
    for a in args[1:]:
        if isinstance(a, (str, torch.device)) and not isinstance(a, torch.dtype):
            device = torch.device(a)
        else:
            kept.append(a)
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
    if not kept and not kwargs:
        kept = [args[0].meta.dtype]
    return (args[0], *kept), kwargs, device


def to_meta(tree: Any) -> Any:
    """Replace every tensor in ``tree`` by one on meta with the same shape, strides and dtype."""
    return tree_map(_meta_of, tree)


def _meta_of(x: Any) -> Any:
    if type(x) is Absent:
        return x.meta
    if isinstance(x, Tensor):
        with torch._C.DisableTorchFunction():
            return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
    if isinstance(x, torch.device):
        return torch.device("meta")
    return x

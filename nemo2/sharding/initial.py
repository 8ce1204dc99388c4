"""Initial weights of models built on meta: the same on every mesh, one module at a time.

Each module that owns parameters on meta is initialised by its own ``reset_parameters``, with
torch's generator seeded from (seed, module name). So a value depends on neither the rank nor the
mesh, nothing is communicated, and no rank ever holds more than one module whole.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Nemo2Error
from .counter import key_of

# What whole models use to initialise their parts: run by the constructor, it is lost on meta.
_CUSTOM = ("_init_weights", "init_weights", "initialize_weights", "_reset_parameters")
_Filled = Mapping[str, Tensor]
_Own = dict[str, Any]


def check_materialisable(model: nn.Module) -> None:
    """Raise when tensors on meta cannot be given the values that the model would draw.

    Raises: Nemo2Error that names all modules and buffers that nothing can fill.
    """
    problems = []
    for name, module in model.named_modules():
        own = _on_meta(module)
        deep = any(t.is_meta for t in (*module.parameters(), *module.buffers()))
        custom = next((f for f in _CUSTOM if deep and callable(getattr(module, f, None))), None)
        whole = hasattr(module, "reset_parameters") and deep and any(module.children())
        if custom or whole:
            found = custom or "reset_parameters"
            problems.append(f"{_named(name, module)} has {found}, which may set its submodules")
        elif own and not callable(getattr(module, "reset_parameters", None)):
            kinds = _kinds(module)
            problems.append(f"{_named(name, module)} has no reset_parameters for {kinds}")
    if problems:
        raise Nemo2Error(
            "cannot parallelize this model on meta: not all of its values can be drawn again\n"
            + "\n".join(f"  {p}" for p in problems[:8])
            + (f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else "")
            + "\n  options: build the model on cpu | give the module a reset_parameters that fills"
            " its own parameters and buffers"
        )


class Initial:
    """Draws the values of a model on meta, as it is now; keeps those of the last module."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.seed = seed
        self._owners = {
            name: (module, dict(module._parameters), dict(module._buffers))
            for name, module in model.named_modules()
            if _on_meta(module)
        }
        self._last: tuple[str, _Filled] = ("", {})

    def value(self, name: str) -> Tensor:
        """Return the whole value, on cpu, of the parameter or buffer called ``name``.

        Raises: Nemo2Error when ``reset_parameters`` of its module leaves it unfilled.
        """
        owner, _, leaf = name.rpartition(".")
        if not self._last[1] or self._last[0] != owner:
            self._last = owner, _drawn(owner, *self._owners[owner], self.seed)
        return self._last[1][leaf]


def _drawn(name: str, module: nn.Module, params: _Own, buffers: _Own, seed: int) -> _Filled:
    """Return the module's own parameters and buffers, after its ``reset_parameters``."""
    scratch: Any = copy.copy(module)
    own = params | buffers
    for leaf in own:  # where a parameter of another stage was, an attribute stands for it
        scratch.__dict__.pop(leaf, None)
    made = {leaf: _unfilled(x) for leaf, x in own.items() if x is not None and x.is_meta}
    for leaf in own:  # parameters of other stages stand there as absent attributes
        scratch.__dict__.pop(leaf, None)
    scratch.__dict__["_parameters"] = {leaf: made.get(leaf, x) for leaf, x in params.items()}
    scratch.__dict__["_buffers"] = {leaf: made.get(leaf, x) for leaf, x in buffers.items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(key_of(seed, "weights", name) & 0x7FFF_FFFF_FFFF_FFFF)
        scratch.reset_parameters()
    filled = scratch._parameters | scratch._buffers
    made = {leaf: filled[leaf] for leaf in made}
    left = [leaf for leaf, x in made.items() if _is_unfilled(x)]
    if left:
        raise Nemo2Error(
            f"reset_parameters of '{name}' ({type(module).__name__}) does not fill"
            f" {', '.join(map(repr, left))}, which has no value on meta\n"
            "  options: fill it there | build the model on cpu"
        )
    return {leaf: x.detach() for leaf, x in made.items()}


def _unfilled(x: Tensor) -> Tensor:
    """Return a tensor on cpu whose elements show that nothing was written."""
    made = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    if x.is_floating_point() or x.is_complex():
        made.fill_(float("nan"))
    elif x.dtype != torch.bool:
        made.fill_(torch.iinfo(x.dtype).max)
    if isinstance(x, nn.Parameter):
        return nn.Parameter(made, requires_grad=x.requires_grad)
    return made


def _is_unfilled(x: Tensor) -> bool:
    if x.dtype == torch.bool or x.is_meta:
        return True  # whether a bool was written cannot be seen
    if x.is_floating_point() or x.is_complex():
        return bool(x.isnan().any())
    return bool((x == torch.iinfo(x.dtype).max).any())


def _on_meta(module: nn.Module) -> bool:
    own = (*module._parameters.values(), *module._buffers.values())
    return any(x is not None and x.is_meta for x in own)


def _kinds(module: nn.Module) -> str:
    found = [
        f"parameter '{n}'" for n, p in module._parameters.items() if p is not None and p.is_meta
    ]
    found += [f"buffer '{n}'" for n, b in module._buffers.items() if b is not None and b.is_meta]
    return ", ".join(found[:4])


def _named(name: str, module: nn.Module) -> str:
    return f"'{name}' ({type(module).__name__})" if name else type(module).__name__

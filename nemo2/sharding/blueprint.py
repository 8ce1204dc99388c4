"""What initialises which tensor of a model on meta, found by running initialisers on meta.

Random numbers that a constructor draws on meta are lost, so its initialisers are run again. Which
of them write which tensor is found on a *blueprint*: the model's modules with tensors of their
own on meta. torch counts the writes to every tensor, also on meta; a tensor that the constructor
wrote more often than known initialisers do is set by code that cannot be run again.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Spot = tuple[str, str]  # (module's first name, attribute)


@dataclass(frozen=True)
class Call:
    """One call of an initialiser, of the modules with these first names.

    ``module.reset_parameters()``, or with an owner ``owner._init_weights(module)``.
    """

    module: str
    owner: str | None = None


class Count(NamedTuple):
    """How often a tensor was written: as torch counts it, and without a trace on meta."""

    seen: int
    unseen: int


class Blueprint:
    """A model's modules, with attributes as they are and tensors on meta, none of them shared."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self._first: dict[int, str] = {}  # names of modules of both models, by id
        self._made: dict[int, nn.Module] = {}
        self._copy(model, "")

    def _copy(self, module: nn.Module, name: str) -> nn.Module:
        if id(module) in self._made:
            return self._made[id(module)]
        made: nn.Module = object.__new__(type(module))
        self._made[id(module)] = self.modules[name] = made
        self._first[id(module)] = self._first[id(made)] = name
        own: dict[str, Any] = made.__dict__
        own.update(module.__dict__)
        for kind in ("_parameters", "_buffers"):
            own[kind] = {leaf: like(x, "meta") for leaf, x in module.__dict__[kind].items()}
        own["_modules"] = {
            leaf: child and self._copy(child, f"{name}.{leaf}" if name else leaf)
            for leaf, child in module._modules.items()
        }
        return made

    def name(self, module: nn.Module) -> str:
        return self._first[id(module)]

    def tensor(self, spot: Spot) -> Tensor:
        return held(self.modules[spot[0]], spot[1])

    @contextmanager
    def holding(self, tensors: dict[Spot, Tensor]) -> Iterator[None]:
        """Put tensors in their places for a time."""
        before = {spot: self.tensor(spot) for spot in tensors}
        self._put(tensors)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, tensors: dict[Spot, Tensor]) -> None:
        for (name, leaf), x in tensors.items():
            module = self.modules[name]
            own: Any = module._parameters if leaf in module._parameters else module._buffers
            own[leaf] = x

    def run(self, call: Call) -> None:
        module: Any = self.modules[call.module]
        if call.owner is None:
            module.reset_parameters()
        else:
            owner: Any = self.modules[call.owner]
            owner._init_weights(module)

    def writes(self, call: Call) -> dict[Spot, Count]:
        """Run ``call`` on meta; return how often it wrote each tensor."""
        under = [
            ((self.name(m), leaf), x)
            for m in self.modules[call.module].modules()
            for leaf, x in (*m._parameters.items(), *m._buffers.items())
            if x is not None
        ]
        before = [x._version for _, x in under]
        with initialising(), _Untraced() as untraced:
            self.run(call)
        return {
            spot: Count(x._version - then, untraced.count(x))
            for (spot, x), then in zip(under, before, strict=True)
            if x._version != then or untraced.count(x)
        }

    def bottom_up(self, name: str) -> Iterator[str]:
        """Yield names of modules as ``nn.Module.apply`` goes: children first, shared ones again."""
        for child in self.modules[name].children():
            yield from self.bottom_up(self.name(child))
        yield name


@contextmanager
def initialising() -> Iterator[None]:
    """Keep the caller's generator; new tensors have values even under a default of meta."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        yield


# Functions of torch.nn.init that return at once on meta, in some or all versions of torch.
_UNTRACED = {"trunc_normal_", "orthogonal_", "dirac_", "sparse_"}


class _Untraced(TorchFunctionMode):
    """Counts the writes that these functions would do: they ask whether a tensor is on meta."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[int] = Counter()

    def count(self, x: Tensor) -> int:
        return self._counts[x.untyped_storage()._cdata]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        asks = getattr(func, "__self__", None) is Tensor.is_meta
        if asks and sys._getframe(1).f_globals.get("__name__") == "torch.nn.init":
            self._counts[args[0].untyped_storage()._cdata] += 1
        return func(*args, **(kwargs or {}))


def untraced(module: nn.Module) -> str:
    """Return which of these functions methods of the module call, initialisers left out."""
    for cls in type(module).__mro__:
        for name, method in vars(cls).items():
            code = getattr(method, "__code__", None)
            if code is None or name in ("reset_parameters", "_init_weights"):
                continue
            found = sorted(_UNTRACED & set(code.co_names))
            if found:
                return found[0]
    return ""


def like(x: Tensor | None, device: str) -> Any:
    """Return a tensor like ``x``, without its values."""
    if x is None:
        return None
    made = torch.empty(x.shape, dtype=x.dtype, device=device)
    if isinstance(x, nn.Parameter):
        return nn.Parameter(made, requires_grad=x.requires_grad)
    return made


def held(module: nn.Module, leaf: str) -> Tensor:
    """Return the parameter or buffer of ``module`` called ``leaf``."""
    x: Tensor | None = module._parameters.get(leaf)
    x = module._buffers[leaf] if x is None else x
    assert x is not None
    return x


def is_pretrained(module: nn.Module) -> bool:
    """Say whether this is a model of transformers: ``_init_weights(m)`` fills each module m."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(module, library.PreTrainedModel)


def takes_a_module(module: nn.Module) -> bool:
    """Say whether the module's ``_init_weights`` is made for ``self.apply(...)``."""
    own: Any = getattr(module, "_init_weights", None)
    try:
        inspect.signature(own).bind(module)
    except (TypeError, ValueError):
        return False
    return True


def pretrained_calls(blueprint: Blueprint) -> list[Call]:
    """Return the calls by which models of transformers fill their modules, in their order.

    Each module is filled by the nearest model above it, children first.
    """
    calls: dict[Call, None] = {}

    def visit(module: nn.Module, owner: str | None) -> None:
        name = blueprint.name(module)
        owner = name if is_pretrained(module) else owner
        for child in module.children():
            visit(child, owner)
        if owner is not None:
            calls.setdefault(Call(name, owner))

    visit(blueprint.modules[""], None)
    return list(calls)


def apply_calls(blueprint: Blueprint, owners: Sequence[str]) -> list[Call]:
    """Return the calls of ``owner.apply(owner._init_weights)``, inner owners first."""
    order = [n for n in dict.fromkeys(blueprint.bottom_up("")) if n in owners]
    return [Call(name, owner) for owner in order for name in blueprint.bottom_up(owner)]


@dataclass
class Writes:
    """What calls write: for each tensor the calls, by their place in the order, and how often."""

    calls: list[Call]
    by_spot: dict[Spot, dict[int, Count]]
    failed: dict[Call, Exception]

    @classmethod
    def of(cls, blueprint: Blueprint, calls: Sequence[Call]) -> Writes:
        by_spot: dict[Spot, dict[int, Count]] = {}
        failed: dict[Call, Exception] = {}
        for i, call in enumerate(calls):
            try:
                for spot, count in blueprint.writes(call).items():
                    by_spot.setdefault(spot, {})[i] = count
            except Exception as error:  # it is the user's code
                failed[call] = error
        return cls(list(calls), by_spot, failed)

    def seen(self, spot: Spot) -> int:
        """Return how often the calls write ``spot``, as torch counts it."""
        return sum(c.seen for c in self.by_spot.get(spot, {}).values())

    def of_spots(self, spots: Sequence[Spot]) -> list[Call]:
        """Return the calls that write any of ``spots``, in order."""
        found = {i for spot in spots for i in self.by_spot.get(spot, ())}
        return [self.calls[i] for i in sorted(found)]

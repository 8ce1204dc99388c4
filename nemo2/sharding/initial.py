"""Initial weights of models built on meta: the same on every mesh, one module at a time.

The tensors of one module are drawn at a time, on cpu, by what its constructor used:
``reset_parameters`` of the module, or ``_init_weights`` of the models above it, as transformers'
models and ``self.apply(self._init_weights)`` do. Torch's generator is seeded from (seed, module
name), and all other modules stay on meta meanwhile. So a value depends on neither the rank nor
the mesh, nothing is communicated, and no rank ever holds more than one module whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import Nemo2Error
from .annotate import _owners
from .blueprint import (
    Blueprint,
    Call,
    Spot,
    Writes,
    apply_calls,
    held,
    initialising,
    is_pretrained,
    like,
    pretrained_calls,
    takes_a_module,
    untraced,
)
from .counter import key_of

# What whole models use to initialise their parts, in ways that only their authors know.
_CUSTOM = ("init_weights", "initialize_weights", "_reset_parameters")


@dataclass(frozen=True)
class Origin:
    """Whence a tensor gets its value: drawn at ``spots``, by ``init`` after ``resets``.

    Attributes:
        spots: one, or all places of a tied parameter that was tied before it was filled.
        init: whether ``_init_weights`` of the models above applies.
    """

    spots: tuple[Spot, ...]
    init: bool


@dataclass(frozen=True)
class _Unknown:
    """A tensor of which is not known what filled it.

    Attributes:
        spots: all places that hold it; ``first``: those for which it may have been made.
        version: how often it was written.
    """

    spots: tuple[Spot, ...]
    first: tuple[Spot, ...]
    version: int


class Initial:
    """The values of a model on meta, as it is when this is made; keeps the last module's.

    Raises: Nemo2Error that names all modules and tensors whose values cannot be drawn again.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.seed = seed
        self.names = _tensors_on_meta(model)
        if not self.names:
            return
        self._blueprint = Blueprint(model)
        self._pretrained = _inside_pretrained(model)
        problems = _custom(model, self._pretrained) + _attributes(model)
        self._resets = Writes.of(self._blueprint, self._reset_calls())
        owners = [
            n
            for n, m in model.named_modules()
            if n not in self._pretrained and takes_a_module(m) and _deep(m)
        ]
        calls = pretrained_calls(self._blueprint) + apply_calls(self._blueprint, owners)
        self._inits = Writes.of(self._blueprint, calls)
        problems += [_failure(self._blueprint, c, e) for c, e in self._failed()]
        self._origins: dict[str, Origin] = {}
        if not problems:
            problems = self._find_origins(model, bool(owners))
        if problems:
            raise _refusal(problems)
        self._units = self._group()
        self._last: tuple[tuple[Origin, ...], dict[Origin, Tensor]] = ((), {})

    def value(self, name: str) -> Tensor:
        """Return the whole value, on cpu, of the parameter or buffer called ``name``.

        Raises: Nemo2Error when its initialisers leave some of it unfilled.
        """
        origin = self._origins[name]
        unit = self._units[origin]
        if self._last[0] != unit:
            self.forget()  # before others take memory
            self._last = unit, self._draw(unit)
        return self._last[1][origin]

    def forget(self) -> None:
        """Free the last module's values."""
        self._last = ((), {})

    def _reset_calls(self) -> list[Call]:
        owners = dict.fromkeys(spot[0] for spots in self.names.values() for spot in spots)
        modules = self._blueprint.modules
        return [Call(n) for n in owners if callable(getattr(modules[n], "reset_parameters", None))]

    def _failed(self) -> Iterator[tuple[Call, Exception]]:
        """Yield what cannot be run on meta, but reset_parameters that a model overwrites."""
        yield from self._inits.failed.items()
        for call, error in self._resets.failed.items():
            if call.module not in self._pretrained:
                yield call, error

    # --- which initialisers a constructor has used

    def _find_origins(self, model: nn.Module, applies: bool) -> list[str]:
        """Find the origin of each tensor; return what is wrong."""
        tied = _tied_targets(model)
        modules = dict(model.named_modules())
        unfilled: dict[str, list[str]] = {}
        unknown: dict[str, _Unknown] = {}
        for name, spots in self.names.items():
            inside = [s for s in spots if s[0] in self._pretrained]
            if inside:
                source = next((s for s in inside if _dotted(s) not in tied), inside[0])
                self._origins[name] = Origin((source,), True)
                filled = self._fills(source)
            else:
                x = held(modules[spots[0][0]], spots[0][1])
                first = _first_holder(x, modules) if len(spots) > 1 else None
                unknown[name] = _Unknown(spots, (first,) if first in spots else spots, _version(x))
                filled = any(map(self._fills, spots))
            if not filled:
                unfilled.setdefault(spots[0][0], []).append(spots[0][1])
                unknown.pop(name, None)
        problems = [self._unfilled(modules[n], n, leaves) for n, leaves in unfilled.items()]
        return problems + self._explain(unknown, applies)

    def _fills(self, spot: Spot) -> bool:
        return spot in self._resets.by_spot or spot in self._inits.by_spot

    def _explain(self, unknown: dict[str, _Unknown], applies: bool) -> list[str]:
        """Find what the constructor has run by how often it has written each tensor.

        Counts of copied modules start at 0, so what came before the copy may be missing. So does
        that of a parameter that was replaced: one alone is not taken for a copy.
        """
        ways = [(True, False), (False, False), (True, True)] if applies else [(False, True)]
        best: dict[str, Origin | None] = {}
        for init, copied in ways:
            copies = _copies(unknown) if copied else frozenset()
            found = {n: self._match(x, init, n in copies) for n, x in unknown.items()}
            if None not in found.values():
                self._origins.update({n: o for n, o in found.items() if o is not None})
                return []
            odd = [o for o in found.values() if o is None]
            if not best or len(odd) < sum(o is None for o in best.values()):
                best = found
        known = "reset_parameters and _init_weights" if applies else "reset_parameters"
        return [
            f"'{n}' has been written {unknown[n].version} times since it was made,"
            f" which {known} of its modules alone do not explain"
            for n, origin in best.items()
            if origin is None
        ]

    def _match(self, x: _Unknown, init: bool, copied: bool) -> Origin | None:
        """Return the origin that explains how often a tensor was written, if there is one."""
        for spot in x.first:
            resets, alone = self._resets.seen(spot), self._inits.seen(spot) if init else 0
            others = [s for s in x.spots if s != spot and init and s in self._inits.by_spot]
            together = alone + sum(map(self._inits.seen, others))
            ways = {alone: (spot,)} | ({together: (spot, *others)} if others else {})
            if others and together == alone:
                continue  # tied before it was filled, or after
            for count, tied in ways.items():
                known = x.version == resets + count or (copied and x.version == count)
                if known and (self._fills(spot) if init else spot in self._resets.by_spot):
                    return Origin(tied, init)
        return None

    def _unfilled(self, module: nn.Module, name: str, leaves: Sequence[str]) -> str:
        kinds = [f"{'parameter' if n in module._parameters else 'buffer'} '{n}'" for n in leaves]
        what = ", ".join(kinds[:4])
        if name in self._pretrained:
            return f"_init_weights of its model does not fill {what} of {_named(name, module)}"
        if callable(getattr(module, "reset_parameters", None)):
            return f"reset_parameters of {_named(name, module)} does not fill {what}"
        return f"{_named(name, module)} has no reset_parameters for {what}"

    # --- drawing

    def _group(self) -> dict[Origin, tuple[Origin, ...]]:
        """Return for each tensor those that are drawn with it: parameters or buffers of a module.

        Buffers are wanted on all ranks, and parameters on few.
        """
        groups: dict[tuple[str, bool], list[Origin]] = {}
        for origin in self._origins.values():
            name, leaf = origin.spots[0]
            kind = leaf in self._blueprint.modules[name]._parameters
            groups.setdefault((name, kind), []).append(origin)
        return {o: tuple(group) for group in groups.values() for o in group}

    def _draw(self, unit: tuple[Origin, ...]) -> dict[Origin, Tensor]:
        """Return the values of the tensors of ``unit``, drawn by their initialisers.

        What ``_init_weights`` writes is not reset before, unless it turns out to need that.
        """
        resets = self._resets.of_spots([o.spots[0] for o in unit])
        inits = self._inits.of_spots([s for o in unit if o.init for s in o.spots])
        skips = bool(resets) and all(o.init and o.spots[0] in self._inits.by_spot for o in unit)
        made = self._run(inits if skips else resets + inits, unit)
        if skips and any(_is_unfilled(x) for x in made.values()):
            made = self._run(resets + inits, unit)
        left = [o.spots[0][1] for o, x in made.items() if _is_unfilled(x)]
        if left:
            name = unit[0].spots[0][0]
            raise Nemo2Error(
                f"the initialisers of {_named(name, self._blueprint.modules[name])} do not fill"
                f" {', '.join(map(repr, left))}, which has no value on meta\n"
                "  options: fill it there | build the model on cpu"
            )
        return made

    def _run(self, calls: Sequence[Call], unit: tuple[Origin, ...]) -> dict[Origin, Tensor]:
        """Run initialisers with the tensors of ``unit`` on cpu, and all others on meta."""
        made = {o: _sentinel(like(self._blueprint.tensor(o.spots[0]), "cpu")) for o in unit}
        places = {spot: x for o, x in made.items() for spot in o.spots}
        name = unit[0].spots[0][0]
        with initialising(), self._blueprint.holding(places):
            for call in calls:
                part = () if call.owner is None else (call.module,)
                torch.manual_seed(key_of(self.seed, "weights", name, *part) & (2**63 - 1))
                try:
                    self._blueprint.run(call)
                except Exception as error:  # it is the user's code
                    raise Nemo2Error(_failure(self._blueprint, call, error)) from error
        return {o: x.detach() for o, x in made.items()}


def _tensors_on_meta(model: nn.Module) -> dict[str, tuple[Spot, ...]]:
    """Return for each parameter and buffer on meta, by its first name, all places that hold it."""
    found: dict[int, list[Spot]] = {}
    for name, module in model.named_modules():
        for leaf, x in (*module._parameters.items(), *module._buffers.items()):
            if x is not None and x.is_meta:
                found.setdefault(id(x), []).append((name, leaf))
    return {_dotted(spots[0]): tuple(spots) for spots in found.values()}


def _inside_pretrained(model: nn.Module) -> set[str]:
    """Return the first names of the modules in models of transformers."""
    names: dict[int, str] = {id(m): n for n, m in model.named_modules()}
    tops = [m for m in model.modules() if is_pretrained(m)]
    return {names[id(m)] for top in tops for m in top.modules()}


def _tied_targets(model: nn.Module) -> set[str]:
    """Return the names that models of transformers tie to others, which are drawn."""
    return {
        f"{name}.{target}" if name else target
        for name, module in model.named_modules()
        if is_pretrained(module)
        for target in getattr(module, "all_tied_weights_keys", None) or ()
    }


def _custom(model: nn.Module, pretrained: set[str]) -> list[str]:
    """Return which modules set their parts in a way that cannot be known."""
    problems = []
    for name, module in model.named_modules():
        if name in pretrained or not _deep(module):
            continue
        lost = untraced(module)
        if lost:
            problems.append(f"{_named(name, module)} calls {lost}, which leaves no trace on meta")
        custom = next((f for f in _CUSTOM if callable(getattr(module, f, None))), None)
        above = any(is_pretrained(m) for m in module.modules())
        if callable(getattr(module, "_init_weights", None)) and (
            above or not takes_a_module(module)
        ):
            custom = "_init_weights"
        whole = hasattr(module, "reset_parameters") and any(module.children())
        if custom or whole:
            found = custom or "reset_parameters"
            problems.append(f"{_named(name, module)} has {found}, which may set its submodules")
    return problems


def _attributes(model: nn.Module) -> list[str]:
    """Return which plain attributes are tensors whose values the constructor lost on meta."""
    return [
        f"attribute '{leaf}' of {_named(name, module)} is a tensor on meta, and no buffer"
        for name, module in model.named_modules()
        for leaf, x in module.__dict__.items()
        if type(x) is Tensor and x.is_meta
    ]


def _deep(module: nn.Module) -> bool:
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def _first_holder(x: Tensor, modules: Mapping[str, nn.Module]) -> Spot | None:
    """Return the place for which a parameter was made, unless it has been copied since."""
    for ref, leaf in _owners.get(x, ()):
        return next(((n, leaf) for n, m in modules.items() if m is ref()), None)
    return None


def _copies(unknown: Mapping[str, _Unknown]) -> frozenset[str]:
    """Return the tensors of modules of several parts that were copied: no tensor was written."""
    found: set[str] = set()
    prefixes = {name[:i] for name in unknown for i, letter in enumerate(name) if letter == "."}
    for prefix in {"", *(f"{p}." for p in prefixes)}:
        under = [n for n in unknown if n.startswith(prefix)]
        composed = any("." in n.removeprefix(prefix) for n in under)
        if composed and len(under) > 1 and all(unknown[n].version == 0 for n in under):
            found.update(under)
    return frozenset(found)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _sentinel(x: Tensor) -> Tensor:
    """Fill a tensor with what shows that nothing was written."""
    if x.is_floating_point() or x.is_complex():
        x.detach().fill_(float("nan"))
    elif x.dtype != torch.bool:
        x.detach().fill_(torch.iinfo(x.dtype).max)
    return x


def _is_unfilled(x: Tensor) -> bool:
    """Say whether elements were not written; of booleans only the plan of writes is known."""
    if x.dtype == torch.bool or not x.numel():
        return False
    if x.is_complex():
        x = torch.view_as_real(x)
    if x.is_floating_point():
        return bool(x.amax().isnan())  # no second tensor of its size
    return bool(x.amax() == torch.iinfo(x.dtype).max)


def _failure(blueprint: Blueprint, call: Call, error: Exception) -> str:
    name = call.module if call.owner is None else call.owner
    how = "reset_parameters" if call.owner is None else f"_init_weights on '{call.module}'"
    shown = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{how} of {_named(name, blueprint.modules[name])} cannot be run on meta: {shown}"


def _refusal(problems: Sequence[str]) -> Nemo2Error:
    return Nemo2Error(
        "cannot parallelize this model on meta: not all of its values can be drawn again\n"
        + "\n".join(f"  {p}" for p in problems[:8])
        + (f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else "")
        + "\n  options: build the model on cpu | give the module a reset_parameters that fills"
        " its own parameters and buffers, and let its constructor do no more than call it"
    )


def _dotted(spot: Spot) -> str:
    return ".".join(filter(None, spot))


def _named(name: str, module: nn.Module) -> str:
    return f"'{name}' ({type(module).__name__})" if name else type(module).__name__

"""``shard`` and ``annotate``: the only things a user writes to say what is sharded.

A mark lives in the ``__dict__`` of the module that owns the parameter, because an
attribute of a ``Parameter`` is lost by ``deepcopy``, ``to_empty`` and
``load_state_dict(assign=True)``, which make new Parameters. The module is found from the
parameter by one registration hook; modules built before nemo2 was imported are found
when the marks are collected.
"""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ShardingError
from ..mesh.sizes import AXES

T = TypeVar("T", Tensor, nn.Module)
_MARKS = "_nemo2_marks"  # module.__dict__: parameter name -> tuple[Mark, ...]
_BLOCKS = "_nemo2_blocks"  # module.__dict__: of a list of blocks: True, or why it was derived
_LEFT = "_nemo2_left"  # model.__dict__: module name -> why no annotation was derived for it
OWN_ATTRIBUTES = (_MARKS, _BLOCKS, _LEFT)


@dataclass(frozen=True)
class Mark:
    """One annotation of a parameter: mesh axis, tensor dim, and the parts of a fused dim.

    Attributes:
        why: where it comes from, when it was derived; empty when the user gave it.
        units: into how many pieces (heads) a derived mark may cut the dim.
    """

    axis: str | None
    dim: int | None = None
    parts: tuple[int, ...] | None = None
    why: str = field(default="", compare=False)
    units: int | None = field(default=None, compare=False)

    def misfit(self, shape: tuple[int, ...], tp: int) -> str:
        """Return why a derived mark cannot be used on a degree of ``tp``; empty when it can."""
        if not self.why or self.axis != "tp" or self.dim is None or tp == 1:
            return ""
        if self.units is not None and self.units % tp:
            return f"{self.why}: {self.units} % {tp} = {self.units % tp}"
        odd = next((n for n in self.parts or (shape[self.dim],) if n % tp), None)
        return "" if odd is None else f"{self.why}: {odd} % {tp} = {odd % tp}"

    def __str__(self) -> str:
        if self.axis is None:
            return "None"
        return f'"{self.axis}", dim={self.dim}' + (f", parts={self.parts}" if self.parts else "")


# Parameter -> its marks and the modules that registered it; entries die with the Parameter.
_marks: MutableMapping[Tensor, tuple[Mark, ...]] = WeakIdKeyDictionary()
_Owner = tuple[weakref.ref[nn.Module], str]
_owners: MutableMapping[Tensor, list[_Owner]] = WeakIdKeyDictionary()


def _write(module: nn.Module, name: str, marks: tuple[Mark, ...]) -> None:
    module.__dict__.setdefault(_MARKS, {})[name] = marks


def _on_registration(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    if param is None or not isinstance(param, nn.Parameter):
        return
    _owners.setdefault(param, []).append((weakref.ref(module), name))
    if param in _marks:
        _write(module, name, _marks[param])


register_module_parameter_registration_hook(_on_registration)


def shard(
    target: T, axis: str | None, dim: int | None = None, *, parts: tuple[int, ...] | None = None
) -> T:
    """Annotate ``target`` and return it.

    Outside a parallel run this changes nothing but the annotation: values, shapes and
    names stay as they are.

    Args:
        target: a parameter (any shape, may be on meta), a ``ModuleList`` or ``Sequential``
            of blocks, or, inside a forward, an activation.
        axis: ``"tp"`` splits dim ``dim`` into equal parts over the tensor-parallel axis;
            ``"dp"`` picks the dim that FSDP splits; ``"pp"`` (lists of blocks only) splits
            the blocks over pipeline stages; ``None`` says replicated, and takes ``"pp"`` back
            from a list of blocks.
        dim: tensor dim, negative counts from the end.
        parts: sizes of the parts of a fused projection along ``dim``, each split alone.

    Communication: none for parameters and lists; for an activation what its change of
        layout needs, shown in the plan.
    Raises: ShardingError for an unknown axis, a dim out of range, or a target that cannot
        be annotated so.

    >>> import torch, nemo2
    >>> up = torch.nn.Linear(4, 8)
    >>> nemo2.shard(up.weight, "tp", dim=0) is up.weight
    True
    """
    if isinstance(target, nn.Module):
        return _shard_blocks(target, axis)
    if not isinstance(target, Tensor):
        raise ShardingError(
            f"cannot shard a {type(target).__name__}:"
            " pass a parameter, a tensor or a list of blocks"
        )
    mark = _checked(_describe(target), tuple(target.shape), axis, dim, parts)
    if isinstance(target, nn.Parameter):
        add_mark(target, mark)
        return target
    if axis not in ("tp", None):
        raise ShardingError(
            f'shard(activation, "{axis}"):'
            ' activations can be laid out over "tp" or None (replicated)'
        )
    return constrain(target, mark.dim)


def constrain(x: Tensor, dim: int | None) -> Tensor:
    """Mark the point where an activation takes a layout; the identity outside a run."""
    if has_torch_function_unary(x):
        out: Tensor = handle_torch_function(constrain, (x,), x, dim)
        return out
    return x


def add_mark(param: nn.Parameter, mark: Mark) -> None:
    marks = (*_marks.get(param, ()), mark)
    marks = _distinct(marks)
    _marks[param] = marks
    for ref, name in _owners.get(param, ()):
        module = ref()
        if module is not None and module._parameters.get(name) is param:
            _write(module, name, marks)


def _distinct(marks: tuple[Mark, ...]) -> tuple[Mark, ...]:
    """Leave out marks that say the same; one that the user gave stands before a derived one."""
    found: dict[Mark, Mark] = {}
    for mark in marks:
        if mark not in found or not mark.why:
            found[mark] = mark
    return tuple(found.values())


def _shard_blocks(module: nn.Module, axis: str | None) -> nn.Module:
    if axis is None:
        module.__dict__.pop(_BLOCKS, None)
        return module
    if axis != "pp":
        raise ShardingError(
            f'shard(module, {axis!r}): a module can only be split over "pp";'
            " shard its parameters instead"
        )
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        raise ShardingError(
            'shard(module, "pp") takes a ModuleList or Sequential of blocks,'
            f" got {type(module).__name__}\n"
            "  options: put the blocks into an nn.ModuleList and shard that"
        )
    module.__dict__[_BLOCKS] = True
    return module


def _describe(target: Tensor) -> str:
    for ref, name in _owners.get(target, ()) if isinstance(target, nn.Parameter) else ():
        module = ref()
        if module is not None:
            return f"{type(module).__name__}.{name}"
    return "tensor"


def _checked(
    where: str,
    shape: tuple[int, ...],
    axis: str | None,
    dim: int | None,
    parts: tuple[int, ...] | None,
) -> Mark:
    problems = check(where, shape, axis, dim, parts)
    if problems:
        raise ShardingError("\n".join(problems))
    if dim is not None and dim < 0:
        dim += len(shape)
    return Mark(axis, dim, tuple(parts) if parts else None)


def check(
    where: str,
    shape: tuple[int, ...],
    axis: str | None,
    dim: int | None,
    parts: tuple[int, ...] | None,
) -> list[str]:
    """Return what is wrong with one annotation of a tensor of ``shape``, in words."""
    what = f"cannot shard '{where}' of shape {tuple(shape)}"
    if axis is None:
        return [] if dim is None else [f"{what}: axis None means replicated and takes no dim"]
    if axis not in AXES:
        return [f"{what} on unknown mesh axis {axis!r}; axes: {', '.join(AXES)}"]
    if axis == "pp":
        return [f'{what} on "pp": only lists of blocks are split over stages; shard the ModuleList']
    if axis == "cp":
        return [f'{what} on "cp": parameters are never split over the context axis']
    if dim is None or not isinstance(dim, int):
        return [f'{what} on "{axis}": give the tensor dim, for example dim=0']
    if not -len(shape) <= dim < len(shape):
        return [f'{what} on "{axis}" along dim {dim}: it has {len(shape)} dims']
    if parts is not None and sum(parts) != shape[dim]:
        return [f"{what}: parts {tuple(parts)} sum to {sum(parts)}, dim {dim} has {shape[dim]}"]
    return []


Rule = Any  # "pp" | None | (axis, dim) | (axis, dim, parts) | list of these


def annotate(model: nn.Module, rules: Mapping[str, Rule] | None = None) -> nn.Module:
    """Annotate ``model`` from outside, by parameter names, and return it.

    Args:
        model: any module; only annotations are added.
        rules: glob of dotted names -> ``("tp", dim)``, ``("tp", dim, parts)``, ``None``
            (replicated), ``"pp"`` for a list of blocks, or a list of these for several
            axes. ``*`` stands for one name between dots, ``**`` for any number. Without rules
            they are derived: from the plans that transformers' models ship, and from structure
            (see ``derive``). Annotations that the user gives, before or after, win; on a mesh
            that a derived one does not fit its parameter stays whole. The plan says all of it.

    Raises: ShardingError listing all problems: a glob that matches nothing, rules that
        disagree, a dim out of range, an unknown axis. Nothing is annotated then.

    >>> import torch, nemo2
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    >>> _ = nemo2.annotate(net, {"0.weight": ("tp", 0), "0.bias": ("tp", 0), "1.weight": ("tp", 1)})
    """
    if rules is None:
        return _annotate_derived(model)
    params = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    problems: list[str] = []
    found: dict[tuple[int, str], tuple[str, str, Mark]] = {}
    blocks: list[nn.Module] = []
    for pattern, rule in rules.items():
        for one in rule if isinstance(rule, list) else [rule]:
            targets: Mapping[str, Any] = modules if one == "pp" else params
            names = _match(pattern, targets)
            if not names:
                kind = "module" if one == "pp" else "parameter"
                problems.append(f"rule {pattern!r} matches no {kind}{_nearest(pattern, targets)}")
            for name in names:
                if one == "pp":
                    blocks.append(modules[name])
                else:
                    problems += _one_rule(pattern, one, name, params[name], found)
    problems += [
        f'rule "pp" on a {type(m).__name__}: it takes a ModuleList or Sequential of blocks'
        for m in blocks
        if not isinstance(m, (nn.ModuleList, nn.Sequential))
    ]
    if problems:
        raise ShardingError("annotate:\n" + "\n".join(f"  {p}" for p in problems))
    for (_, _), (_, name, mark) in found.items():
        add_mark(params[name], mark)
        _write(*_owner(modules, name), _marks[params[name]])
    for module in blocks:
        _shard_blocks(module, "pp")
    return model


def _annotate_derived(model: nn.Module) -> nn.Module:
    from .derive import derive

    derived = derive(model)
    params = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, mark in derived.marks.items():
        add_mark(params[name], mark)
        _write(*_owner(modules, name), _marks[params[name]])
    if derived.blocks is not None:
        name, why = derived.blocks
        modules[name].__dict__.setdefault(_BLOCKS, why)
    model.__dict__[_LEFT] = dict(derived.left)
    return model


def _one_rule(
    pattern: str,
    rule: Rule,
    name: str,
    param: nn.Parameter,
    found: dict[tuple[int, str], tuple[str, str, Mark]],
) -> list[str]:
    rule = (rule,) if rule is None or isinstance(rule, str) else tuple(rule)
    axis, dim, parts = (*rule, None, None)[:3]
    problems = check(name, tuple(param.shape), axis, dim, parts)
    if problems:
        return problems
    dim = dim + param.ndim if dim is not None and dim < 0 else dim
    mark = Mark(axis, dim, tuple(parts) if parts else None)
    earlier = found.setdefault((id(param), str(axis)), (pattern, name, mark))
    if earlier[2] != mark:
        return [
            f"rules {earlier[0]!r} and {pattern!r} disagree on '{name}':"
            f" ({earlier[2]}) and ({mark})"
        ]
    return []


def _owner(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = name.rpartition(".")
    return modules[prefix], leaf


def _match(pattern: str, names: Mapping[str, Any]) -> list[str]:
    return [name for name in names if name and _matches(pattern.split("."), name.split("."))]


def _matches(pattern: list[str], name: list[str]) -> bool:
    if not pattern or not name:
        return not name and all(p == "**" for p in pattern)
    if pattern[0] == "**":
        return _matches(pattern[1:], name) or _matches(pattern, name[1:])
    return fnmatch.fnmatchcase(name[0], pattern[0]) and _matches(pattern[1:], name[1:])


def _nearest(pattern: str, names: Mapping[str, Any]) -> str:
    import difflib

    near = difflib.get_close_matches(
        pattern.replace("*", "0"), [n for n in names if n], n=1, cutoff=0.5
    )
    return f"; did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class Annotations:
    """What the marks of one model say: marks by canonical parameter name, and its block lists.

    ``derived`` says of annotations that the user did not give: (name, what, why).
    """

    marks: Mapping[str, tuple[Mark, ...]]
    aliases: Mapping[str, tuple[str, ...]]
    blocks: tuple[str, ...]
    derived: tuple[tuple[str, str, str], ...] = ()

    def on(self, tp: int, shapes: Mapping[str, tuple[int, ...]]) -> Annotations:
        """Return the annotations for a degree of ``tp``, without derived ones that do not fit."""
        marks, derived = {}, list(self.derived)
        for name, own in self.marks.items():
            odd = {m: why for m in own if (why := m.misfit(shapes[name], tp))}
            marks[name] = tuple(m for m in own if m not in odd)
            derived += [
                (name, "replicated" if m in odd else f"({m})", odd.get(m, m.why))
                for m in own
                if m.why and (tp > 1 or m.axis != "tp")
            ]
        return Annotations(marks, self.aliases, self.blocks, tuple(derived))


def collect(model: nn.Module) -> Annotations:
    """Read the annotations of ``model``, under the first name of each parameter."""
    first: dict[int, str] = {}
    marks: dict[str, tuple[Mark, ...]] = {}
    aliases: dict[str, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, param in module._parameters.items():
            if param is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            canonical = first.setdefault(id(param), name)
            own = module.__dict__.get(_MARKS, {}).get(leaf) or _marks.get(param, ())
            marks[canonical] = _distinct((*marks.get(canonical, ()), *own))
            names = aliases.setdefault(canonical, [])
            if name != canonical and name not in names:
                names.append(name)
    lists = {n: m.__dict__[_BLOCKS] for n, m in model.named_modules() if m.__dict__.get(_BLOCKS)}
    given = [n for n, why in lists.items() if why is True]
    derived = [] if given else [(n, '"pp"', str(why)) for n, why in lists.items()]
    left = {
        f"{prefix}.{name}".strip("."): why
        for prefix, module in model.named_modules()
        for name, why in module.__dict__.get(_LEFT, {}).items()
    }
    order = [n for n, _ in model.named_parameters()]
    return Annotations(
        {n: _given_first(marks[n]) for n in order},
        {n: tuple(aliases[n]) for n in order},
        tuple(given or lists),
        (*derived, *((n, "replicated", why) for n, why in left.items() if _free(n, marks))),
    )


def _given_first(marks: tuple[Mark, ...]) -> tuple[Mark, ...]:
    """Drop the derived marks of a parameter for which the user gave one."""
    given = tuple(m for m in marks if not m.why)
    return given if any(m.axis in ("tp", None) for m in given) else marks


def _free(module: str, marks: Mapping[str, tuple[Mark, ...]]) -> bool:
    return not any(own for name, own in marks.items() if name.startswith(f"{module}."))

"""Annotations for a model that carries none: from the plan that it ships, else from its structure.

Whatever is marked here, the numbers stay those of one device: a mark that fits the code badly
costs a gather, which the plan shows. So the structure may be judged by sizes and names; what it
does not decide is left replicated, with the reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from torch import nn

from ..pipeline.stages import is_called
from .annotate import Mark

# Names of fused projections whose parts lie one after the other, by their kind.
_QKV = ("qkv", "qkv_proj", "c_attn", "wqkv", "in_proj", "to_qkv", "attn_qkv")
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_head")
_COLUMN = ("colwise", "colwise_rep", "colwise_gather_output")
_ROW = ("rowwise", "rowwise_rep")
_SHIPPED = "the model's own plan"


@dataclass(frozen=True)
class Linear:
    """A linear layer: its sizes, and along which dim of its weight the outputs lie."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int
    out_dim: int

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2].lower()

    def column(
        self, why: str, units: int | None = None, parts: tuple[int, ...] | None = None
    ) -> dict[str, Mark]:
        """Return the marks that split the outputs."""
        marks = {f"{self.name}.weight": Mark("tp", self.out_dim, parts, why, units)}
        if self.module._parameters.get("bias") is not None:
            marks[f"{self.name}.bias"] = Mark("tp", 0, parts, why, units)
        return marks

    def row(self, why: str, units: int | None = None) -> dict[str, Mark]:
        """Return the marks that split the inputs; the bias is added once, to the sum."""
        return {f"{self.name}.weight": Mark("tp", 1 - self.out_dim, None, why, units)}


@dataclass
class Derived:
    """Marks by parameter name, the list of blocks and why, and what was left alone and why."""

    marks: dict[str, Mark] = field(default_factory=dict)
    blocks: tuple[str, str] | None = None
    left: dict[str, str] = field(default_factory=dict)

    def add(self, marks: Mapping[str, Mark]) -> None:
        for name, mark in marks.items():
            self.marks.setdefault(name, mark)


def derive(model: nn.Module) -> Derived:
    """Return annotations for ``model``; nothing is changed."""
    found = Derived(blocks=_blocks(model))
    lists = _block_lists(model)
    blocks = [(f"{n}.{c}", b) for n, m in lists for c, b in m.named_children()]
    for name, block in blocks or [("", model)]:
        left: list[Linear] = _pair_up(name, block, found)
        for linear in left:
            found.left[linear.name] = "no other linear layer of its block pairs up with it"
    inside = tuple(f"{name}." for name, _ in blocks)  # empty: everything is outside
    _vocabulary(model, inside, found)
    _shipped(model, found)
    return found


# --- blocks


def _block_lists(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the lists of alike blocks that are not inside of another one."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{n}.") or n == "" for n, _ in found)
        if name and not inner and _is_block_list(module):
            found.append((name, module))
    return found


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
        return False
    first = type(module[0])
    with_parameters = next(module[0].parameters(), None) is not None
    composed = next(module[0].children(), None) is not None
    return (
        with_parameters
        and composed
        and is_called(module[0])
        and all(type(c) is first for c in module)
    )


def _blocks(model: nn.Module) -> tuple[str, str] | None:
    lists = _block_lists(model)
    if not lists:
        if isinstance(model, nn.Sequential) and len(model) > 1:
            return "", "the model is a sequence"
        return None
    shipped = getattr(model, "_pp_plan", None) or {}
    for name, _ in lists:
        if any(name == key or name.endswith(f".{key}") for key in shipped):
            return name, _SHIPPED
    sizes = [sum(p.numel() for p in m.parameters()) for _, m in lists]
    largest = max(range(len(lists)), key=lambda i: (sizes[i], i))
    why = "alike blocks in a list"
    if len(lists) > 1:
        others = ", ".join(n for i, (n, _) in enumerate(lists) if i != largest)
        why = f"the largest of the lists of alike blocks (others: {others})"
    return lists[largest][0], why


# --- linear layers


def _as_linear(name: str, module: nn.Module) -> Linear | None:
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2:
        return None
    if isinstance(module, nn.Linear):
        return Linear(name, module, weight.shape[1], weight.shape[0], 0)
    if type(module).__name__ == "Conv1D":  # transformers' linear layer with a transposed weight
        return Linear(name, module, weight.shape[0], weight.shape[1], 1)
    return None


def _pair_up(name: str, module: nn.Module, found: Derived) -> list[Linear]:
    """Mark what pairs up inside ``module``; return the linear layers that are left over."""
    if isinstance(module, nn.MultiheadAttention):
        found.left[name] = "torch's attention function takes its weights whole"
        return []
    own = _as_linear(name, module)
    if own is not None:
        return [own]
    _experts(name, module, found)
    waiting: list[Linear] = []
    for leaf, child in module.named_children():
        waiting += _pair_up(f"{name}.{leaf}" if name else leaf, child, found)
    return _parse(waiting, module, found)


def _parse(waiting: list[Linear], module: nn.Module, found: Derived) -> list[Linear]:
    """Take groups off a sequence of linear layers, in the order in which they are registered."""
    left: list[Linear] = []
    while waiting:
        for rule in (_attention, _gated, _fused_attention, _mlp):
            size = rule(waiting, module, found)
            if size:
                waiting = waiting[size:]
                break
        else:
            left.append(waiting[0])
            waiting = waiting[1:]
    return left


def _attention(linears: Sequence[Linear], module: nn.Module, found: Derived) -> int:
    """Query, key, value in any order, then the output projection."""
    if len(linears) < 4:
        return 0
    *three, out = linears[:4]
    query = next((x for x in three if "q" in x.leaf), three[0])
    first, second = (x for x in three if x is not query)
    fits = (
        query.outputs == out.inputs
        and query.inputs == out.outputs
        and first.inputs == second.inputs
        and first.outputs == second.outputs
        and query.outputs % first.outputs == 0
    )
    if not fits:
        return 0
    size = _head_size(query, module)
    heads, kv_heads = (size and x.outputs // size for x in (query, first))
    found.add(query.column("query of attention", heads))
    found.add(out.row("output of attention", heads))
    for x in (first, second):
        found.add(x.column("key and value of attention", kv_heads))
    return 4


def _fused_attention(linears: Sequence[Linear], module: nn.Module, found: Derived) -> int:
    """One projection to query, key and value, then the output projection."""
    if len(linears) < 2:
        return 0
    fused, out = sorted(linears[:2], key=lambda x: x.outputs, reverse=True)  # either comes first
    rest = fused.outputs - out.inputs
    if fused.inputs != out.outputs or rest <= 0 or rest % 2 or rest > 2 * out.inputs:
        return 0
    if out.inputs % (rest // 2) or "mlp" in fused.name.rpartition(".")[0].lower():
        return 0
    size = _head_size(fused, module, out.inputs)
    heads, kv_heads = (size and n // size for n in (out.inputs, rest // 2))
    if fused.leaf in _QKV:
        parts = (out.inputs, rest // 2, rest // 2)
        units = heads if heads is None or kv_heads is None else gcd(heads, kv_heads)
        found.add(fused.column("query, key and value in one", units, parts))
        found.add(out.row("output of attention", units))
    else:
        why = (
            "cannot tell how query, key and value lie in it:"
            " shard(weight, 'tp', dim, parts=...) says so"
        )
        found.left[fused.name] = why
        found.left[out.name] = f"its input comes from '{fused.name}', which is not split"
    return 2


def _gated(linears: Sequence[Linear], module: nn.Module, found: Derived) -> int:
    """Gate and up projections, apart or in one, then down."""
    if len(linears) >= 3:
        gate, up, down = linears[:3]
        alike = (gate.inputs, gate.outputs) == (up.inputs, up.outputs)
        if alike and gate.outputs == down.inputs != gate.inputs == down.outputs:
            for x in (gate, up):
                found.add(x.column("gate and up of a gated MLP"))
            found.add(down.row("down of a gated MLP"))
            return 3
    if len(linears) >= 2:
        both, down = linears[:2]
        named = "gate" in both.leaf or "mlp" in both.name.rpartition(".")[0].lower()
        if named and both.outputs == 2 * down.inputs and both.inputs == down.outputs:
            half = down.inputs
            found.add(both.column("gate and up in one", None, (half, half)))
            found.add(down.row("down of a gated MLP"))
            return 2
    return 0


def _mlp(linears: Sequence[Linear], module: nn.Module, found: Derived) -> int:
    if len(linears) < 2:
        return 0
    up, down = linears[:2]
    if up.outputs != down.inputs or up.inputs != down.outputs:
        return 0
    if up.outputs == up.inputs and len(list(module.children())) > 3:
        return 0  # square ones may be parts of an attention
    found.add(up.column("up of an MLP"))
    found.add(down.row("down of an MLP"))
    return 2


def _experts(name: str, module: nn.Module, found: Derived) -> None:
    """Gated experts whose weights are stacked: (experts, 2 f, d) and (experts, d, f)."""
    both, down = (module._parameters.get(leaf) for leaf in ("gate_up_proj", "down_proj"))
    if both is None or down is None or both.ndim != 3 or down.ndim != 3:
        return
    if "grouped_mm" not in _experts_run_as(module):
        found.left[name] = "its code reads which expert each token takes: whole on every rank"
    elif both.shape[1] == 2 * down.shape[2] and both.shape[2] == down.shape[1] != down.shape[2]:
        f = down.shape[2]
        why = "gate and up of experts, each expert split inside"
        found.add({f"{name}.gate_up_proj": Mark("tp", 1, (f, f), why)})
        found.add({f"{name}.down_proj": Mark("tp", 2, None, "down of experts")})
    else:
        found.left[name] = "cannot tell how gate and up lie in its weights"


def _experts_run_as(module: nn.Module) -> str:
    """Return how transformers runs the experts of ``module``; "eager" loops over them."""
    config = getattr(module, "config", None)
    return str(getattr(config, "_experts_implementation", None) or "eager")


def _head_size(linear: Linear, module: nn.Module, width: int | None = None) -> int | None:
    """Return the size of a head, where a module near ``linear`` says so."""
    for owner in module.modules():
        for name in _HEAD_SIZES:
            size = getattr(owner, name, None)
            if isinstance(size, int) and size > 0:
                return size
        for name in _HEADS:
            heads = getattr(owner, name, None)
            total = width or linear.outputs
            if isinstance(heads, int) and heads > 0 and total % heads == 0:
                return total // heads
    return None


# --- embeddings and heads


def _vocabulary(model: nn.Module, inside: tuple[str, ...], found: Derived) -> None:
    """Split the token embedding and the head over the vocabulary."""
    outside = [
        (n, m) for n, m in model.named_modules() if not f"{n}.".startswith(inside or ("\0",))
    ]
    tables = [(n, m) for n, m in outside if isinstance(m, nn.Embedding)]
    heads = [x for n, m in outside if (x := _as_linear(n, m)) is not None]
    tokens = _token_table(model)
    for name, table in tables:
        weight = f"{name}.weight"
        matching = [h for h in heads if h.module.weight is table.weight]
        if tokens in (None, table):
            matching += [h for h in heads if h.outputs == table.num_embeddings]
        if not matching and table is not tokens:
            found.left[name] = "no head has as many outputs: not taken for a vocabulary"
            continue
        found.add({weight: Mark("tp", 0, None, "token embedding")})
        for head in matching:
            found.add(head.column("head over the vocabulary"))
    for head in heads:
        if f"{head.name}.weight" not in found.marks:
            found.left.setdefault(head.name, "outside of the blocks, and no head over a vocabulary")


def _token_table(model: nn.Module) -> nn.Module | None:
    """Return the token embedding of a model that says which it is, as transformers' do."""
    given: Any = getattr(model, "get_input_embeddings", None)
    try:
        table = given() if callable(given) else None
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Embedding) else None


# --- the plan that transformers' models ship


def _shipped(model: nn.Module, found: Derived) -> None:
    """Add what the model's own plan splits and the structure did not find."""
    shipped = getattr(model, "_tp_plan", None)
    if not isinstance(shipped, Mapping):
        return
    modules = dict(model.named_modules())
    for pattern, style in shipped.items():
        for name in (n for n in modules if fnmatch.fnmatchcase(n, pattern)):
            linear = _as_linear(name, modules[name])
            if linear is None or style not in (*_COLUMN, *_ROW):
                continue
            why = f"{_SHIPPED} ({style})"
            found.add(linear.column(why) if style in _COLUMN else linear.row(why))
            found.left.pop(name, None)

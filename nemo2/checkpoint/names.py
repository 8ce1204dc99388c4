"""Which tensors of a file fill which parameters, by the names that transformers gives them.

Files keep the names of a model's first release. What transformers renames, stacks (one tensor an
expert) and concatenates (gate and up projections) when it loads a file is asked of transformers;
its other conversions are not followed, and such tensors are reported as unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Source:
    """The keys that one parameter is made of.

    Attributes:
        keys: stacked along ``stack`` within a row, then rows concatenated along ``concat``; one
            row of one key where there is neither.
    """

    keys: list[list[str]] = field(default_factory=list)
    stack: int | None = None
    concat: int | None = None

    @classmethod
    def plain(cls, key: str) -> Source:
        return cls([[key]])


@dataclass(frozen=True)
class Match:
    """What a file has for a model.

    Attributes:
        sources: first name -> its sources, one for each of its names that the file has, the first
            name's first.
        missing: first names without any; ``unexpected``: keys that fill nothing.
    """

    sources: Mapping[str, tuple[Source, ...]]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where a key goes: the name it fills, and its row when it is stacked or concatenated."""

    name: str
    row: int = 0
    rows: int = 1
    stack: int | None = None
    concat: int | None = None

    @property
    def plain(self) -> bool:
        return self.stack is None and self.concat is None


def match(keys: Iterable[str], tensors: Sequence[tuple[str, ...]], module: nn.Module) -> Match:
    """Return what of a file fills which tensors of a model.

    Args:
        keys: of the file.
        tensors: the names of each parameter and buffer, the first one first.
    """
    names = {name for own in tensors for name in own}
    place = _placing(module, names)
    found: dict[str, Source] = {}
    unexpected = []
    for key in sorted(keys, key=_natural):
        where = place(key)
        if where is None or not _add(found, key, where):
            unexpected.append(key)
    sources = {own[0]: tuple(found[n] for n in own if n in found) for own in tensors}
    missing = [own for own in tensors if not sources[own[0]]]
    return Match(
        {name: own for name, own in sources.items() if own},
        tuple(own[0] for own in missing if not all(map(_ignored(module, "missing"), own))),
        tuple(key for key in unexpected if not _ignored(module, "unexpected")(key)),
    )


def _add(found: dict[str, Source], key: str, where: _Place) -> bool:
    """Add a key to the source of its tensor; False when another key is that already."""
    if where.plain:
        return found.setdefault(where.name, Source.plain(key)).keys == [[key]]
    made = Source([[] for _ in range(where.rows)], where.stack, where.concat)
    source = found.setdefault(where.name, made)
    if (source.stack, source.concat) != (where.stack, where.concat):
        return False
    source.keys[where.row].append(key)
    return True


def _placing(module: nn.Module, names: set[str]) -> Callable[[str], _Place | None]:
    """Return a function of a key: where it goes, or None."""

    def as_is(key: str) -> _Place | None:
        return _Place(key) if key in names else None

    if not hasattr(module, "base_model_prefix"):
        return as_is
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:
        return as_is
    if not isinstance(module, PreTrainedModel):
        return as_is
    mapping = get_model_conversion_mapping(module)
    renamings: list[Any] = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters: list[Any] = [m for m in mapping if isinstance(m, WeightConverter)]
    prefix, known = module.base_model_prefix, dict.fromkeys(names, True)

    def place(key: str) -> _Place | None:
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in names and key in names:
            return _Place(key)  # saved under the names of today
        if name not in names or pattern is None:
            return _Place(name) if name in names else None
        return _converted(
            name, pattern, next(c for c in converters if pattern in c.source_patterns)
        )

    return place


def _converted(name: str, pattern: str, converter: Any) -> _Place | None:
    """Return where a key goes that transformers stacks and concatenates; None for what else."""
    dims: dict[str, int | None] = {"MergeModulelist": None, "Concatenate": None}
    for operation in converter.operations:
        kind = type(operation).__name__
        late = kind == "MergeModulelist" and dims["Concatenate"] is not None
        if dims.get(kind, 0) is not None or late:
            return None
        dims[kind] = operation.dim
    stack, concat = dims["MergeModulelist"], dims["Concatenate"]
    rows = converter.source_patterns
    if len(converter.target_patterns) > 1 or (concat is None and len(rows) > 1):
        return None
    return _Place(name, rows.index(pattern), len(rows), stack, concat)


def _ignored(module: nn.Module, kind: str) -> Callable[[str], bool]:
    """Say which keys transformers leaves out of its report: buffers of earlier versions."""
    patterns = set(getattr(module, f"_keys_to_ignore_on_load_{kind}", None) or ())
    if kind == "unexpected" and any(
        name.endswith("rotary_emb.inv_freq") for name, _ in module.named_buffers()
    ):
        patterns.add(r"rotary_emb\.inv_freq")
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Sort layers and experts by number."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in key.split(".")]

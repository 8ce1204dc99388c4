"""Reading a safetensors folder: each rank the bytes of its own parts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sharding.slices import Box, Part, common
from .agree import Problems
from .folder import Folder
from .names import Match, Source, match
from .target import Item, Target

_SHOWN = 8
LENIENT = (
    "options: strict=False keeps what is missing and drops what is unexpected"
    " (other shapes are refused all the same)"
)
_NAMES = " | the names of today: hf_model.save_pretrained(path, save_original_format=False)"


@dataclass(frozen=True)
class Piece:
    """One tensor of a file as a box of a parameter.

    Attributes:
        stacked: the dim of the parameter that the tensor lacks, of which it is one index.
    """

    key: str
    box: Box
    stacked: int | None


@dataclass(frozen=True)
class Loaded:
    """What ``load`` has left out, and what was saved beside the tensors.

    Attributes:
        missing: parameters and buffers that the file does not have; they are as they were.
        unexpected: tensors of the file that the model does not have.
        extra: what ``save`` was given.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    extra: Any = None


def load_folder(path: str | Path, target: Target, *, strict: bool) -> Loaded:
    """Fill ``target`` from the files at ``path``.

    Communication: two all-gathers of objects over the world.
    Raises: CheckpointError on all ranks alike; before anything is changed, unless the disk fails.
    """
    asked = f"cannot load '{path}' into {type(target.module).__name__}"
    problems = Problems(asked, target.groups)
    with ExitStack() as stack:
        folder, plans = None, []
        found = Match({}, (), ())
        with problems.caught():
            folder = stack.enter_context(Folder(path))
            found = match(folder.files, [item.names for item in target.items], target.module)
            if strict and (found.missing or found.unexpected):
                count = len(target.items)
                problems.facts += left_out(found.missing, found.unexpected, count, "file")
                problems.options = LENIENT + _NAMES + _part_option(found)
            for item in target.items:
                if item.local is not None and item.name in found.sources:
                    plans.append((item, _checked(item, found.sources[item.name], folder, problems)))
        problems.raise_together((found.missing, found.unexpected))
        assert folder is not None
        with problems.caught():
            for item, pieces in plans:
                assert item.local is not None
                read_into(item.local, item.parts, pieces, folder)
        problems.raise_together(note="some parameters hold the file's values already")
    return Loaded(found.missing, found.unexpected)


def read_into(
    local: Tensor, parts: Sequence[Part], pieces: Sequence[Piece], folder: Folder
) -> None:
    """Fill a rank's memory of a parameter, and read nothing else; converts to its dtype.

    Args:
        local: this rank's memory; ``parts``: which boxes of the parameter that is.
        pieces: the tensors of the file that the parameter is made of.
    """
    for part in parts:
        for piece in pieces:
            both = common(part.box, piece.box)
            if both.numel:
                box = both.seen_from(piece.box.start).without(piece.stacked)
                start = both.seen_from(part.box.start).start
                at = tuple(a + b for a, b in zip(part.at, start, strict=True))
                with torch.no_grad():
                    mine = local[Box(at, both.shape).slices]
                    mine.copy_(folder.read(piece.key, box).reshape(both.shape))


def _checked(
    item: Item, sources: Sequence[Source], folder: Folder, problems: Problems
) -> list[Piece]:
    """Return the pieces of a parameter; what does not fit is noted."""
    pieces, shape = _pieces(sources[0], folder)
    keys = [piece.key for piece in pieces]
    made = f"'{keys[0]}'" if len(keys) == 1 else f"{len(keys)} tensors from '{keys[0]}' on"
    if shape != item.shape:
        held = "shapes that do not fit together" if shape is None else f"shape {shape}"
        problems.facts.append(f"'{item.name}' has shape {item.shape}; {made} in the file: {held}")
        return pieces
    for key in keys:
        dtype = folder.dtype(key)
        if dtype != item.dtype and dtype.is_floating_point != item.dtype.is_floating_point:
            problems.facts.append(f"'{item.name}' is {item.dtype}; '{key}' in the file {dtype}")
    for other in sources[1:]:
        again, twin = _pieces(other, folder)
        if twin != shape or not _equal(item, pieces, again, folder):
            problems.facts.append(
                f"'{item.name}' is tied to '{again[0].key}', and the file has other values for it"
            )
    return pieces


def _pieces(source: Source, folder: Folder) -> tuple[list[Piece], tuple[int, ...] | None]:
    """Return the tensors that a parameter is made of and the shape that they make, if they do."""
    stack, concat = source.stack, source.concat
    pieces: list[Piece] = []
    offset = 0
    for row in source.keys:
        for index, key in enumerate(row):
            shape = list(folder.shape(key))
            if stack is not None:
                shape.insert(stack, 1)
            start = [0] * len(shape)
            if stack is not None:
                start[stack] = index
            if concat is not None:
                start[concat] = offset
            pieces.append(Piece(key, Box(tuple(start), tuple(shape)), stack))
        if concat is not None and row:
            offset += pieces[-1].box.shape[concat]
    whole = list(pieces[0].box.shape)
    if stack is not None:
        whole[stack] = len(source.keys[0])
    if concat is not None:
        whole[concat] = offset
    fit = _tile([piece.box for piece in pieces], Box.whole(whole))
    return pieces, tuple(whole) if fit else None


def _tile(boxes: Sequence[Box], whole: Box) -> bool:
    """Say whether boxes that do not overlap fill ``whole``."""
    inside = all(len(b.shape) == len(whole.shape) and common(b, whole) == b for b in boxes)
    return inside and sum(b.numel for b in boxes) == whole.numel


def _equal(item: Item, a: Sequence[Piece], b: Sequence[Piece], folder: Folder) -> bool:
    """Say whether two sources have the same values for this rank's parts."""
    assert item.local is not None
    one, other = (torch.empty_like(item.local, device="cpu") for _ in range(2))
    read_into(one, item.parts, a, folder)
    read_into(other, item.parts, b, folder)
    return torch.equal(one, other)


def left_out(
    missing: Sequence[str], unexpected: Sequence[str], count: int, where: str
) -> list[str]:
    """Return what to say of names that only the model, of ``count`` tensors, or the file has."""
    facts = []
    if missing:
        facts.append(f"missing in the {where}, {len(missing)} of {count}: {_some(missing)}")
    if unexpected:
        facts.append(f"unexpected in the {where}, {len(unexpected)}: {_some(unexpected)}")
    return facts


def _part_option(found: Match) -> str:
    """Return the option to load a part, when the file has the names of one child of the model."""
    missing = set(found.missing)
    for child in dict.fromkeys(name.partition(".")[0] for name in found.missing):
        if any(f"{child}.{name}" in missing for name in found.unexpected):
            return f" | the part that the file is of: nemo2.load(path, model.{child})"
    return ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more

"""Writing a safetensors folder: each stage its own files, one tensor gathered at a time."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .agree import Problems
from .folder import INDEX, SINGLE, check_safetensors
from .target import Item, Target

FILE_BYTES = 5 * 10**9
_NUMBERED = "model-{:05d}-of-{:05d}.safetensors"


@dataclass(frozen=True)
class File:
    """One file, that the first rank of stage ``owner`` writes."""

    name: str
    owner: int
    items: tuple[Item, ...]


def plan_files(items: Iterable[Item], file_bytes: int) -> tuple[File, ...]:
    """Spread tensors over files: each stage's in order, a new file when one is full."""
    filled: list[list[Item]] = []
    for own in _by_owner(items):
        size = 0
        for i, item in enumerate(own):
            if i == 0 or size + item.nbytes > file_bytes:
                filled.append([])
                size = 0
            filled[-1].append(item)
            size += item.nbytes
    if len(filled) == 1:
        return (File(SINGLE, filled[0][0].owner, tuple(filled[0])),)
    return tuple(
        File(_NUMBERED.format(i + 1, len(filled)), own[0].owner, tuple(own))
        for i, own in enumerate(filled)
    )


def save_folder(path: str | Path, target: Target, *, file_bytes: int = FILE_BYTES) -> None:
    """Write ``target`` to the folder ``path``; a file has its name only when it is complete.

    Communication: gathers each tensor over tp and dp of the stage that writes it; all-gathers of
        objects over the world between the steps.
    Raises: CheckpointError on all ranks alike.
    """
    folder = Path(path)
    files = plan_files(target.items, file_bytes)
    kept = _kept_names(target)
    problems = Problems(f"cannot save {type(target.module).__name__} to '{path}'", target.groups)
    with problems.caught():
        check_safetensors()
        if target.writes:
            folder.mkdir(parents=True, exist_ok=True)
    problems.raise_together()
    for file in files:
        if file.owner == target.stage:
            _write(folder, file, kept, target, problems)
    try:
        problems.raise_together()
        # Until the new files are complete the folder has no index: nobody reads half of two saves.
        with problems.caught():
            if target.first:
                _remove_old(folder, files)
        problems.raise_together()
        with problems.caught():
            for file in _own(files, target):
                os.replace(_unfinished(folder, file), folder / file.name)
        problems.raise_together()
    finally:
        with suppress(OSError):
            for file in _own(files, target):
                _unfinished(folder, file).unlink(missing_ok=True)
    with problems.caught():
        if target.first:
            _write_config(folder, target)
            if len(files) > 1:
                _write_index(folder, files, kept)
    problems.raise_together()


def _write(
    folder: Path, file: File, kept: dict[str, str], target: Target, problems: Problems
) -> None:
    """Gather the tensors of a file on all ranks of its stage, and write it on the first."""
    tensors: dict[str, Tensor] = {}
    for item in file.items:
        whole = item.whole()
        # A writer that has failed still takes part: the other ranks are in the same gathers.
        with problems.caught():
            if target.writes and not problems.failures:
                tensors[kept[item.name]] = _alone(whole)
    with problems.caught():
        if target.writes and not problems.failures:
            from safetensors.torch import save_file

            save_file(tensors, _unfinished(folder, file), metadata={"format": "pt"})


def _alone(whole: Tensor) -> Tensor:
    """Return the tensor on cpu, contiguous, in memory that nothing else shares."""
    held = whole.detach().cpu().contiguous()
    own = held.untyped_storage().nbytes() == held.numel() * held.element_size()
    return held if own else held.clone()


def _kept_names(target: Target) -> dict[str, str]:
    """Return first name -> the name in the file: of tied ones that which transformers keeps."""
    tied = getattr(target.module, "all_tied_weights_keys", None) or {}
    return {
        item.name: next((n for n in item.names if n not in tied), item.name)
        for item in target.items
    }


def _by_owner(items: Iterable[Item]) -> list[list[Item]]:
    owned: dict[int, list[Item]] = {}
    for item in items:
        owned.setdefault(item.owner, []).append(item)
    return [owned[stage] for stage in sorted(owned)]


def _own(files: Sequence[File], target: Target) -> list[File]:
    """Return the files that this rank writes."""
    return [file for file in files if target.writes and file.owner == target.stage]


def _unfinished(folder: Path, file: File) -> Path:
    return folder / f".{file.name}.unfinished"


def _remove_old(folder: Path, files: Sequence[File]) -> None:
    """Remove what an earlier save has left: readers would find it in place of the new files."""
    new = {file.name for file in files}
    (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        numbered = re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", old.name)
        if old.name not in new and (numbered or old.name == SINGLE):
            old.unlink()


def _write_index(folder: Path, files: Sequence[File], kept: dict[str, str]) -> None:
    where = {kept[item.name]: file.name for file in files for item in file.items}
    size = sum(item.nbytes for file in files for item in file.items)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    unfinished = folder / f".{INDEX}.unfinished"
    unfinished.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / INDEX)


def _write_config(folder: Path, target: Target) -> None:
    """Write what transformers needs to open the folder, for a model that has it."""
    module = target.module
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    config = copy.deepcopy(config)
    config.architectures = [type(module).__name__.removeprefix("FSDP")]
    floats = (i.dtype for i in target.items if i.dtype.is_floating_point)
    config.dtype = str(next(floats, torch.float32)).removeprefix("torch.")
    config.save_pretrained(folder)
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)

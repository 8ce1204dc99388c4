"""``python -m nemo2 checkpoint``: what a checkpoint holds, how two differ, and other formats.

No mesh and no model are needed. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..sharding.slices import Box
from .files import Entry, write_tensors
from .folder import INDEX as WEIGHTS_INDEX
from .folder import SINGLE, Folder
from .index import BESIDE, MODEL, OPTIMIZER, Index, TensorInfo, is_checkpoint, is_unfinished
from .plain import decode
from .save import FILE_BYTES
from .storage import Reader, read_whole


class Contents:
    """The tensors of a checkpoint, or of a Hugging Face folder or file, by their names.

    Attributes:
        tensors: name -> tensor; those of the model begin with ``model.``.
        index: None for a Hugging Face folder.
    """

    tensors: Mapping[str, TensorInfo]

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        self.index: Index | None = None
        if is_checkpoint(path) or is_unfinished(path) or not path.exists():
            self.index = Index.read(path)
            self._reader = self._stack.enter_context(Reader(self.index))
            self.tensors = self.index.tensors
        else:
            self._folder = self._stack.enter_context(Folder(path))
            self.tensors = {
                MODEL + key: TensorInfo(self._folder.dtype(key), self._folder.shape(key))
                for key in self._folder.files
            }

    def __enter__(self) -> Contents:
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def check(self, names: Iterable[str]) -> None:
        """Read the files of some tensors, and compare their checksums.

        Raises: CheckpointError that names the files that are missing, truncated or altered.
        """
        if self.index is not None:
            used = {part.file for name in names for part in self.tensors[name].parts}
            if problems := self.index.check_files(sorted(used)):
                raise damaged(self.index.folder, problems)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        if self.index is not None:
            return read_whole(self._reader, name)
        key = name.removeprefix(MODEL)
        return self._folder.read(key, Box.whole(self.tensors[name].shape))


def show(path: Path, *, check: bool = False) -> str:
    """Return tables of what a checkpoint holds.

    Args:
        check: read all files, and compare their checksums; else only their sizes are.

    Raises: CheckpointError that names the files that are missing, truncated or altered.
    """
    with Contents(path) as contents:
        index, lines = contents.index, [str(path)]
        if index is not None:
            if problems := index.check_files(index.files) if check else index.check_sizes():
                raise damaged(path, problems)
            lines += _about(index, check)
        model = {n: info for n, info in contents.tensors.items() if n.startswith(MODEL)}
        lines.append(f"model: {_many(model)}")
        aliases = index.aliases if index is not None else {}
        rows: list[tuple[str, ...]] = []
        for name, info in model.items():
            bare = name.removeprefix(MODEL)
            tied = f"= {', '.join(aliases[bare])}" if bare in aliases else ""
            rows.append((bare, _dtype(info), str(info.shape), _bytes(info.nbytes), tied))
        lines += _columns(rows)
        for number, optimizer in enumerate(index.optimizers if index is not None else ()):
            lines += _about_optimizer(number, optimizer, contents.tensors)
        beside = {n: info for n, info in contents.tensors.items() if n.startswith(BESIDE)}
        if beside:
            lines.append(f"in extra, under parameters' names: {_many(beside)}")
        if index is not None and index.extra is not None:
            lines.append(f"extra: {_short(decode(index.extra))}")
    return "\n".join(lines)


def damaged(path: Path, problems: Iterable[str]) -> CheckpointError:
    return CheckpointError("\n  ".join([f"'{path}' is damaged", *problems]))


def diff(a: Path, b: Path) -> str:
    """Return how two checkpoints differ, a line for each tensor; "" when they are equal.

    Raises: CheckpointError that names the files that are missing, truncated or altered.
    """
    with Contents(a) as one, Contents(b) as other:
        for contents in (one, other):
            contents.check(contents.tensors)
        lines = [f"only in {a}: {name}" for name in one.tensors if name not in other.tensors]
        lines += [f"only in {b}: {name}" for name in other.tensors if name not in one.tensors]
        for name, info in one.tensors.items():
            there = other.tensors.get(name)
            if there is None:
                continue
            if (info.dtype, info.shape) != (there.dtype, there.shape):
                was = f"{_dtype(info)} {info.shape}, {_dtype(there)} {there.shape}"
                lines.append(f"{name}: {was}")
            elif what := _difference(one.read(name), other.read(name)):
                lines.append(f"{name}: {what}")
        if one.index is not None and other.index is not None:
            lines += _plain_differences(one.index, other.index)
    return "\n".join(lines)


def convert(path: Path, out: Path, format: str, part: str = "") -> str:
    """Write the weights of a checkpoint as safetensors; return what was written.

    Args:
        format: "safetensors", a folder of files of at most 5 GB; "file", one file; "lightning",
            one pickled ``.ckpt`` with hyperparameters, for ``load_from_checkpoint`` and for
            ``Trainer.validate``, ``test`` and ``predict`` without nemo2; all in memory at once.
        part: the module to take the weights of, under its own names; "" for the whole model.

    Raises: CheckpointError that names the files that are missing, truncated or altered; before
        anything is written.
    """
    prefix = MODEL + (f"{part}." if part else "")
    with Contents(path) as contents:
        chosen = [name for name in contents.tensors if name.startswith(prefix)]
        if not chosen:
            parts = {n.split(".")[1] for n in contents.tensors if n.startswith(MODEL)}
            raise CheckpointError(
                f"'{path}' has no weights of '{part}'\n  options: {' | '.join(sorted(parts))}"
            )
        if out.is_file() or (out.exists() and (format != "safetensors" or any(out.iterdir()))):
            raise CheckpointError(f"'{out}' exists\n  options: another place | remove it first")
        infos = contents.tensors
        contents.check(chosen)
        if format == "lightning":
            out.parent.mkdir(parents=True, exist_ok=True)
            return _write_lightning(out, contents, chosen, prefix)
        entries = [
            Entry(n.removeprefix(prefix), infos[n].dtype, infos[n].shape, partial(contents.read, n))
            for n in chosen
        ]
        if format == "file":
            out.parent.mkdir(parents=True, exist_ok=True)
            written = {out: entries}
        else:
            out.mkdir(parents=True, exist_ok=True)
            written = _files(out, entries)
        for file, own in written.items():
            write_tensors(file, own, {"format": "pt"})
        if len(written) > 1:
            _write_index(out, written)
    total = sum(e.nbytes for e in entries)
    return f"{len(entries)} tensors, {_bytes(total)}, in {len(written)} files: {out}"


def _write_lightning(out: Path, contents: Contents, chosen: list[str], prefix: str) -> str:
    """Write what Lightning reads: weights under all of their names, and what it says of them."""
    index = contents.index
    aliases = index.aliases if index is not None else {}
    weights: dict[str, Tensor] = {}
    for name in chosen:
        others = [MODEL + other for other in aliases.get(name.removeprefix(MODEL), ())]
        names = [name, *(other for other in others if other.startswith(prefix))]
        weights |= dict.fromkeys([n.removeprefix(prefix) for n in names], contents.read(name))
    extra = decode(index.extra) if index is not None else None
    trainer = extra.get("lightning", {}) if isinstance(extra, dict) else {}
    kept = ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters")
    said = {key: trainer[key] for key in kept if key in trainer}
    torch.save({"state_dict": weights, **said}, out)
    return f"{len(weights)} tensors, {_bytes(out.stat().st_size)}: {out}"


def _files(out: Path, entries: list[Entry]) -> dict[Path, list[Entry]]:
    filled: list[list[Entry]] = [[]]
    for e in entries:
        if filled[-1] and sum(x.nbytes for x in filled[-1]) + e.nbytes > FILE_BYTES:
            filled.append([])
        filled[-1].append(e)
    if len(filled) == 1:
        return {out / SINGLE: filled[0]}
    count = len(filled)
    return {out / f"model-{i + 1:05d}-of-{count:05d}.safetensors": x for i, x in enumerate(filled)}


def _write_index(out: Path, written: Mapping[Path, list[Entry]]) -> None:
    where = {e.name: file.name for file, own in written.items() for e in own}
    total = sum(e.nbytes for own in written.values() for e in own)
    made = {"metadata": {"total_size": total}, "weight_map": where}
    (out / WEIGHTS_INDEX).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _about(index: Index, checked: bool) -> list[str]:
    mesh = ", ".join(f"{axis}={size}" for axis, size in index.mesh.items()) or "one device"
    size = _bytes(sum(size for size, _ in index.files.values()))
    state = "checksums equal" if checked else "sizes right (--check reads them)"
    lines = [f"saved on {mesh}; {len(index.files)} files, {size}: {state}"]
    if index.run:
        lines.append(f"dropout: seed {index.run['seed']}, {index.run['steps']} steps")
    return lines


def _about_optimizer(
    number: int, optimizer: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    lines = [f"optimizer {number}: {optimizer['class']}, {len(optimizer['state'])} parameters"]
    for group in optimizer["groups"]:
        options = decode(group["options"])
        lines.append(f"  {len(group['params'])} parameters: {_short(options)}")
    keys: dict[str, dict[str, TensorInfo]] = {}
    for name, state in optimizer["state"].items():
        for key in state:
            full = f"{OPTIMIZER}{number}.{name}.{key}"
            if full in tensors:
                keys.setdefault(key, {})[full] = tensors[full]
    return lines + [f"  {key}: {_many(own)}" for key, own in keys.items()]


def _difference(a: Tensor, b: Tensor) -> str:
    if torch.equal(a, b):
        return ""
    if not a.is_floating_point():
        return f"{int((a != b).sum())} of {a.numel()} values differ"
    largest = (a.double() - b.double()).abs().max()
    return f"{int((a != b).sum())} of {a.numel()} values differ, by at most {float(largest):.3g}"


def _plain_differences(a: Index, b: Index) -> list[str]:
    def said(index: Index) -> dict[str, Any]:
        found = {"dropout": dict(index.run), "extra": index.extra}
        for number, optimizer in enumerate(index.optimizers):
            found[f"optimizer {number}"] = optimizer["class"]
            for g, group in enumerate(optimizer["groups"]):
                found[f"optimizer {number}, group {g}"] = group["options"]
        return found

    one, other = said(a), said(b)
    return [
        f"{key}: {_short(decode(one.get(key)))}, {_short(decode(other.get(key)))}"
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key)
    ]


def _many(tensors: Mapping[str, TensorInfo]) -> str:
    return f"{len(tensors)} tensors, {_bytes(sum(info.nbytes for info in tensors.values()))}"


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _bytes(count: int) -> str:
    """
    >>> _bytes(999), _bytes(2_500_000)
    ('999 B', '2.5 MB')
    """
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]

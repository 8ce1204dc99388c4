"""``checkpoint.json``: what a checkpoint holds, where, and how to see that it is whole.

It is written last, and a folder without it is no checkpoint. Tensors are in safetensors files,
one a rank, as *parts*: boxes of the whole tensor under its original name. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..sharding.slices import Box

INDEX = "checkpoint.json"
VERSION = 1
MODEL, OPTIMIZER, BESIDE = "model.", "optimizer.", "beside."
_BLOCK = 1 << 22  # bytes read at once


@dataclass(frozen=True)
class Stored:
    """A box of a tensor, in the file ``file`` of the folder."""

    file: str
    box: Box


@dataclass(frozen=True)
class TensorInfo:
    """One whole tensor: its dtype, shape, and the parts that it is stored as."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Stored, ...] = ()

    @property
    def nbytes(self) -> int:
        return Box.whole(self.shape).numel * self.dtype.itemsize


@dataclass(frozen=True)
class Index:
    """The content of ``checkpoint.json``.

    Attributes:
        folder: where it was read.
        token: names the save; all of its files begin with it.
        tensors: name -> tensor: ``model.<parameter>``, ``optimizer.<i>.<parameter>.<key>``,
            ``beside.<where in extra><parameter>``.
        aliases: parameter -> its other names in the unsplit model.
        files: name -> (bytes, crc32).
        mesh: axis -> size; empty for one device.
        optimizers: see ``optimizers.py``.
        run: what dropout is keyed by; empty for a module on one device.
        ranks: rank by rank, generators and what else is the rank's own, encoded.
        extra: the user's, encoded.
    """

    folder: Path
    token: str
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, list[str]] = field(default_factory=dict)
    files: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    mesh: Mapping[str, int] = field(default_factory=dict)
    optimizers: list[Any] = field(default_factory=list)
    run: Mapping[str, int] = field(default_factory=dict)
    ranks: list[Any] = field(default_factory=list)
    extra: Any = None

    @property
    def text(self) -> str:
        """The content of the file."""
        content = {
            "version": VERSION,
            "token": self.token,
            "torch": torch.__version__,
            "mesh": dict(self.mesh),
            "run": dict(self.run),
            "aliases": dict(self.aliases),
            "files": {name: list(facts) for name, facts in self.files.items()},
            "tensors": {name: tensor_facts(info) for name, info in self.tensors.items()},
            "optimizers": self.optimizers,
            "ranks": self.ranks,
            "extra": self.extra,
        }
        made = {"format": "nemo2 checkpoint", "sha256": _digest(content), "content": content}
        return json.dumps(made) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Return the index of the checkpoint ``folder``.

        Raises: CheckpointError when the folder has none, or when it was altered.
        """
        content = _read_content(folder)
        try:
            return cls(
                folder,
                content["token"],
                {name: tensor_info(facts) for name, facts in content["tensors"].items()},
                content["aliases"],
                {name: (size, crc) for name, (size, crc) in content["files"].items()},
                content["mesh"],
                content["optimizers"],
                content["run"],
                content["ranks"],
                content["extra"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{INDEX} is not as nemo2 writes it: {error!r}") from error

    def check_sizes(self, names: Iterable[str] | None = None) -> list[str]:
        """Return what is wrong with files at first sight: missing, too short, too long.

        Args:
            names: of the files; None: all.
        """
        problems = []
        for name in self.files if names is None else names:
            size = self.files[name][0]
            file = self.folder / name
            if not file.is_file():
                problems.append(f"{name} is missing")
            elif (found := file.stat().st_size) != size:
                what = "truncated" if found < size else "altered"
                problems.append(f"{name} was {what}: it has {found} bytes of {size}")
        return problems

    def check_files(self, names: Iterable[str]) -> list[str]:
        """Return what is wrong with files; they are read if nothing is at first sight."""
        names = list(names)
        problems = self.check_sizes(names)
        return problems or [p for name in names for p in self.check_bytes(name)]

    def check_bytes(self, name: str) -> list[str]:
        """Read the file ``name`` and return what is wrong with it."""
        if crc32_of(self.folder / name) != self.files[name][1]:
            return [f"{name} was altered: its checksum differs from the one in {INDEX}"]
        return []


def key_of(name: str, box: Box) -> str:
    """Return the name of a part in its file.

    >>> key_of("model.up.weight", Box((4, 0), (4, 8)))
    'model.up.weight@4,0'
    """
    return f"{name}@{','.join(map(str, box.start))}"


def tensor_facts(info: TensorInfo) -> dict[str, Any]:
    """Return what JSON holds of a tensor."""
    parts = [[part.file, list(part.box.start), list(part.box.shape)] for part in info.parts]
    dtype = str(info.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(info.shape), "parts": parts}


def tensor_info(facts: Mapping[str, Any]) -> TensorInfo:
    """Return the tensor that ``tensor_facts`` describes."""
    dtype = getattr(torch, facts["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{facts['dtype']!r} is no dtype")
    parts = []
    for file, start, shape in facts["parts"]:
        if Path(file).name != file:
            raise ValueError(f"{file!r} is outside of the folder")
        parts.append(Stored(file, Box(tuple(start), tuple(shape))))
    return TensorInfo(dtype, tuple(facts["shape"]), tuple(parts))


def crc32_of(file: Path) -> int:
    """Return the checksum of a file, read in blocks."""
    crc = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def is_checkpoint(path: Path) -> bool:
    """Say whether ``path`` is a folder with a complete checkpoint in nemo2's format."""
    return (path / INDEX).is_file()


def is_unfinished(path: Path) -> bool:
    """Say whether ``path`` is what a save has left that did not end."""
    named = ".unfinished-" in path.name or any(path.glob("*-rank*.safetensors"))
    return path.is_dir() and named and not is_checkpoint(path)


def _read_content(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    if not file.is_file():
        raise CheckpointError(_not_a_checkpoint(folder))
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        content, digest = made["content"], made["sha256"]
        version = content["version"]
        if digest != _digest(content):
            raise CheckpointError(f"{INDEX} was altered: its own checksum differs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{INDEX} was truncated or altered: {error}") from error
    if version != VERSION:
        raise CheckpointError(f"{INDEX} has version {version}; this nemo2 reads {VERSION}")
    return content  # type: ignore[no-any-return]


def _not_a_checkpoint(folder: Path) -> str:
    if not folder.exists():
        return f"there is no folder '{folder}'"
    if folder.is_file():
        return (
            f"'{folder.name}' is a file, and a checkpoint is a folder with {INDEX}\n"
            "  options: of Lightning's own .ckpt files, which are pickled, load the weights on one"
            " device: load_from_checkpoint, then nemo2.save"
        )
    if is_unfinished(folder):
        return f"'{folder}' is a save that did not finish: it has no {INDEX}"
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    return f"'{folder}' is not a checkpoint: expected {INDEX}, found {there}"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

"""Hugging Face folders: safetensors files, with an index when there are several."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..sharding.slices import Box

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_safetensors() -> None:
    """Raise CheckpointError when the package is not installed."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise CheckpointError(
            'safetensors files need the package safetensors: pip install "nemo2[hf]"'
        ) from None


class Folder:
    """The tensors of a folder, or of one of its files; opened when they are needed.

    Files are mapped into memory: what is asked for is read from the disk, in whole pages.

    Attributes:
        files: key -> the file that holds its tensor.

    Raises: CheckpointError that names the file, here and in all methods.
    """

    files: dict[str, Path]

    def __init__(self, path: str | Path) -> None:
        check_safetensors()
        self._closing = ExitStack()
        self._opened: dict[Path, tuple[Any, frozenset[str]]] = {}
        found = _find(Path(path))
        if found.suffix == ".json":
            self.files = _read_index(found)
        else:
            self.files = dict.fromkeys(self._open(found)[1], found)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *details: object) -> None:
        self._opened.clear()
        self._closing.close()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        nothing = (slice(0, 0),) if self.shape(key) else ...
        dtype: torch.dtype = self._slice(key)[nothing].dtype
        return dtype

    def read(self, key: str, box: Box) -> Tensor:
        """Return a box of a tensor, on cpu; the rest of it is not read."""
        read: Tensor = self._slice(key)[box.slices or ...]
        return read

    def _slice(self, key: str) -> Any:
        file = self.files[key]
        handle, keys = self._open(file)
        if key not in keys:
            raise CheckpointError(f"{file.name} has no tensor '{key}', which the index says it has")
        return handle.get_slice(key)

    def _open(self, file: Path) -> tuple[Any, frozenset[str]]:
        from safetensors import SafetensorError, safe_open

        if file not in self._opened:
            try:
                handle: Any = safe_open(file, framework="pt", device="cpu")
                handle = self._closing.enter_context(handle)
            except FileNotFoundError:
                raise CheckpointError(f"{file.name} is missing, which the index names") from None
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file.name} cannot be read: {error}") from error
            self._opened[file] = handle, frozenset(handle.keys())
        return self._opened[file]


def _find(path: Path) -> Path:
    """Return the file to begin with: the weights, or the index of theirs."""
    if path.is_file():
        if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
            return path
        raise CheckpointError(
            f"{path.name} is no safetensors file\n  options: a folder with {SINGLE} or {INDEX}"
        )
    if not path.is_dir():
        raise CheckpointError(
            "there is no such folder or file\n"
            "  options: download it first, with huggingface_hub.snapshot_download"
        )
    for name in (SINGLE, INDEX):  # in the order of transformers
        if (path / name).is_file():
            return path / name
    there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(f"expected a folder with {SINGLE} or {INDEX}; found {there}")


def _read_index(file: Path) -> dict[str, Path]:
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(name).name != name for name in names.values()):
            raise ValueError("it names files outside of its folder")
        return {str(key): file.parent / name for key, name in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file.name} is not an index of safetensors files: {type(error).__name__}: {error}"
        ) from error

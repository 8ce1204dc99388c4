"""Files of a checkpoint that is being saved: written and flushed, published at once, or removed.

A save writes into a hidden folder beside its place, ``.<name>.unfinished-<token>``, and holds a
lock there while it lives. Then the folder gets its name; where a checkpoint is already, the new
files move in beside the old ones, and replacing ``checkpoint.json`` makes them the checkpoint. So
at every moment there is a whole one, the last or the new.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .index import INDEX, Index
from .plain import bytes_of

_LOCK = "lock"
_HIDDEN = re.compile(r"\..*\.(unfinished|removed)-[0-9a-f]{12}")
_DATA = re.compile(r"[0-9a-f]{12}-rank\d+\.safetensors")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Entry:
    """A tensor to write: its name, dtype and shape, and how to get it when its turn comes."""

    def __init__(
        self, name: str, dtype: torch.dtype, shape: Iterable[int], get: Callable[[], Tensor]
    ) -> None:
        self.name, self.dtype, self.shape, self.get = name, dtype, tuple(shape), get
        self.nbytes = torch.Size(self.shape).numel() * dtype.itemsize
        if dtype not in _DTYPES:
            raise CheckpointError(f"'{name}' is {dtype}, which safetensors files cannot hold")


def write_tensors(
    file: Path, entries: Iterable[Entry], metadata: dict[str, str] | None = None
) -> tuple[int, int]:
    """Write a safetensors file, one tensor in memory at a time; return its bytes and crc32.

    safetensors' own function wants all tensors at once, and copies them.
    """
    entries = sorted(entries, key=lambda e: -e.dtype.itemsize)  # each is aligned to its elements
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for e in entries:
        offsets = [at, at + e.nbytes]
        header[e.name] = {"dtype": _DTYPES[e.dtype], "shape": e.shape, "data_offsets": offsets}
        at += e.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = crc = 0
    with file.open("wb") as opened:
        for block in _blocks(text, entries):
            opened.write(block)
            size, crc = size + len(block), zlib.crc32(block, crc)
        _flush(opened)
    return size, crc


def _blocks(header: bytes, entries: Iterable[Entry]) -> Iterable[bytes | memoryview]:
    yield struct.pack("<Q", len(header))
    yield header
    for e in entries:
        if e.nbytes:
            tensor = e.get().detach().cpu()
            assert (tensor.dtype, tuple(tensor.shape)) == (e.dtype, e.shape), e.name
            yield bytes_of(tensor)


def write_text(file: Path, text: str) -> None:
    """Write a file that has its name only when it is complete."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as opened:
        opened.write(text)
        _flush(opened)
    os.replace(unfinished, file)
    _flush_folder(file.parent)


def unfinished_folder(path: Path, token: str) -> Path:
    """Return the folder in which the save ``token`` to ``path`` writes."""
    return path.parent / f".{path.name}.unfinished-{token}"


def begin(path: Path, token: str) -> IO[str]:
    """Make the folder of a save and return the lock that says that it lives.

    What dead saves to the same path have left is removed.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(
            f"'{path.name}' is a file, and a checkpoint is a folder\n  options: remove it first"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path)
    folder = unfinished_folder(path, token)
    folder.mkdir()
    lock = (folder / _LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def publish(path: Path, index: Index, lock: IO[str]) -> None:
    """Make a complete save the checkpoint at ``path``.

    Args:
        index: of the save, whose files are in its unfinished folder.
    """
    folder = unfinished_folder(path, index.token)
    for file in folder.glob("*.json"):
        file.unlink()  # what the ranks have said; the index says it all
    if not path.exists():
        write_text(folder / INDEX, index.text)
        with suppress(OSError):  # another save may have come first
            os.rename(folder, path)
            _flush_folder(path.parent)
            (path / _LOCK).unlink(missing_ok=True)
            lock.close()
            return
    for name in index.files:
        os.replace(folder / name, path / name)
    _flush_folder(path)
    write_text(path / INDEX, index.text)
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()
    clean(path)


def clean(path: Path) -> None:
    """Remove what dead saves have left at ``path`` and beside it, and what was replaced."""
    hidden = [f for f in path.parent.glob(".*.unfinished-*") if _HIDDEN.fullmatch(f.name)]
    tokens = {f.name.rpartition("-")[2]: f for f in hidden}
    strays: dict[str, list[Path]] = {}
    if path.is_dir():
        for file in path.glob("*-rank*.safetensors"):
            if _DATA.fullmatch(file.name):
                strays.setdefault(file.name[:12], []).append(file)
    # Alive or not is asked before the index is read: a save that ends in between is in it.
    dead = [t for t in {*tokens, *strays} if t not in tokens or not _lives(tokens[t])]
    used = None
    with suppress(CheckpointError):
        used = Index.read(path).token if (path / INDEX).is_file() else None
    if used is None and (path / INDEX).is_file():
        return  # an index that cannot be read: whatever is here may be worth something
    for token in dead:
        if token != used:
            for file in strays.get(token, ()):
                file.unlink(missing_ok=True)
        if token in tokens:
            shutil.rmtree(tokens[token], ignore_errors=True)
    for removed in path.parent.glob(".*.removed-*"):
        if _HIDDEN.fullmatch(removed.name):
            shutil.rmtree(removed, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint: at once for readers, then its files."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        hidden = path.parent / f".{path.name}.removed-{secrets.token_hex(6)}"
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _lives(folder: Path) -> bool:
    """Say whether the process that writes into ``folder`` is there; the system drops its lock."""
    try:
        with (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _flush(opened: IO[Any]) -> None:
    opened.flush()
    os.fsync(opened.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

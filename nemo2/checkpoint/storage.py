"""Reading a checkpoint through torch.distributed.checkpoint, which knows how to reshard.

``Reader`` is a storage reader for any of its planners: ``torch.distributed.checkpoint.load(
{"model": model.state_dict()}, storage_reader=Reader(path))`` fills tensors and DTensors without
nemo2. ``BoxPlanner`` asks for boxes of whole tensors, which is what ranks hold: a fused
projection's rows are in another order in a DTensor than in the checkpoint.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ..errors import CheckpointError
from ..sharding.slices import Box, Part
from .index import INDEX, Index, Stored, key_of


@dataclass(frozen=True)
class Wanted:
    """A rank's memory ``local`` of a tensor, and which boxes of the whole tensor it is."""

    local: Tensor
    parts: tuple[Part, ...]


def read_into(index: Index, wanted: Mapping[str, Wanted]) -> None:
    """Fill ``wanted`` (by the names in the checkpoint); converts to the dtypes there.

    Communication: none; each rank reads the bytes of its own boxes.
    Raises: CheckpointError that names the file.
    """
    with warnings.catch_warnings(), Reader(index, wanted) as reader:
        # torch warns of a single process; ranks agree elsewhere, see ``Problems``.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load({}, storage_reader=reader, planner=BoxPlanner(wanted), no_dist=True)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


class BoxPlanner(LoadPlanner):
    """Asks for boxes of tensors, wherever they were cut when they were saved."""

    def __init__(self, wanted: Mapping[str, Wanted]) -> None:
        self.wanted = wanted
        self.metadata = Metadata({})

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, wanted in self.wanted.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            boxes = [part.box for part in wanted.parts if part.box.numel]
            items += create_read_items_for_chunk_list(name, stored, [_chunk(b) for b in boxes])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"'{read_item.storage_index.fqn}' is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        wanted = self.wanted[read_item.dest_index.fqn]
        start = tuple(read_item.dest_index.offset or ())
        part = next(p for p in wanted.parts if p.box.numel and p.box.start == start)
        at = tuple(a + b for a, b in zip(part.at, read_item.dest_offsets, strict=True))
        return wanted.local[Box(at, tuple(read_item.lengths)).slices or ...]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: what is resolved is the memory itself."""


class Reader(StorageReader):
    """The storage reader of a checkpoint folder.

    Args:
        source: the folder, or its index when that has been read.
        names: the tensors to describe to a planner; None for all of them.
    """

    def __init__(
        self, source: str | os.PathLike[str] | Index, names: Iterable[str] | None = None
    ) -> None:
        self.index = source if isinstance(source, Index) else Index.read(Path(source))
        self.names = None if names is None else tuple(names)
        self._closing = ExitStack()
        self._opened: dict[str, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *details: object) -> None:
        self._opened.clear()
        self._closing.close()

    def read(self, name: str, part: Stored, box: Box) -> Tensor:
        """Return a box, in the indices of the stored part, on cpu."""
        from safetensors import SafetensorError, safe_open

        try:
            if part.file not in self._opened:
                made: Any = safe_open(self.index.folder / part.file, framework="pt", device="cpu")
                self._opened[part.file] = self._closing.enter_context(made)
            stored = self._opened[part.file].get_slice(key_of(name, part.box))
            read: Tensor = stored[box.slices or ...]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{part.file} cannot be read: {error}") from error
        return read.reshape(box.shape)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.__exit__()
            self.index = Index.read(Path(checkpoint_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described: dict[str, Any] = {}
        for name in self.index.tensors if self.names is None else self.names:
            info = self.index.tensors[name]
            chunks = [_chunk(part.box) for part in info.parts]
            size = torch.Size(info.shape)
            described[name] = TensorStorageMetadata(TensorProperties(info.dtype), size, chunks)
        return Metadata(described)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do: files are opened when they are read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            part = self._part(item.storage_index)
            box = Box(tuple(item.storage_offsets), tuple(item.lengths))
            memory = planner.resolve_tensor(item).detach()
            memory.copy_(self.read(item.storage_index.fqn, part, box))
            planner.commit_tensor(item, memory)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _part(self, where: MetadataIndex) -> Stored:
        parts = self.index.tensors[where.fqn].parts
        start = tuple(where.offset or ())
        if where.index is not None and parts[where.index].box.start == start:
            return parts[where.index]
        return next(part for part in parts if part.box.start == start)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return (Path(checkpoint_id) / INDEX).is_file()


def read_whole(reader: Reader, name: str) -> Tensor:
    """Return a whole tensor on cpu."""
    info = reader.index.tensors[name]
    whole = torch.empty(info.shape, dtype=info.dtype)
    for part in info.parts:
        whole[part.box.slices or ...] = reader.read(name, part, Box.whole(part.box.shape))
    return whole


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.shape))


def parts_missing(parts: Sequence[Stored], shape: Sequence[int]) -> bool:
    """Say whether parts that do not overlap leave something of a tensor open."""
    return sum(part.box.numel for part in parts) != Box.whole(shape).numel

"""Host memory that saves in the background copy into, kept from one save to the next.

Getting the memory costs far more than copying into it: beside an H200, for each GiB, 0.6 s until
the system has given its pages, 0.05 s to lock them for the GPU, and 0.02 s to copy.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .shards import Shard

_PIECE = 2**26  # bytes that are touched between two looks at whether the memory is still wanted
_ALIGNED = 256


class HostMemory:
    """One region of memory for one save at a time; it grows when a save needs more.

    The pages are shared with forked processes, not copied on write: the GPU writes to the same ones
    for as long as they are locked.
    """

    def __init__(self) -> None:
        self._region: Tensor | None = None
        self._locked = False
        self._touching: threading.Thread | None = None
        self._unwanted = threading.Event()

    def prepare(self, shards: Sequence[Shard]) -> None:
        """Get the memory for shards of this size, its pages in a thread; none if it is there."""
        if self._make(_size_of(shards)):
            assert self._region is not None
            self._touching = threading.Thread(
                target=self._touch, args=(self._region,), name="nemo2-memory"
            )
            self._touching.start()

    def copies(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return the shards with copies of their tensors in this memory; the last ones are gone."""
        self._make(_size_of(shards))
        self._wait()
        cuda = any(shard.held.is_cuda for shard in shards)
        if cuda:
            self._lock()
        copies, at = [], 0
        for shard in shards:
            held = shard.held
            host = self._at(at, held)
            host.copy_(held, non_blocking=held.is_cuda)  # they overlap, and one wait is enough
            copies.append(replace(shard, held=host))
            at += _aligned(held.nbytes)
        if cuda:
            torch.cuda.synchronize()
        return copies

    def release(self) -> None:
        """Give the memory back."""
        self._unwanted.set()
        self._wait()
        self._unwanted.clear()
        if self._locked:
            assert self._region is not None
            _cudart().cudaHostUnregister(self._region.data_ptr())
        self._region, self._locked = None, False

    def _make(self, nbytes: int) -> bool:
        """Have a region that is large enough; return whether it is a new one."""
        if nbytes <= (0 if self._region is None else self._region.nbytes):
            return False
        self.release()  # a save that still writes keeps its memory
        made = mmap.mmap(-1, nbytes)
        with suppress(OSError, AttributeError):  # an advice only
            made.madvise(mmap.MADV_HUGEPAGE)
        self._region = torch.frombuffer(made, dtype=torch.uint8)
        return True

    def _touch(self, region: Tensor) -> None:
        for start in range(0, region.nbytes, _PIECE):
            if self._unwanted.is_set() or not threading.main_thread().is_alive():
                return
            region[start : start + _PIECE].zero_()

    def _wait(self) -> None:
        if self._touching is not None:
            self._touching.join()
            self._touching = None

    def _lock(self) -> None:
        """Lock the pages, where the system lets us: else copies take a detour, and are as right."""
        if self._region is not None and not self._locked:
            cudart = _cudart()
            done = cudart.cudaHostRegister(self._region.data_ptr(), self._region.nbytes, 0)
            self._locked = done == cudart.cudaError.success

    def _at(self, start: int, like: Tensor) -> Tensor:
        if not like.numel():
            return torch.empty(like.shape, dtype=like.dtype)
        assert self._region is not None
        return self._region[start : start + like.nbytes].view(like.dtype).view(like.shape)


HOST = HostMemory()


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _size_of(shards: Sequence[Shard]) -> int:
    """Return the bytes that copies of the shards take."""
    return sum(_aligned(shard.held.nbytes) for shard in shards)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED

"""Random masks without a generator's state: a hash of a key and of each element's position.

The same key and positions give the same bits on every device, in every build of torch, and
however a tensor is cut: only integer operations that wrap are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

# Elements hashed at once: what a core's cache holds, or what keeps a GPU busy.
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}


def key_of(*parts: object) -> int:
    """Return 64 bits (as a signed integer) that name ``parts``, the same in every process.

    >>> key_of(1, "layers.0.drop") == key_of(1, "layers.0.drop") != key_of(1, "layers.1.drop")
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def keep_mask(key: int | Tensor, positions: Sequence[Tensor], probability: float) -> Tensor:
    """Return which elements are kept: each with ``probability``, decided by key and position.

    Args:
        key: 64 bits, or a tensor () int64 on that device.
        positions: for each dim the global positions (n_d,) int64 of its elements, all on one
            device; at least one.

    Returns:
        a bool tensor (n_0, n_1, ...) on that device.

    Source: the finaliser of SplitMix64 (doi 10.1145/2660193.2660195, figure 16) over the outer
    dims; over the last one a 32-bit multiply and xorshift, keyed by 64 bits for each row.
    """
    *outer, last = positions
    rows = key.view(1) if isinstance(key, Tensor) else last.new_full((1,), key)
    for dim in outer:
        rows = _mix((rows[:, None] ^ _mix(dim)[None]).flatten())
    words = rows.view(torch.int32).view(rows.numel(), 2)
    low, high = words[:, :1], words[:, 1:] | 1
    columns = _mix(last).view(torch.int32)[::2]
    top = min(round(probability * 2**32) - 2**31, 2**31 - 1)
    kept = torch.empty((rows.numel(), last.numel()), dtype=torch.bool, device=last.device)
    step = max(_CHUNK.get(last.device.type, 1 << 16) // max(last.numel(), 1), 1)
    for start in range(0, rows.numel(), step):
        part = slice(start, start + step)
        bits = (low[part] ^ columns).mul_(high[part])
        bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
        bits.mul_(0x2C1B3C6D)
        bits ^= (bits >> 12).bitwise_and_(0xFFFFF)
        bits.mul_(0x297A2D39)
        torch.lt(bits, top, out=kept[part])
    return kept.view([p.numel() for p in positions])


def _mix(x: Tensor) -> Tensor:
    """Return 64 well mixed bits for each element of ``x`` (int64)."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)).mul_(_FIRST)
    x = (x ^ _shifted(x, 27)).mul_(_SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right as if ``x`` were unsigned."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)

"""The sequences of one microbatch as they grow, and what the model is given of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache

# Lengths are rounded up to multiples, so that requests of similar lengths share their plans.
_PREFILL, _LENGTH = 16, 64


class CachedFeed:
    """Feeds the prompts, then one new token at a time; a cache keeps the keys and values.

    Prompts end in the same column, and padding comes before them. The first column is always
    padding: models of transformers leave the mask out where nothing is masked, which would be
    another path through their code.

    Args:
        prompts: ids of each sequence of the microbatch.
        longest: the longest prompt of any microbatch; ``new``: how many tokens may be added.
        number: which microbatch of this rank it is.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        longest: int,
        new: int,
        number: int,
        device: torch.device,
    ) -> None:
        start = _up(longest + 1, _PREFILL)
        self.cache = KVCache(_up(start + new - 1, _LENGTH))
        self.number, self.device = number, device
        padded = [[0] * (start - len(p)) + list(p) for p in prompts]
        self.ids = torch.tensor(padded, device=device)
        self.padding = torch.tensor([start - len(p) for p in prompts], device=device).unsqueeze(1)
        self.columns = torch.arange(self.cache.length, device=device)
        self.cache.padding = self.columns[:start] < self.padding

    def part(self) -> dict[str, Any]:
        """Return the microbatch of the next step.

        ids, positions: (batch, tokens). real: (batch, length), which columns are no padding.
        mask: (batch, 1, tokens, length), which columns each token sees: itself at least.
        """
        start, count = self.cache.start, self.ids.shape[1]
        own = self.columns[start : start + count]
        real = self.columns >= self.padding
        seen = (self.columns <= own.unsqueeze(-1)) & real.unsqueeze(1)
        seen |= self.columns == own.unsqueeze(-1)
        return {
            "ids": self.ids,
            "positions": (own - self.padding).clamp(min=0),
            "real": real,
            "mask": seen.unsqueeze(1),
            "microbatch": self.number,
        }

    def append(self, tokens: Sequence[int]) -> None:
        """Add one token to each sequence."""
        self.cache.start += self.ids.shape[1]
        self.cache.padding = None
        self.ids = torch.tensor(tokens, device=self.device).unsqueeze(1)


class WholeFeed:
    """Feeds all tokens again in each step, for models without a cache.

    Sequences begin in the first column, and padding comes after them: a causal model needs no
    mask to be right for what comes before it.
    """

    cache = None

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        longest: int,
        new: int,
        number: int,
        device: torch.device,
    ) -> None:
        self.rows = [list(p) for p in prompts]
        self.now, self.limit = longest, longest + new - 1
        self.number, self.device = number, device

    def part(self) -> dict[str, Any]:
        """Return the microbatch of the next step.

        ids: (batch, tokens). last: (batch), the column of each sequence's last token.
        """
        width = min(_up(self.now, _LENGTH), self.limit)
        padded = [row + [0] * (width - len(row)) for row in self.rows]
        return {
            "ids": torch.tensor(padded, device=self.device),
            "last": torch.tensor([len(row) - 1 for row in self.rows], device=self.device),
            "microbatch": self.number,
        }

    def append(self, tokens: Sequence[int]) -> None:
        """Add one token to each sequence."""
        self.now += 1
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)


Feed = CachedFeed | WholeFeed


def last_logits(logits: Tensor, last: Tensor | None) -> Tensor:
    """Return (batch, vocabulary) of what follows each sequence; ``last`` None: the last column."""
    from .cache import token_at

    return logits[:, -1] if last is None else token_at(logits, last)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step

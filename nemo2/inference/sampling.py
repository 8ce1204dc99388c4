"""From logits to tokens: greedy, or drawn with one random number a token.

The number depends on the seed, on which prompt it is and on how many tokens it has, and not on
the mesh or on the prompts beside it. So tokens are the same wherever a row is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sharding.counter import key_of


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: temperature, then ``top_k``, then ``top_p``; 0.0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def choose(self, logits: Tensor, prompts: Sequence[int], number: int) -> Tensor:
        """Return the next token of each row.

        Args:
            logits: (rows, vocabulary), of any float dtype, each with a finite largest one.
            prompts: which prompt each row continues.
            number: how many new tokens each has.
        """
        if self.temperature == 0.0:
            return logits.argmax(-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = self._among((logits - logits.amax(-1, keepdim=True)) / self.temperature)
        drawn = [uniform(self.seed, prompt, number) for prompt in prompts]
        levels = torch.tensor(drawn, dtype=torch.float64, device=logits.device)
        # In the order of the vocabulary: sorted, scores that are almost equal could change places.
        below = scores.softmax(-1).double().cumsum(-1)
        levels = levels.unsqueeze(-1) * below[:, -1:]
        return torch.searchsorted(below, levels, right=True).squeeze(-1)

    def _among(self, scores: Tensor) -> Tensor:
        """Leave only the scores that ``top_k`` and ``top_p`` allow; the others are -inf."""
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self.top_p is not None and self.top_p < 1.0:
            ordered = scores.sort(-1, descending=True).values
            shares = ordered.softmax(-1)
            before = shares.cumsum(-1) - shares
            kept = (before < self.top_p).sum(-1, keepdim=True).clamp(min=1)
            scores = scores.masked_fill(scores < ordered.gather(-1, kept - 1), float("-inf"))
        return scores


def uniform(seed: int, prompt: int, number: int) -> float:
    """Return the random number in [0, 1) for one token of one prompt.

    >>> 0.0 <= uniform(0, 0, 0) < 1.0 and uniform(0, 0, 0) != uniform(0, 0, 1)
    True
    """
    return (key_of("generate", seed, prompt, number) & (2**53 - 1)) / 2**53

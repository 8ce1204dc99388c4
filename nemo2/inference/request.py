"""What is asked of ``generate``, checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..errors import Nemo2Error
from .sampling import Sampling


@dataclass(frozen=True)
class Request:
    """Checked arguments of ``generate``.

    Attributes:
        prompts: ids of each; all on the host.
        new: how many tokens to add at most.
        stop: tokens that end a sequence.
        how: whatever else has to be the same on all ranks.
    """

    prompts: tuple[tuple[int, ...], ...]
    new: int
    stop: frozenset[int]
    sampling: Sampling
    how: str

    @property
    def longest(self) -> int:
        return max(len(p) for p in self.prompts)

    @property
    def largest(self) -> int:
        """The largest id."""
        return max(max(p) for p in self.prompts)

    def digest(self) -> str:
        """Return what two ranks that ask for the same have in common."""
        text = repr((self.prompts, self.new, sorted(self.stop), self.sampling, self.how))
        return hashlib.sha256(text.encode()).hexdigest()


def checked(
    prompts: Any, new: Any, stop: Any, sampling: Sampling, microbatches: Any, how: str
) -> Request:
    """Return the request, or raise a Nemo2Error that lists all that is wrong with it."""
    problems = [*_about(sampling)]
    if not _is_count(new):
        problems.append(f"max_new_tokens={new!r} is not a positive integer")
    if microbatches is not None and not _is_count(microbatches):
        problems.append(f"microbatches={microbatches!r} is neither None nor a positive integer")
    stops = tuple(stop) if isinstance(stop, Iterable) else (stop,)
    if not all(_is_int(t) for t in stops):
        problems.append(f"stop={stop!r} is not a token or a list of tokens")
    rows, wrong = _rows(prompts)
    problems += wrong
    if problems:
        raise Nemo2Error("generate: " + "\n  ".join(problems))
    return Request(tuple(rows), new, frozenset(map(int, stops)), sampling, f"{how}, {microbatches}")


def _rows(prompts: Any) -> tuple[list[tuple[int, ...]], list[str]]:
    """Return the ids of each prompt, and what is wrong with them."""
    if isinstance(prompts, Tensor) and prompts.ndim != 2:
        return [], [
            f"prompts is a tensor of shape {tuple(prompts.shape)}\n"
            "  options: a list of 1-d tensors or of lists of ids | a tensor (prompts, tokens)"
        ]
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, (Tensor, Iterable)):
        return [], [f"prompts is a {type(prompts).__name__}, not a list of lists of ids"]
    rows: list[tuple[int, ...]] = []
    problems = []
    for i, prompt in enumerate(prompts):
        ids = _ids(prompt)
        if ids is None:
            kind = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
            problems.append(f"prompt {i} is no list of ids: {kind}; prompts is a list of prompts")
        elif not ids:
            problems.append(f"prompt {i} is empty: there is nothing to continue")
        elif min(ids) < 0:
            problems.append(f"prompt {i} has the id {min(ids)}, which is negative")
        else:
            rows.append(ids)
    if not rows and not problems:
        problems.append("there are no prompts")
    return rows, problems[:8]


def _ids(prompt: Any) -> tuple[int, ...] | None:
    if isinstance(prompt, Tensor):
        integers = not prompt.is_floating_point() and prompt.dtype != torch.bool
        return tuple(prompt.tolist()) if prompt.ndim == 1 and integers else None
    if isinstance(prompt, Sequence) and all(_is_int(t) for t in prompt):
        return tuple(int(t) for t in prompt)
    return None


def _about(sampling: Sampling) -> list[str]:
    """Return what is wrong with how tokens are to be chosen."""
    problems = []
    heat, k, p = sampling.temperature, sampling.top_k, sampling.top_p
    if not (_is_number(heat) and 0.0 <= heat < float("inf")):
        problems.append(f"temperature={heat!r} is not a number from 0 (greedy) up")
    elif heat == 0.0 and (k is not None or p is not None):
        problems.append("top_k and top_p need a temperature: 0 takes the likeliest token always")
    if k is not None and not _is_count(k):
        problems.append(f"top_k={k!r} is neither None nor a positive integer")
    if p is not None and not (_is_number(p) and 0.0 < p <= 1.0):
        problems.append(f"top_p={p!r} is neither None nor a number above 0 and up to 1")
    if not _is_int(sampling.seed):
        problems.append(f"seed={sampling.seed!r} is not an integer")
    return problems


def _is_int(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)  # numpy's, too


def _is_count(x: Any) -> bool:
    return _is_int(x) and x > 0


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)

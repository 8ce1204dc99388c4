"""How a batch is cut into microbatches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import optree
from torch import Tensor

from ..errors import PipelineError
from ..pytree import NAMESPACE, tree_map


@dataclass(frozen=True)
class BatchPlan:
    """The batch size, and which tensor leaves are cut along their first dim."""

    size: int
    split: tuple[str, ...]
    whole: tuple[str, ...]


def plan_batch(
    batch: Any, microbatches: int, over: str = "microbatches", rounds: int = 1
) -> BatchPlan:
    """Find the batch size: the first dim that most tensor leaves share.

    Args:
        over: what the parts are for, in messages.
        rounds: of which the number of parts must be a multiple, in messages.

    Raises: PipelineError when two sizes are equally frequent, or when the size does not
        divide by ``microbatches`` (the message lists the counts that do).
    """
    paths, leaves, _ = optree.tree_flatten_with_path(batch, none_is_leaf=True, namespace=NAMESPACE)
    names = ["".join(f"[{p!r}]" for p in path) or "batch" for path in paths]
    sized = [(n, x) for n, x in zip(names, leaves, strict=True) if isinstance(x, Tensor) and x.ndim]
    if not sized:
        raise PipelineError(
            f"cannot split this batch over {over}={microbatches}:"
            " it holds no tensor with a batch dim\n"
            f"  options: {over}=1 | put tensors into the batch"
        )
    counts = Counter(x.shape[0] for _, x in sized).most_common()
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        shown = ", ".join(f"{n}: {tuple(x.shape)}" for n, x in sized)
        raise PipelineError(
            f"cannot tell the batch dim: first dims {counts[0][0]} and {counts[1][0]}"
            f" are equally frequent ({shown})\n"
            "  options: give every tensor its batch dim | keep tensors without one out of the batch"
        )
    size = counts[0][0]
    if size % microbatches or size == 0:
        fits = [n for n in range(rounds, size + 1, rounds) if size % n == 0]
        which = f"{over} in {fits} | " if fits else ""
        raise PipelineError(
            f"cannot split a batch of {size} samples over {over}={microbatches}:"
            f" {size} % {microbatches} = {size % microbatches}\n"
            f"  options: {which}a batch of {-(-size // microbatches) * microbatches}"
        )
    split = tuple(n for n, x in sized if x.shape[0] == size)
    return BatchPlan(size, split, tuple(n for n, x in sized if x.shape[0] != size))


def split_batch(
    batch: Any, microbatches: int, over: str = "microbatches", rounds: int = 1
) -> list[Any]:
    """Return the microbatches of ``batch``: views of equal parts along the batch dim."""
    if microbatches == 1:
        return [batch]
    size = plan_batch(batch, microbatches, over, rounds).size
    part = size // microbatches

    def cut(i: int, x: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim and x.shape[0] == size:
            return x[i * part : (i + 1) * part]
        return x

    return [tree_map(partial(cut, i), batch) for i in range(microbatches)]


def first_microbatch(batch: Any, microbatches: int) -> Any:
    return split_batch(batch, microbatches)[0]

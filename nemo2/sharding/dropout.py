"""Dropout whose mask does not depend on the mesh.

An element is kept by a hash of (seed, step, module, n-th call, global position): where it lies,
and in which microbatch, changes nothing. What a run adds to the plan is the *forward* that is
running: the step, and the first global sample of the microbatch.

Activation checkpoints run a part of a forward again in backward, when other microbatches have
run. They restore the state of torch's CPU generator, so its seed carries what is needed: it
names the forward, and how many calls of modules that are called more than once came before. What
a call was is looked up in the forward's log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import Nemo2Error
from . import collectives, islands, tracing
from .collectives import Axis
from .counter import keep_mask, key_of
from .layout import AXES, WHOLE, Sharding

_CALLS = 20  # bits of a seed that count the calls of modules that are called more than once
_ALPHA = 1.7580993408473766  # of alpha dropout, arXiv 1706.02515
_DIMS = {"dropout1d": 2, "dropout2d": 3, "dropout3d": 4}  # dims of one sample and its channels
_ELEMENTS = ("dropout", "dropout_", "alpha_dropout", "alpha_dropout_")
_CHANNELS = (*_DIMS, "feature_dropout", "feature_dropout_")

Counter = tuple[str, int]  # a module, and which of the dropout calls in its forward
Row = tuple[int, int, int] | Tensor  # key, first sample, stride; traced: (3,) int64


@dataclass(frozen=True)
class Draw:
    """What the plan knows of one dropout call.

    Attributes:
        layouts: of the operand, over ``cp`` and ``tp``.
        shape: global shape, of one microbatch.
        samples: (dim, elements of that dim in one sample) where samples lie one after the other.
    """

    layouts: Sharding = WHOLE
    shape: tuple[int, ...] = ()
    samples: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Site:
    """A dropout call in a module's forward, with a ``Draw`` for each call of the module."""

    counter: Counter
    draws: tuple[Draw, ...]


@dataclass
class Forward:
    """One forward of one microbatch through one stage, while its run lasts.

    Attributes:
        key: (seed, step).
        first: the microbatch's first global sample; ``stride``: how far the next one is.
        counts: of sites with several draws, how often each was called.
        log: which call of its site each call of such a site was, in order.
    """

    key: tuple[int, int]
    first: int
    stride: int = 1
    counts: dict[Counter, int] = field(default_factory=dict)
    log: list[int] = field(default_factory=list)

    def jump(self, counts: Mapping[Counter, int] | None) -> None:
        """Go on as if sites had been called so often: calls on other stages count too."""
        if counts:
            self.counts.update(counts)


# The forwards of the run, by the upper bits of their seeds; empty outside of a run.
_forwards: dict[int, Forward] = {}


@contextmanager
def drawing() -> Iterator[None]:
    """Begin a run without forwards, and forget its forwards at the end."""
    before = dict(_forwards)
    _forwards.clear()
    try:
        yield
    finally:
        _forwards.clear()
        _forwards.update(before)


def begin(
    seed: int, step: int, coordinates: tuple[int, ...], first: int, stride: int = 1
) -> Forward:
    """Start a forward: seeds torch's generators, from which what is not keyed draws.

    Args:
        coordinates: what tells it from the run's other forwards, and its rank from others.
        first: the first global sample of its microbatch; ``stride``: how far the next one is.
    """
    token = seed_of(seed, step, coordinates)
    torch.manual_seed(token)
    made = _forwards[token >> _CALLS] = Forward((seed, step), first, stride)
    return made


def seed_of(seed: int, step: int, coordinates: tuple[int, ...]) -> int:
    """Return the seed of torch's generators for one forward."""
    return (key_of(seed, step, coordinates) & 0x7FFF_FFFF_FFFF_FFFF) >> _CALLS << _CALLS


def is_running() -> bool:
    """Say whether a forward draws; else dropout is torch's own."""
    return bool(_forwards)


def is_dropout(name: str) -> bool:
    """Say whether a torch call is a dropout of a kind that can be keyed."""
    return name in _ELEMENTS or name in _CHANNELS


def is_active(name: str, args: Any, kwargs: Any) -> bool:
    """Say whether a dropout call draws."""
    p, training = _arguments(name, args, kwargs)[1:3]
    return bool(training) and p > 0


def _arguments(name: str, args: Any, kwargs: Any) -> tuple[Tensor, float, bool, bool]:
    """Return (input, p, training, inplace) of ``F.dropout`` or ``torch.dropout`` and their kin."""
    given = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    training = given.get("training", given.get("train", not name.startswith("alpha")))
    inplace = bool(given.get("inplace", False)) or name.endswith("_")
    return given["input"], float(given.get("p", 0.5)), bool(training), inplace


def count(site: Site) -> int:
    """Return which call of its site this is, and count it.

    Raises: Nemo2Error when torch was seeded anew in a part that is computed again in backward.
    """
    if len(site.draws) == 1 or not _forwards:
        return 0
    forward, seed = _current(), torch.initial_seed()
    position = seed & ((1 << _CALLS) - 1)
    if position < len(forward.log):
        ordinal = forward.log[position]  # an activation checkpoint runs it again
    else:
        ordinal = forward.counts.get(site.counter, 0)
        forward.counts[site.counter] = ordinal + 1
        forward.log.append(ordinal)
    torch.default_generator.manual_seed(seed + 1)
    return ordinal


def _current() -> Forward:
    found = _forwards.get(torch.initial_seed() >> _CALLS)
    if found is None:
        raise Nemo2Error(
            "torch's generator was seeded inside of a step, where its seed says which microbatch"
            " dropout belongs to\n"
            "  options: a torch.Generator of your own for other random numbers |"
            " torch.random.fork_rng() around them"
        )
    return found


def next_row(site: Site) -> tuple[int, int, int]:
    """Count a call of ``site`` and return what a traced one is given: see ``Tracing``."""
    return _row(site, count(site))


def _row(site: Site, ordinal: int) -> tuple[int, int, int]:
    """Return the key of a call, and where the samples of its microbatch lie."""
    forward = _current()
    return key_of(forward.key, site.counter, ordinal), forward.first, forward.stride


def run_dropout(
    site: Site,
    axes: Mapping[str, Axis],
    name: str,
    func: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """Run one dropout call on this rank's part of its operand.

    Communication: none.
    """
    if not _forwards:
        return func(*args, **kwargs)
    trace = tracing.current()
    ordinal = count(site) if trace is None else 0
    if not is_active(name, args, kwargs):
        return func(*args, **kwargs)
    x, p, _, inplace = _arguments(name, args, kwargs)
    draw = site.draws[min(ordinal, len(site.draws) - 1)]
    if len(draw.shape) != x.ndim:  # another path than the planned one, on one device
        return func(*args, **kwargs)
    row = _row(site, ordinal) if trace is None else trace.next_key(site, x.device)
    dims = _masked_dims(name, x.ndim)
    positions = [_positions(d, draw, axes, row, x) for d in range(x.ndim) if d in dims] or [
        torch.zeros(1, dtype=torch.int64, device=x.device)
    ]
    # A compiler may evaluate integers that wrap otherwise: to it the mask is one operation.
    made = keep_mask if trace is None else islands.keep_mask
    kept = made(row[0], positions, 1.0 - p)
    kept = kept.view([x.shape[d] if d in dims else 1 for d in range(x.ndim)])
    if name.startswith("alpha"):
        return _alpha(x, kept, p, inplace)
    scale = 1.0 / (1.0 - p) if p < 1 else 0.0
    if inplace:
        return x.mul_(kept.to(x.dtype).mul_(scale))
    out: Tensor = _Dropout.apply(x, kept, scale)  # type: ignore[no-untyped-call]
    return out


def _masked_dims(name: str, ndim: int) -> range:
    """Return the dims along which the mask varies."""
    if name in _ELEMENTS:
        return range(ndim)
    alone = name in ("dropout1d", "dropout3d") and ndim == _DIMS[name]  # channels first
    return range(1 if alone else 2)


def _positions(dim: int, draw: Draw, axes: Mapping[str, Axis], row: Row, x: Tensor) -> Tensor:
    """Return the global positions along ``dim`` of the elements of ``x``, this rank's part."""
    _, first, stride = row
    split = any(layout.dim == dim for layout in draw.layouts)
    made = torch.arange(draw.shape[dim] if split else x.shape[dim], device=x.device)
    for name, layout in zip(AXES, draw.layouts, strict=True):
        if layout.dim == dim:
            made = collectives.split(made, layout.at(0), axes[name])
    for d, each in draw.samples:
        if d == dim:
            sample = torch.div(made, each, rounding_mode="floor")
            made = (first + sample * stride) * each + made % each
    return made


class _Dropout(torch.autograd.Function):
    """Keeps one byte an element for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return (x * kept).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return grad * kept * ctx.scale, None, None


def _alpha(x: Tensor, kept: Tensor, p: float, inplace: bool) -> Tensor:
    """Return alpha dropout: dropped elements take the value at which SELU saturates.

    Source: arXiv 1706.02515, section 3 (torch's own arithmetic).
    """
    if p == 1:
        return x.mul_(0) if inplace else x * 0
    a = 1.0 / ((_ALPHA**2 * p + 1) * (1 - p)) ** 0.5
    noise = kept.to(x.dtype)
    shift = (noise - 1).mul_(_ALPHA * a).add_(_ALPHA * a * p)
    noise.mul_(a)
    return x.mul_(noise).add_(shift) if inplace else x * noise + shift

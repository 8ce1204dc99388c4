"""Which calls of a step draw random numbers, and how: keyed dropout, or numbers of their own.

Dropout is keyed by global positions, which asks for the dim in which the samples are. It is found
by running the step on a batch of twice as many and comparing shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import Nemo2Error
from .pipeline.microbatch import plan_batch
from .pytree import tree_map
from .sharding.actions import Action
from .sharding.dropout import Counter, Draw, Site, is_active, is_dropout
from .sharding.layout import WHOLE
from .trace import Activation, Event, Trace, paired

Counts = Mapping[Counter, int]

_GENERATORS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"}
_GENERATORS |= {"bernoulli", "bernoulli_", "multinomial", "normal", "normal_", "uniform_"}
_GENERATORS |= {"exponential_", "poisson", "random_", "geometric_", "cauchy_", "log_normal_"}
_GENERATORS |= {"gumbel_softmax"}
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_MAYBE = ("rrelu", "rrelu_", "feature_alpha_dropout", "feature_alpha_dropout_")


@dataclass(frozen=True)
class Randomness:
    """What a step draws.

    Attributes:
        keyed: modules with dropout that does not depend on the mesh; ``""`` is the step itself.
        own: (module, call, reason) of what draws from torch's generator.
        before, after: at the start and the end of each block, how often sites that have
            several draws have been called.
    """

    keyed: tuple[str, ...] = ()
    own: tuple[tuple[str, str, str], ...] = ()
    before: Mapping[int, Counts] = field(default_factory=dict)
    after: Mapping[int, Counts] = field(default_factory=dict)


def draws(name: str, args: Any, kwargs: Any) -> str:
    """Return what a torch call does with random numbers: nothing, "dropout", or how it draws.

    >>> import torch
    >>> draws("dropout", (torch.ones(2), 0.1, True), {}), draws("relu", (torch.ones(2),), {})
    ('dropout', '')
    """
    if is_dropout(name):
        return "dropout" if is_active(name, args, kwargs) else ""
    if name == "scaled_dot_product_attention":
        p = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        return f"dropout_p={p} inside its kernel" if p else ""
    if name == "native_dropout":
        return "a generator without positions"
    if name in _GENERATORS:
        own = kwargs.get("generator") is not None
        return "" if own else "a generator without positions"
    if name in _MAYBE:
        training = kwargs.get("training", any(x is True for x in args))
        return "a generator without positions" if training else ""
    if name in _RECURRENT:
        return "dropout inside its kernel" if _drops(args) else ""
    return ""


def _drops(args: Sequence[Any]) -> bool:
    """Say whether a recurrent call is given a dropout probability, and trains."""
    at = next((i for i, x in enumerate(args) if isinstance(x, float)), None)
    return at is not None and args[at] > 0 and bool(args[at + 1])


def key_dropout(trace: Trace, batch: Any, record: Callable[[Any], Trace]) -> Randomness:
    """Give each dropout call of ``trace`` the action that keys it; return what the step draws.

    Args:
        batch: one microbatch, of which ``trace`` is.
        record: plans the step on another batch, with every axis of one rank.
    """
    walked = list(trace.root.walk())
    own = [
        (a.module, e.name, e.draws)
        for a in walked
        for e in a.events()
        if e.draws not in ("", "dropout")
    ]
    sites = _sites(walked)
    for calls in list(sites.values()):
        if any(e.again for _, e in calls):
            own += _own(calls, "in a part of a forward that is checkpointed by itself")
    sites = {c: calls for c, calls in sites.items() if not any(e.again for _, e in calls)}
    samples = _samples(trace, batch, record) if sites else {}
    if samples is None:
        for calls in sites.values():
            own += _own(calls, "the step cannot be planned with another batch size")
        sites = {}
    for counter, calls in sites.items():
        found = tuple(_draw(e, samples or {}) for _, e in calls)
        site = Site(counter, found if len(calls) > 1 else found[:1])
        for _, event in calls:
            event.action = Action(event.name, "dropout", value=site)
    before, after = _counts(trace, {c for c, calls in sites.items() if len(calls) > 1})
    keyed = tuple(dict.fromkeys(module for module, _ in sites))
    return Randomness(keyed, tuple(dict.fromkeys(own)), before, after)


_Calls = list[tuple[Activation, Event]]


def _own(calls: _Calls, why: str) -> list[tuple[str, str, str]]:
    return [(a.module, e.name, why) for a, e in calls if e.draws]


def _dropouts(activation: Activation) -> list[Event]:
    return [e for e in activation.events() if is_dropout(e.name)]


def _sites(walked: Sequence[Activation]) -> dict[Counter, _Calls]:
    """Return the dropout calls by place in the code, those that draw at least once."""
    found: dict[Counter, _Calls] = {}
    for activation in walked:
        for index, event in enumerate(_dropouts(activation)):
            found.setdefault((activation.module, index), []).append((activation, event))
    return {c: calls for c, calls in found.items() if any(e.draws for _, e in calls)}


def _draw(event: Event, samples: Mapping[int, tuple[tuple[int, int], ...]]) -> Draw:
    layouts = event.layouts[0] if event.layouts else WHOLE
    return Draw(layouts, event.output_shapes[0], samples.get(event.number, ()))


def _samples(
    trace: Trace, batch: Any, record: Callable[[Any], Trace]
) -> dict[int, tuple[tuple[int, int], ...]] | None:
    """Return for each dropout call (dim, its elements in one sample); None if not known."""
    try:
        size = plan_batch(batch, 1).size
        other = record(tree_map(lambda x: _twice(x, size), batch))
    except (Nemo2Error, RuntimeError, ValueError, IndexError, AssertionError):
        return None
    events = paired(trace, other)
    if events is None:
        return None
    found = {}
    for e, more in events:
        if is_dropout(e.name):
            pairs = list(zip(e.output_shapes[0], more.output_shapes[0], strict=True))
            dims = tuple((d, a // size) for d, (a, b) in enumerate(pairs) if a != b)
            if any(b != 2 * a or a % size for a, b in pairs if a != b):
                return None  # something else than samples
            found[e.number] = dims
    return found


def _twice(x: Any, size: int) -> Any:
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and x.shape[0] == size else x


def _counts(trace: Trace, several: set[Counter]) -> tuple[dict[int, Counts], dict[int, Counts]]:
    """Return how often the sites ``several`` were called before and after each block."""
    now: dict[Counter, int] = dict.fromkeys(several, 0)
    before: dict[int, Counts] = {}
    after: dict[int, Counts] = {}

    def visit(activation: Activation) -> None:
        if several and activation.block is not None:
            before[activation.block] = dict(now)
        for index, _ in enumerate(_dropouts(activation)):
            if (activation.module, index) in now:
                now[activation.module, index] += 1
        for child in activation.children():
            visit(child)
        if several and activation.block is not None:
            after[activation.block] = dict(now)

    visit(trace.root)
    return before, after

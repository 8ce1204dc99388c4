"""A block run on stand-ins: what it returns, and whether a graph can stand for it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from ..errors import Nemo2Error
from ..pipeline.absent import name_of
from ..pytree import tree_flatten, tree_leaves, tree_unflatten
from ..randomness import draws
from ..sharding.actions import Axes
from ..sharding.dropout import Site
from ..sharding.kept import version_of
from ..sharding.tracing import Tracing, tracing
from .slots import Slots, facts


@dataclass(frozen=True)
class Rehearsal:
    """What is known of a block after one run on stand-ins.

    Attributes:
        tensors: which leaves of its arguments are tensors.
        outputs: which leaves of its result are tensors.
        spec, constants: how its result is put together, and its other leaves.
        sites: its dropout calls, in order.
        written: which of its tensors, arguments first, then those of ``slots``, it writes into.
    """

    slots: Slots
    axes: Axes
    mode: FakeTensorMode
    tensors: tuple[int, ...]
    outputs: tuple[int, ...]
    spec: Any
    constants: tuple[Any, ...]
    sites: tuple[Site, ...]
    written: tuple[int, ...]

    def output(self, results: Sequence[Any]) -> Any:
        """Return the block's result with ``results`` as its tensors."""
        leaves = list(self.constants)
        for i, x in zip(self.outputs, results, strict=True):
            leaves[i] = x
        return tree_unflatten(self.spec, leaves)

    @contextmanager
    def staged(self, state: Tracing, held: Sequence[Tensor]) -> Iterator[None]:
        """Let the block's code run on stand-ins; nothing that it remembers leaves it."""
        before = [(list(a.entered), list(a.kept)) for a in self.axes.values()]
        for axis in self.axes.values():
            axis.entered.clear()
            axis.kept.clear()
        try:
            with self.slots.holding(held), tracing(state):
                yield
        finally:
            for axis, (entered, kept) in zip(self.axes.values(), before, strict=True):
                axis.entered[:], axis.kept[:] = entered, kept


def cannot_compile(block: nn.Module) -> str:
    """Return why no graph can stand for a block, as far as its modules tell, or ""."""
    for name, module in block.named_modules():
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        if name and any(hooks):
            return f"its '{name}' has hooks, which a graph would not call"
    return ""


def rehearse(
    forward: Callable[[Sequence[Any]], Any],
    block: nn.Module,
    slots: Slots,
    leaves: Sequence[Any],
    held: Sequence[Tensor],
    axes: Axes,
) -> Rehearsal | str:
    """Run a block on stand-ins; return what was seen, or why it must run eagerly.

    What its code leaves in its modules is there afterwards: the caller puts it back.

    Communication: none.
    """
    # Shapes are static all the same: without an environment inductor's cache refuses its graphs.
    shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(allow_non_fake_inputs=False, shape_env=shapes)
    tensors = tuple(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
    made = Rehearsal(slots, axes, mode, tensors, (), None, (), (), ())
    state, watch = Tracing(), _Watch()
    before = facts(block)
    try:
        fakes = stand_ins(mode, [*(leaves[i] for i in tensors), *held])
        given = list(leaves)
        for i, fake in zip(tensors, fakes, strict=False):
            given[i] = fake
        old = [version_of(fake) for fake in fakes]
        with mode, made.staged(state, fakes[len(tensors) :]), watch:
            result = forward(given)
            replaced = not slots.hold(fakes[len(tensors) :])
    except _CannotError as error:
        return str(error)
    except Nemo2Error:
        raise
    except Exception as error:
        return _why(error)
    if before != facts(block):
        return "it changes numbers that its modules hold"
    if any(d != site.draws[0] for site in state.sites for d in site.draws):
        return "a dropout module in it is called for tensors of several shapes"
    flat, spec = tree_flatten(result)
    outputs = tuple(i for i, x in enumerate(flat) if isinstance(x, Tensor))
    constants = tuple(None if isinstance(x, Tensor) else x for x in flat)
    odd = next((x for x in constants if not isinstance(x, _CONSTANTS)), None)
    if odd is not None:
        return f"it returns a {type(odd).__name__}"
    written = tuple(i for i, (x, o) in enumerate(zip(fakes, old, strict=True)) if version_of(x) > o)
    if any(fakes[i].requires_grad for i in written):
        return "it writes into tensors what needs a gradient"
    kept = {id(x) for x in (*flat, *fakes)}
    del result, flat, given
    if replaced or watch.survivors(kept):
        return "it keeps tensors that it does not return"
    sites = tuple(state.sites)
    return Rehearsal(slots, axes, mode, tensors, outputs, spec, constants, sites, written)


_CONSTANTS = (bool, int, float, str, type(None))


def stand_ins(mode: FakeTensorMode, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a stand-in for each tensor; the same one for the same tensor."""
    made: dict[int, Tensor] = {}
    for x in tensors:
        if id(x) not in made:
            fake = mode.from_tensor(x.detach(), static_shapes=True)
            made[id(x)] = fake.requires_grad_(x.requires_grad)
    return [made[id(x)] for x in tensors]


class _CannotError(Exception):
    """The block does what no graph can."""


class _Watch(TorchFunctionMode):
    """Finds random numbers, and remembers (weakly) what is made."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if draws(name_of(func), args, kwargs):
            raise _CannotError(f"it draws random numbers ({name_of(func)})")
        out = func(*args, **kwargs)
        self._made += [weakref.ref(x) for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        return out

    def survivors(self, known: set[int]) -> bool:
        """Say whether tensors live on that are not ``known``, by id."""
        gc.collect()
        alive = (ref() for ref in self._made)
        return any(x is not None and id(x) not in known for x in alive)


def _why(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = text[0][:120] if text else ""
    if "non-Fake Tensor" in first or "allow_non_fake_inputs" in str(error):
        return "it uses a tensor that is neither given to it nor held by its modules"
    if "DataDependent" in type(error).__name__ or "item" in first:
        return "it reads values"
    return f"it does not run on stand-ins: {type(error).__name__}: {first}"

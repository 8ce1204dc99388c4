"""One block, traced at its first call and compiled; each further call runs the compiled code.

The plan knows that a block takes one path for given shapes and switches, so the block is run once
on stand-ins and what it does becomes a graph. There is nothing to guard but what the graph was
made for: the shapes, dtypes and strides of its inputs, which of them need gradients, which are one
tensor, and what its modules hold beside tensors (checked once a step).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack

from ..errors import Nemo2Error
from ..pytree import tree_flatten, tree_unflatten
from ..sharding.actions import Axes
from ..sharding.dropout import Site, is_running, next_row
from .graph import Compiler, compiled_function
from .rehearse import Rehearsal, cannot_compile, rehearse
from .slots import Contents, Slots, facts

VARIANTS = 16  # kinds of inputs for which one block is compiled; more run eagerly

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class _Variant:
    """The code for one kind of inputs, or ``None`` and why there is none."""

    run: Callable[..., Sequence[Any]] | None
    rehearsal: Rehearsal | None = None
    why: str = ""


class CompiledBlock:
    """The forward of one block of this rank.

    Attributes:
        forward: what runs eagerly, and is traced.
        compiler: what makes code of its graph.
        told: why blocks run eagerly, as far as the user was told.
        stale: whether the numbers that its modules hold may have changed since it was called.
    """

    forward: Callable[..., Any]

    def __init__(
        self,
        name: str,
        block: nn.Module,
        axes: Axes,
        compiler: Compiler,
        told: set[str],
    ) -> None:
        self.name, self.block, self.axes = name, block, axes
        self.compiler, self._told = compiler, told
        self.forward = block.forward
        self._variants: dict[Any, _Variant] = {}
        self._by_facts: dict[Any, dict[Any, _Variant]] = {}
        self._restless: dict[Any, _Variant] = {}
        self._slots: Slots | None = None
        self.stale = True  # a step has begun since it was called

    @property
    def state(self) -> str:
        """``"compiled"``, why it is not, or that it has not run."""
        made = (*self._by_facts.values(), self._restless)
        whys = sorted({v.why for variants in made for v in variants.values()})
        return "; ".join(w or "compiled" for w in whys) or "not called yet"

    def _refresh(self) -> Slots:
        """Take up what was compiled for what its modules hold now; return where its tensors are."""
        slots = Slots(self.block)
        now = slots.names, facts(self.block)
        if now not in self._by_facts and len(self._by_facts) >= VARIANTS:
            self._variants = self._restless  # it would be compiled anew in each step
        else:
            self._variants = self._by_facts.setdefault(now, {})
        return slots

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._slots is None or self.stale:
            self._slots = self._refresh()
            self.stale = False
        leaves, spec = tree_flatten((args, kwargs))
        held = self._slots.read()
        key = (spec, _key(leaves), _key(held), _alike(leaves, held), _switches(held))
        variant = self._variants.get(key)
        if variant is None:
            with _nothing_saved():
                variant = self._variants[key] = self._make(leaves, spec, held)
        if variant.run is None:
            return self.forward(*args, **kwargs)
        rehearsal = variant.rehearsal
        assert rehearsal is not None
        given = [leaves[i] for i in rehearsal.tensors]
        if rehearsal.sites:
            given.append(_rows(rehearsal.sites, held + given))
        return rehearsal.output(variant.run(*given, *held))

    def _make(self, leaves: Sequence[Any], spec: Any, held: list[Tensor]) -> _Variant:
        """Return the code for inputs like these."""
        assert self._slots is not None
        if self._variants is self._restless:
            return self._eager("numbers that its modules hold change from step to step")
        if len(self._variants) >= VARIANTS:
            return self._eager(f"it has got {VARIANTS} kinds of inputs before")
        why = cannot_compile(self.block) or _odd_input(leaves)
        if why:
            return self._eager(why)

        def forward(given: Sequence[Any]) -> Any:
            args, kwargs = tree_unflatten(spec, list(given))
            return self.forward(*args, **kwargs)

        before = Contents(self.block)
        rehearsal = rehearse(forward, self.block, self._slots, leaves, held, self.axes)
        if isinstance(rehearsal, str):
            before.put_back()
            return self._eager(rehearsal)
        try:
            run = compiled_function(rehearsal, forward, leaves, held, self.compiler)
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")
            raise Nemo2Error(
                f"block '{self.name}' cannot be compiled by {self.compiler.backend}:"
                f" {type(error).__name__}: {first}\n"
                '  options: compile=False | compile="aot_eager", which needs no compiler'
            ) from error
        return _Variant(run, rehearsal)

    def _eager(self, why: str) -> _Variant:
        if why not in self._told:
            self._told.add(why)
            text = f"compile: block '{self.name}' (and any like it) runs eagerly, as {why}"
            warnings.warn(text, UserWarning, stacklevel=2)
        return _Variant(None, why=f"eager, as {why}")


@contextmanager
def _nothing_saved() -> Iterator[None]:
    """Leave the hooks for saved tensors of a checkpoint around: it must not see what is traced."""
    hooks, found = torch._C._autograd, []
    while (top := hooks._top_saved_tensors_default_hooks(False)) is not None:
        found.append(top)
        hooks._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(found):
            hooks._push_saved_tensors_default_hooks(pack, unpack)


def _key(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Return what a graph is made for."""
    return tuple(
        (x.shape, x.dtype, x.stride(), x.requires_grad)
        if isinstance(x, Tensor)
        else (x if isinstance(x, _PLAIN) else id(type(x)))
        for x in leaves
    )


def _alike(leaves: Sequence[Any], held: Sequence[Tensor]) -> tuple[int, ...]:
    """Return which inputs are one tensor: a graph has one input for them."""
    found = [id(x) for x in (*leaves, *held) if isinstance(x, Tensor)]
    return () if len({*found}) == len(found) else tuple(map(found.index, found))


def _switches(held: Sequence[Tensor]) -> tuple[Any, ...]:
    kind = held[0].device.type if held else "cpu"
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return torch.is_grad_enabled(), autocast, is_running(), _len_torch_function_stack()


def _odd_input(leaves: Sequence[Any]) -> str:
    """Return why an argument cannot be an input or a constant of a graph, or ""."""
    for x in leaves:
        if type(x) not in (Tensor, nn.Parameter) and not isinstance(x, _PLAIN):
            return f"it is given a {type(x).__name__}" + (
                " (use_cache=False does without)" if "Cache" in type(x).__name__ else ""
            )
    return ""


def _rows(sites: Sequence[Site], like: Sequence[Tensor]) -> Tensor:
    """Return the keys of the dropout calls of this call, (n, 3) int64."""
    return torch.tensor([next_row(site) for site in sites], dtype=torch.int64).to(
        like[0].device, non_blocking=True
    )

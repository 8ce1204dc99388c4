"""One torch call as the layout rules see it: its operands, and what was decided for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ShardingError
from ..pipeline.absent import Absent, is_absent, to_meta, user_line
from ..pytree import tree_flatten, tree_unflatten
from .actions import Action
from .layout import AXES, REPLICATED, Layout, Sharding


@dataclass
class Operand:
    """One tensor argument of a call, as one axis sees it.

    Attributes:
        entry: its layout when the call gets it; ``layout``: after ``steps``.
        other: its layout over the other axis.
        exempt: its gradient needs nothing from the plan here.
    """

    meta: Tensor
    layout: Layout
    leaves: tuple[int, ...]
    needs_grad: bool
    param: str | None
    steps: list[tuple[str, Any]] = field(default_factory=list)
    exempt: bool = False
    other: Layout = REPLICATED
    entry: Layout = REPLICATED

    def __post_init__(self) -> None:
        self.entry = self.layout

    @property
    def dim(self) -> int | None:
        return self.layout.dim

    @property
    def ndim(self) -> int:
        return self.meta.ndim

    def gather(self) -> None:
        if self.dim is not None:
            self.steps.append(("gather", self.layout))
            self.layout = REPLICATED

    def ignore(self) -> None:
        """Leave the operand as it is: the call uses its shape or dtype, not its values."""
        self.layout, self.exempt = REPLICATED, True

    def split(self, layout: Layout | int) -> None:
        layout = Layout(layout) if isinstance(layout, int) else layout
        if self.layout == layout:
            return
        self.gather()
        self.steps.append(("split", layout))
        self.layout = layout


@dataclass(frozen=True)
class Outcome:
    """What a rule decided: the layout of the results, and how the call runs."""

    layouts: Layout | Sequence[Layout] = REPLICATED
    kind: str = "call"
    value: Any = None
    soft: bool = False
    scatter: Layout | None = None


@dataclass(frozen=True)
class Scene:
    """What the rules know of a call beside its arguments.

    Attributes:
        degrees: sizes of the axes ``(cp, tp)``.
        sequence: where the sequence is in the (first) result.
        scatter: whether sums over ``tp`` may leave their result split along the sequence.
        in_block: whether a pipeline block is running.
        attention: the method of attention over ``cp``.
    """

    degrees: tuple[int, int] = (1, 1)
    sequence: tuple[Layout, ...] = ()
    scatter: bool = False
    in_block: bool = False
    attention: str = "ring"


class Call:
    """One torch call with its operands, as the rules see it over one axis."""

    def __init__(
        self,
        name: str,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        scene: Scene,
        axis: str = "tp",
    ) -> None:
        self.name, self.func, self.args, self.kwargs = name, func, args, kwargs
        self.scene, self.axis = scene, axis
        self.degree = scene.degrees[AXES.index(axis)]
        leaves, self.spec = tree_flatten((args, kwargs))
        self.leaves = leaves
        self.operands: list[Operand] = []
        self._by_id: dict[int, Operand] = {}
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor):
                if id(x) in self._by_id:
                    op = self._by_id[id(x)]
                    op.leaves = (*op.leaves, i)
                else:
                    self._by_id[id(x)] = op = _operand(x, i, AXES.index(axis))
                    self.operands.append(op)

    @property
    def granularity(self) -> int:
        """How many equal parts of a split dim keep their place when it is cut into two dims."""
        return 2 * self.degree if self.axis == "cp" else self.degree

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def operand(self, position: int, name: str) -> Operand | None:
        value = self.arg(position, name)
        return self._by_id[id(value)] if isinstance(value, Tensor) else None

    def tensor(self, position: int, name: str) -> Operand:
        found = self.operand(position, name)
        assert found is not None
        return found

    def of(self, value: Tensor) -> Operand:
        return self._by_id[id(value)]

    def gather(self) -> Outcome:
        """Bring every operand whole to the call: always right, and shown in the plan."""
        for op in self.operands:
            op.gather()
        return Outcome()

    @property
    def any_split(self) -> bool:
        return any(op.dim is not None for op in self.operands)

    def fresh(self) -> list[Any]:
        """Return the arguments with contiguous meta tensors, whose strides name their dims."""
        return [_fresh_meta(x) if isinstance(x, Tensor) else to_meta(x) for x in self.leaves]

    def rerun(self, leaves: list[Any]) -> Any:
        """Run the call on meta with ``leaves`` in the place of its arguments."""
        args, kwargs = tree_unflatten(self.spec, leaves)
        with torch._C.DisableTorchFunctionSubclass():
            return self.func(*args, **kwargs)


def _operand(x: Tensor, leaf: int, axis: int) -> Operand:
    if is_absent(x):
        assert isinstance(x, Absent)
        grad = x.needs_grad and differentiable(x.meta)
        made = Operand(x.meta, x.layouts[axis], (leaf,), grad, x.param)
        made.exempt, made.other = x.entered and AXES[axis] == "tp", x.layouts[1 - axis]
        return made
    return Operand(to_meta(x), REPLICATED, (leaf,), bool(x.requires_grad), None)


def differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _fresh_meta(x: Tensor) -> Tensor:
    meta = to_meta(x)
    return torch.empty(meta.shape, dtype=meta.dtype, device="meta")


@dataclass(frozen=True)
class Decision:
    """The result of ``decide``.

    Attributes:
        layouts: per output leaf; none: all whole.
        partial_params: the parameters with partial gradients.
        unusable: why no call may use the results, which then mean nothing.
    """

    layouts: tuple[Sharding, ...]
    action: Action | None
    partial_params: tuple[tuple[str, int], ...]
    unusable: ShardingError | None = None


def refuse(
    call: Call, what: str, options: str = "write it out of place | annotate less of this module"
) -> ShardingError:
    return ShardingError(
        f"'{call.name}' {what} a tensor split over \"{call.axis}\" in a way that no rule covers"
        f"{user_line()}\n"
        f"  operands: {shown(call)}\n"
        f"  options: {options}"
    )


def shown(call: Call) -> str:
    """Return the operands of a call with their layouts, for an error message."""
    return ", ".join(
        f"{op.param or 'tensor'}{tuple(op.meta.shape)}:{op.entry}" for op in call.operands
    )

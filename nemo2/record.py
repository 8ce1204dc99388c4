"""The recorder of a planning run: the user's step, once, with every parameter absent.

Beside torch calls (``record_calls.py``) it follows the calls of modules: what each block returned,
what changes its layout at a module's edge, and what a step does that some meshes do not allow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from .errors import PipelineError
from .pipeline.absent import (
    Absent,
    NeedsValueError,
    is_absent,
    to_meta,
    user_line,
)
from .pytree import tree_flatten, tree_leaves, tree_unflatten
from .record_calls import CallRecorder
from .repeats import Repeats
from .sharding.layout import AXES, WHOLE, Sharding
from .sharding.modes import suspended
from .trace import (
    Activation,
    BlockOutput,
    Entry,
    Input,
    Trace,
    identity,
)


class Recorder(CallRecorder):
    """Watch all torch calls and all module calls of one planning run.

    Attributes:
        repeats: the blocks that need not run where others like them have.
    """

    repeats: Repeats | None = None

    def call_module(
        self, name: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        block = self.block_index.get(name)
        with suspended():
            call = self.repeats and self.repeats.call(self, name, module, args, kwargs)
            ordinal = self.ordinals[name] = self.ordinals.get(name, -1) + 1
            start = len(self.values)
            if kwargs.get("output_router_logits") and torch.is_grad_enabled():
                self.notes.router_logits = True
            if block is not None:
                self._enter_block(name, block, ordinal)
                self._note_uses([x for x in tree_leaves((args, kwargs)) if is_absent(x)])
            again = call and call.again()
            if again:
                return again.record()
        activation = Activation(name, ordinal, is_leaf(module), block, depth=len(self.functions))
        activation.first = self.numbers
        self.stack[-1].items.append(activation)
        with suspended():
            args, kwargs = self._enter(activation, args, kwargs)
        self.stack.append(activation)
        try:
            out = self._run(activation, forward, args, kwargs)
        except NeedsValueError as error:
            if not self._closed(activation, module):
                advised = self._advised(str(error), activation, module)
                if advised is not None:
                    raise advised from error
                raise
            with suspended():
                self._forget(activation, module, start)
                out = self._assume(activation, module, args, kwargs)
        finally:
            while self.stack.pop() is not activation:
                pass
        activation.leaf = activation.leaf and len(activation.items) == 1  # else: parametrised
        with suspended():
            if block is not None:
                out = self._leave_block(block, args, kwargs, out)
            self._rekey(name, ordinal, out, start)
            activation.outputs = tuple(identity(x) for x in tree_leaves(out) if is_absent(x))
            out = self._exit(activation, out)
            if call:
                call.keep(activation, out)
            return out

    def _enter(self, activation: Activation, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Change the layout of arguments as the setting says."""
        leaves, spec = tree_flatten((args, kwargs))
        activation.inputs = tuple(
            Input(i, identity(x), tuple(to_meta(x).shape), x.dtype, is_absent(x))
            for i, x in enumerate(leaves)
            if isinstance(x, Tensor)
        )
        entries = self.setting.entries.get((activation.module, activation.ordinal), ())
        if not entries:
            return args, kwargs
        for entry in entries:
            leaves[entry.leaf] = self._relaid(leaves[entry.leaf], entry, activation)
        activation.entries = entries
        entered: tuple[Any, Any] = tree_unflatten(spec, leaves)
        return entered

    def _exit(self, activation: Activation, out: Any) -> Any:
        """Gather what a module returns over the axes that the setting names."""
        axes = self.setting.exits.get((activation.module, activation.ordinal), ())
        leaves, spec = tree_flatten(out)
        exits = []
        for i, x in enumerate(leaves):
            if is_absent(x):
                by_axis = dict(zip(AXES, x.layouts, strict=True))
                split = [a for a in reversed(AXES) if a in axes and not by_axis[a].replicated]
                if split:
                    steps = tuple(("gather", a, by_axis[a]) for a in split)
                    made = Entry(i, steps, tuple(x.meta.shape), x.meta.dtype, x.needs_grad)
                    exits.append(made)
                    leaves[i] = self._relaid(x, made, activation)
        activation.exits = tuple(exits)
        return tree_unflatten(spec, leaves) if exits else out

    def _relaid(self, x: Tensor, entry: Entry, activation: Activation) -> Absent:
        """Return a stand-in for ``x`` in the layout that ``entry`` leads to."""
        layouts = dict(zip(AXES, x.layouts if is_absent(x) else WHOLE, strict=True))
        for step, axis, layout in entry.steps:
            layouts[axis] = layouts[axis].at(None) if step.startswith("gather") else layout
        home = x.home if is_absent(x) else x.device
        made = self._stand_in(entry.shape, x.dtype, (layouts["cp"], layouts["tp"]), home)
        key = ("edge", activation.module, activation.ordinal, entry.leaf, entry.steps[0][0])
        self._born(made, key, (layouts["cp"], layouts["tp"]))
        made.needs_grad = x.needs_grad if is_absent(x) else x.requires_grad
        made.entered = any(step == "gather_vary" for step, _, _ in entry.steps)
        return made

    def _stand_in(
        self, shape: tuple[int, ...], dtype: torch.dtype, layouts: Sharding, home: torch.device
    ) -> Absent:
        """Return a new absent tensor of a global shape, as this run sees it."""
        return Absent.like(shape, dtype, home)

    def _enter_block(self, name: str, block: int, ordinal: int) -> None:
        if ordinal:
            raise PipelineError(
                f"block '{name}' is called twice in one step{user_line()}\n"
                "  a pipeline runs each block once for each microbatch\n"
                '  options: call the model once a step | leave out shard(..., "pp")'
            )
        if block != self.position + 1:
            raise PipelineError(
                f"block '{name}' is called out of order:"
                f" number {block} of the list after number {self.position}\n"
                '  options: order the list as it is called | leave out shard(..., "pp")'
            )
        self.position = block
        if CheckpointFunction in self.functions:
            self.notes.reentrant.add(block)

    def _leave_block(self, block: int, args: Any, kwargs: Any, out: Any) -> Any:
        given = tree_leaves((args, kwargs))
        position = {id(x): i for i, x in enumerate(given) if isinstance(x, Tensor)}
        leaves, spec = tree_flatten(out)
        described: list[tuple[Any, ...]] = []
        for x in leaves:
            if id(x) in self.values:
                self.values[id(x)].block = None
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and id(x) in position:
                described.append(("arg", position[id(x)]))
            elif isinstance(x, Tensor):
                absent = x if is_absent(x) else Absent(to_meta(x), x.device)
                if absent is not x:
                    leaves[i] = absent
                    self._born(absent, ("call", -1, i), WHOLE)
                described.append(("absent", tuple(absent.meta.shape), absent.meta.dtype))
            else:
                described.append(("const", x))
        self.block_outputs[block] = BlockOutput(spec, tuple(described))
        return tree_unflatten(spec, leaves)

    def _rekey(self, name: str, ordinal: int, out: Any, start: int) -> None:
        """Name a value by the outermost module that made and returned it.

        Such a name can be found again on any stage, where the module may be absent. What was
        made before the last block called keeps its name: a stage may end before ``name`` does.
        """
        for leaf, x in enumerate(tree_leaves(out)):
            value = self.values.get(id(x)) if is_absent(x) else None
            if value is not None and value.number >= start and value.born == self.position:
                x.key = value.key = ("out", name, ordinal, leaf)

    def _run(
        self, activation: Activation, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        return forward(*args, **kwargs)

    def _closed(self, activation: Activation, module: nn.Module) -> bool:
        """Say whether a module that reads values may be taken as a whole: its code is not planned.

        Inside of blocks, where every rank of an axis can run all of it on whole tensors.
        """
        if not self.setting.by_module:
            return activation.block is not None
        whole = not _is_split(module)
        return bool(activation.module) and self._in_block() and whole and self.degrees[0] == 1

    def _advised(
        self, said: str, activation: Activation, module: nn.Module
    ) -> NeedsValueError | None:
        """Say what would work inside of a block: there only split parameters forbid such code."""
        if not _is_split(module) or not self._in_block() or _WHOLE_INSTEAD in said:
            return None
        pattern = re.sub(r"\b\d+\b", "*", activation.module)
        return NeedsValueError(
            f"{said.partition(_OPTIONS)[0]}{_OPTIONS}{_WHOLE_INSTEAD} the rule"
            f" {{'{pattern}.**': None}} in place of others, and its code runs as it is | write it"
            " without reading values, such as all experts for all tokens, weighted"
        )

    def _assume(self, activation: Activation, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Let code that reads values, and so cannot run, return one tensor like its input.

        What it is given is gathered; that the assumption holds is checked when it runs.
        """
        leaves = tree_leaves((args, kwargs))
        like = next((x for x in leaves if is_absent(x) and x.meta.is_floating_point()), None)
        if like is None:
            raise PipelineError(
                f"{type(module).__name__}: what this module returns cannot be planned, as it reads"
                " values and is given no tensor"
            )
        shape = self._whole_shape(activation, like)
        out = Absent.like(shape, like.meta.dtype, like.home)
        self._born(out, ("call", -1, 0), WHOLE)
        self._use_all(module)
        activation.entries = (*activation.entries, *_gathered(leaves))
        activation.closed = shape, like.meta.dtype
        self.notes.closed.append(activation.module)
        return out

    def _forget(self, activation: Activation, module: nn.Module, start: int) -> None:
        """Forget what code did before it read a value: all of it runs unplanned."""
        drops = any(isinstance(m, _DROPOUTS) and m.p and m.training for m in module.modules())
        if drops or any(e.draws for a in activation.walk() for e in a.events()):
            why = "its code reads values, and is not planned"
            self.notes.draws.append((activation.module, "dropout", why))
        for inner in activation.walk():
            if inner is not activation:
                self.ordinals[inner.module] -= 1
        for uses in self.partial_uses.values():
            uses[:] = [use for use in uses if use[0] < activation.first]
        self.partial_uses = {name: uses for name, uses in self.partial_uses.items() if uses}
        self.values = {key: value for key, value in self.values.items() if value.number < start}
        activation.items.clear()
        self.numbers = activation.first

    def _whole_shape(self, activation: Activation, like: Absent) -> tuple[int, ...]:
        return tuple(like.meta.shape)

    def _use_all(self, module: nn.Module) -> None:
        for sub in module.modules():
            for x in sub._parameters.values():
                if x is not None and is_absent(x):
                    self._note_uses([x])
                    self.full_uses.add(str(x.param))

    def trace(self, output: Any, complete: bool) -> Trace:
        """Return what was recorded; ``output`` is used after the last block."""
        leaves = tree_leaves(output)
        self.position = len(self.block_index) - 1
        self._note_uses([x for x in leaves if is_absent(x)])
        layouts = tuple(x.layouts if is_absent(x) else WHOLE for x in leaves)
        return Trace(
            self.root,
            self.param_uses,
            self.param_scopes,
            self.partial_uses,
            self.full_uses,
            list(self.values.values()),
            self.block_outputs,
            output,
            tuple(tuple(x.shape) if isinstance(x, Tensor) else () for x in leaves),
            layouts,
            self.degrees,
            complete,
            self.notes,
            self.repeats.repeated if self.repeats else {},
        )


def _is_split(module: nn.Module) -> bool:
    """Say whether a parameter of the module or of one inside of it is split."""
    params = (x for sub in module.modules() for x in sub._parameters.values())
    return any(x is not None and is_absent(x) and x.layouts != WHOLE for x in params)


def _gathered(leaves: Sequence[Any]) -> Iterator[Entry]:
    """Say how each argument that is split over ``tp`` is made whole."""
    for i, x in enumerate(leaves):
        if is_absent(x) and not x.layouts[1].replicated:
            steps = (("gather", "tp", x.layouts[1]),)
            yield Entry(i, steps, tuple(x.meta.shape), x.meta.dtype, x.needs_grad)


_OPTIONS, _WHOLE_INSTEAD = "\n  options: ", "keep this module whole over tp:"
_DROPOUTS = (nn.Dropout, nn.AlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_LEAVES = tuple(kind.forward for kind in (nn.Linear, nn.Embedding, *_DROPOUTS))


def is_leaf(module: nn.Module) -> bool:
    """Say whether the module's forward is one known call, for which actions can be installed."""
    return type(module).forward in _LEAVES

"""One stage at run time: the user's own step, from the received tensors to its stage's end.

Blocks of other stages return absent tensors; the first local block binds the received ones;
the next stage's first block leaves the user's code with what must be sent. A rank that runs
several stages shows the module to each as if it ran that one alone. Modules that tensor
parallelism changes get their planned forward here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..compile.block import CompiledBlock
from ..compile.graph import Compiler
from ..errors import PipelineError
from ..limits import skipped
from ..mesh.groups import MeshGroups
from ..options import Compile
from ..places import Place
from ..plan import Plan, StepPlan
from ..pytree import tree_flatten, tree_leaves, tree_unflatten
from ..sharding.actions import Emulate, Script, obeying
from ..sharding.collectives import Axis, gather
from ..sharding.dropout import Forward
from ..sharding.layout import AXES
from ..sharding.modes import pause, resume, suspended
from ..sharding.narrow import NarrowLosses, entered
from ..sharding.remat import Buffers, recomputed
from ..sharding.scripts import Programs
from ..sharding.storage import placeholder
from .absent import Absent, is_absent, resolve
from .boundary import Boundary, TensorSpec
from .forwards import edged_forward, plain_forward, quiet_forward
from .stages import Crossing, StagePlan, block_of, stage_of

Step = Callable[[nn.Module, Any], Any]
_Change = tuple[MutableMapping[str, Any], str, Any]  # attributes, key, value for a time
_MISSING = object()


class StageExit(BaseException):
    """Leaves the user's code when the stage's last block has returned.

    A BaseException, so that ``except Exception`` in user code does not keep it.
    """

    def __init__(self, outputs: tuple[Tensor, ...]) -> None:
        super().__init__("the stage is done")
        self.outputs = outputs


@dataclass
class Passage:
    """One forward of one microbatch through one stage."""

    received: tuple[Tensor, ...]
    called: int = 0  # blocks so far
    values: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    watched: bool = False  # by modes of ours
    paused: list[TorchFunctionMode] | None = None
    draws: Forward | None = None

    def jump(self, counts: Mapping[tuple[str, int], int] | None) -> None:
        """Count the dropout calls of blocks that other stages run."""
        if self.draws is not None:
            self.draws.jump(counts)


class StageRunner(nn.Module):
    """Holds the user's module and runs its step; the root of FSDP.

    Its forward catches ``StageExit``, so hooks of this module run on every stage.
    """

    def __init__(
        self, module: nn.Module, plan: Plan, groups: MeshGroups, places: Sequence[Place]
    ) -> None:
        super().__init__()
        self.module = module
        self.plan, self.groups, self.places = plan, groups, tuple(places)
        self.stages = plan.stages_of(groups.pp_rank)
        self.stage = self.stages[0]  # the one that runs
        self.axes = _axes(plan, groups)
        self.passage: Passage | None = None
        self.step_plan: StepPlan | None = None
        self._installed: list[tuple[nn.Module, Any]] = []
        self._handles: list[RemovableHandle] = []
        self._absent_blocks: list[tuple[nn.Module, Any]] = []
        self._hidden: dict[int, list[_Change]] = {}
        # Compiled blocks by name, of each step's plan, and of steps without one.
        self._compiled: MutableMapping[StepPlan, dict[str, CompiledBlock]] = WeakIdKeyDictionary()
        self._compiled_alone: dict[str, CompiledBlock] = {}
        self._told: set[str] = set()
        self._buffers_of_blocks: dict[str, Buffers] = {}
        self._ready = False

    @property
    def last(self) -> bool:
        """Whether this rank runs the last stage."""
        return self.stages[-1].index == len(self.plan.stages) - 1

    @property
    def at_end(self) -> bool:
        """Whether the stage that runs is the last."""
        return self.stage.index == len(self.plan.stages) - 1

    # --- set-up, once

    def split_into_stages(self) -> None:
        """Install the hooks of local blocks and the forwards of absent ones."""
        for i, name in enumerate(self.plan.blocks):
            block = self.module.get_submodule(name)
            if self._is_local(i):
                block.register_forward_pre_hook(self._entering(i), prepend=True, with_kwargs=True)
                block.register_forward_hook(self._leaving, always_call=True)
            else:
                forward = self._absent_forward(i, name)
                block.__dict__["forward"] = forward
                self._absent_blocks.append((block, forward))

    def _is_local(self, block: int) -> bool:
        return self.plan.stages[stage_of(block, self.plan.stages)].rank == self.groups.pp_rank

    def _entering(self, index: int) -> Callable[..., tuple[Any, Any]]:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            passage = self.passage
            if passage is None:  # recomputation, or planning
                args, kwargs = resolve((args, kwargs))
                return args, kwargs
            if not self.stage.holds(index):
                return args, kwargs
            self._follow(passage, index)
            if index == self.stage.first:
                self._bind(passage, block)
            if self.step_plan is not None:
                passage.jump(self.step_plan.randomness.before.get(index))
            if passage.watched:  # the step's modes do not see what blocks do
                passage.paused = pause()
            args, kwargs = resolve((args, kwargs))
            for x in tree_leaves((args, kwargs)):
                if is_absent(x):
                    raise AssertionError(f"block {index} got a value that no stage has sent: {x!r}")
            return args, kwargs

        return hook

    def _follow(self, passage: Passage, index: int | None) -> None:
        """Check that the blocks called are those that were planned; ``None``: no more are.

        On a mesh of dp alone a step may skip blocks.
        """
        sizes = self.plan.sizes
        if self.step_plan is None or sizes.pp * sizes.cp * sizes.tp == 1:
            return
        planned = [i for i in self.step_plan.called if self.stage.holds(i)]
        expected = planned[passage.called] if passage.called < len(planned) else None
        if index != expected:
            names = [None if i is None else self.plan.blocks[i] for i in (index, expected)]
            raise skipped(names[0] or "no block", names[1])
        passage.called += 1

    def _leaving(self, block: nn.Module, args: Any, output: Any) -> None:
        if self.passage is not None and self.passage.paused is not None:
            resume(self.passage.paused)
            self.passage.paused = None

    def _bind(self, passage: Passage, block: nn.Module) -> None:
        """Give the received tensors to the absent ones that stand for them."""
        if self.stage.index == 0:
            return
        values = self._crossing_in(self.stage)
        for crossing, value in zip(values, passage.received, strict=True):
            target = passage.values.get(crossing.key)
            if is_absent(target):
                target.bind(value)

    def _absent_forward(self, index: int, name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            passage, plan = self.passage, self.step_plan
            if passage is None or plan is None:
                raise PipelineError(
                    f"block '{name}' lives on another pipeline stage: call the parallel model"
                )
            if index == self.stage.last + 1:
                raise StageExit(self._outgoing(passage))
            passage.jump(plan.randomness.after.get(index))
            block = plan.blocks[index]
            given = tree_leaves((args, kwargs))
            made: list[Any] = []
            for leaf, (kind, *rest) in enumerate(block.leaves):
                if kind == "absent":
                    with suspended():
                        x = Absent.like(rest[0], rest[1], self.groups.device)
                    passage.values[("out", name, 0, leaf)] = x
                    made.append(x)
                else:
                    made.append(given[rest[0]] if kind == "arg" else rest[0])
            return tree_unflatten(block.spec, made)

        return forward

    def _outgoing(self, passage: Passage) -> tuple[Tensor, ...]:
        out = []
        for crossing in self._crossing_out(self.stage):
            value = resolve(passage.values.get(crossing.key))
            if not isinstance(value, Tensor) or is_absent(value):
                raise AssertionError(f"stage {self.stage.index} has no value for {crossing}")
            out.append(value)
        return tuple(out)

    # --- the current kind of step

    def _crossing_in(self, stage: StagePlan) -> tuple[Crossing, ...]:
        assert self.step_plan is not None
        return self.step_plan.boundaries[stage.index - 1]

    def _crossing_out(self, stage: StagePlan) -> tuple[Crossing, ...]:
        assert self.step_plan is not None
        return self.step_plan.boundaries[stage.index]

    def incoming(self, stage: StagePlan) -> Boundary | None:
        """Return what ``stage`` receives; None for the first stage."""
        return _boundary(self._crossing_in(stage)) if stage.index else None

    def outgoing(self, stage: StagePlan) -> Boundary | None:
        """Return what ``stage`` sends; None for the last stage."""
        last = stage.index == len(self.plan.stages) - 1
        return None if last else _boundary(self._crossing_out(stage))

    def use(self, step_plan: StepPlan | None) -> None:
        """Install the forwards and captures of ``step_plan``; nothing to do when it is current."""
        if not self._ready or step_plan is not self.step_plan:
            self._uninstall()
            self.step_plan, self._ready = step_plan, True
            if step_plan is not None:
                self._install_all(step_plan)
            if self.plan.options.compile is not None:
                self._install_compiled(self.plan.options.compile)
        for block in self.compiled.values():
            block.stale = True

    def _install_all(self, step_plan: StepPlan) -> None:
        for name, action in step_plan.programs.installed.items():
            self._install(name, partial(plain_forward, action=action, axes=self.axes))
        for name, script in step_plan.programs.scripts.items():
            if name:
                self._install(name, partial(self._emulated, script=script))
        for name in step_plan.programs.quiet:
            self._install(name, quiet_forward)
        self._install_edges(step_plan.programs)
        for module_name in {c.key[1] for b in step_plan.boundaries for c in b if c.key[0] == "out"}:
            module = self.module.get_submodule(module_name)
            self._handles.append(module.register_forward_hook(self._capturing(module_name)))
        if len(self.stages) > 1:
            for stage in self.stages:
                self._hidden[stage.index] = self._hiding(stage, step_plan)

    @property
    def compiled(self) -> dict[str, CompiledBlock]:
        """The compiled blocks of the present step's plan, by name."""
        if self.step_plan is None:
            return self._compiled_alone
        return self._compiled.setdefault(self.step_plan, {})

    def _install_compiled(self, how: Compile) -> None:
        """Let this rank's blocks run compiled: what was installed before is what is traced."""
        made = self.compiled
        tp = self.axes["tp"].group if how.async_tp else None
        selective = self.plan.options.remat == "selective"
        compiler = Compiler(how.backend, selective, tp.group_name if tp is not None else "")
        for i, name in enumerate(self.plan.blocks):
            if not self._is_local(i):
                continue
            block = self.module.get_submodule(name)
            if name not in made:
                made[name] = CompiledBlock(name, block, self.axes, compiler, self._told)
            made[name].forward = block.forward
            self._install(name, partial(_instead, made[name]))

    def _install_edges(self, programs: Programs) -> None:
        for name in {**programs.entries, **programs.exits, **programs.closed}:
            make = partial(
                edged_forward,
                entries=programs.entries.get(name, ()),
                exits=programs.exits.get(name, ()),
                axes=self.axes,
                closed=programs.closed.get(name),
            )
            self._install(name, make)

    def _hiding(self, stage: StagePlan, step_plan: StepPlan) -> list[_Change]:
        """Return what hides from ``stage`` the blocks and parameters of this rank's others."""
        changes: list[_Change] = []
        for i, name in enumerate(self.plan.blocks):
            if self._is_local(i) and not stage.holds(i):
                own = self.module.get_submodule(name).__dict__
                changes.append((own, "forward", self._absent_forward(i, name)))
                # Nor are its hooks called, FSDP's among them, where it does not run.
                changes += [(own, hooks, {}) for hooks in ("_forward_pre_hooks", "_forward_hooks")]
        params = {p.name: p for p in self.plan.params}
        for place in self.places:
            param = params[place.param]
            seen = {*param.homes_of(place.names), *step_plan.borrowed.get(param.name, ())}
            in_block = any(block_of(n, self.plan.blocks) is not None for n in place.names)
            if not in_block and stage.index not in seen:
                absent = placeholder(param, self.plan.options, self.groups.device)
                changes.append((place.module._parameters, place.leaf, None))
                changes.append((place.module.__dict__, place.leaf, absent))
        return changes

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Show the module as on a rank that runs the present stage and no other."""
        changes = self._hidden.get(self.stage.index, [])
        before = [attributes.get(key, _MISSING) for attributes, key, _ in changes]
        for attributes, key, value in changes:
            attributes[key] = value
        try:
            yield
        finally:
            for (attributes, key, _), value in zip(changes, before, strict=True):
                if value is _MISSING:
                    del attributes[key]
                else:
                    attributes[key] = value

    def _uninstall(self) -> None:
        for module, forward in reversed(self._installed):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
        for handle in self._handles:
            handle.remove()
        self._installed, self._handles, self.step_plan = [], [], None
        self._ready = False

    @contextmanager
    def as_written(self, managed: Sequence[nn.Module]) -> Iterator[None]:
        """Show the module as the user wrote it, for planning: no forwards or FSDP hooks of ours."""
        self._uninstall()
        forwards = [(block, block.__dict__.pop("forward")) for block, _ in self._absent_blocks]
        hidden = []
        for module in managed:
            fsdp: Any = module
            state = fsdp._get_fsdp_state()
            hidden.append(_hide(module._forward_pre_hooks, state._pre_forward_hook_handle.id))
            hidden.append(_hide(module._forward_hooks, state._post_forward_hook_handle.id))
        try:
            yield
        finally:
            for block, forward in forwards:
                block.__dict__["forward"] = forward
            for show in hidden:
                show()

    def _install(self, name: str, make: Callable[[nn.Module, Callable[..., Any]], Any]) -> None:
        index = block_of(name, self.plan.blocks)
        if index is not None and not self._is_local(index):
            return
        module = self.module.get_submodule(name)
        self._installed.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = make(module, module.forward)

    def _emulated(
        self, module: nn.Module, original: Callable[..., Any], script: Script
    ) -> Callable[..., Any]:
        """Return a forward that runs the module's own code under ``Emulate``."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            passage = self.passage
            capture = passage.values.__setitem__ if passage is not None else None
            losses = entered() or nullcontext()
            with suspended(), losses, obeying(script, self.axes, capture):
                return original(*args, **kwargs)

        return forward

    def _capturing(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            passage = self.passage
            if passage is None:
                return
            ordinal = passage.counts[name] = passage.counts.get(name, -1) + 1
            for leaf, x in enumerate(tree_leaves(output)):
                if isinstance(x, Tensor):
                    passage.values[("out", name, ordinal, leaf)] = x

        return hook

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Checkpoint this rank's blocks as the options say, until the backwards are done."""
        kind = self.plan.options.remat
        if kind == "selective" and self.plan.options.compile is not None:
            kind = None  # what a compiled block keeps is decided in its graph
        names = [n for i, n in enumerate(self.plan.blocks) if kind and self._is_local(i)]
        blocks = [self.module.get_submodule(name) for name in names]
        before = [block.__dict__.get("forward") for block in blocks]
        for name, block in zip(names, blocks, strict=True):
            assert kind is not None
            buffers = self._buffers_of_blocks.setdefault(name, Buffers(name, block))
            block.__dict__["forward"] = recomputed(block, buffers, kind, self.axes)
        try:
            yield
        finally:
            for block, forward in zip(blocks, before, strict=True):
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = forward

    # --- one microbatch

    def blank(self, stage: StagePlan) -> tuple[Tensor, ...]:
        """Return tensors of any values in the shapes that ``stage`` sends."""
        outgoing, device = self.outgoing(stage), self.groups.device
        specs = outgoing.tensors if outgoing is not None else ()
        return tuple(torch.empty(s.shape, dtype=s.dtype, device=device) for s in specs)

    def run(
        self,
        stage: StagePlan,
        step: Step,
        batch: Any,
        received: tuple[Tensor, ...],
        draws: Forward | None = None,
    ) -> Any:
        """Run the part of ``step`` that is ``stage``, one of this rank's, on one microbatch."""
        self.stage, self.passage = stage, Passage(received, draws=draws)
        self._forget()
        try:
            with _modes_restored():
                return self(step, batch)
        finally:
            self.passage = None
            self._forget()

    def _forget(self) -> None:
        for axis in self.axes.values():
            axis.entered.clear()

    def forward(self, step: Step, batch: Any) -> Any:
        passage = self.passage
        assert passage is not None
        script = self.step_plan.programs.scripts.get("") if self.step_plan is not None else None
        mode: AbstractContextManager[Any] = nullcontext()
        if script is not None:
            mode = obeying(script, self.axes, passage.values.__setitem__)
        how = self.plan.options.compile
        fused = how is not None and how.backend == "inductor"
        narrow = self.at_end and (fused or script is not None)
        losses = NarrowLosses(fused=fused) if narrow else nullcontext()
        passage.watched = narrow or script is not None
        try:
            with self._alone(), losses, mode:
                try:
                    output = step(self.module, batch)
                except BaseException:
                    self._leaving(self, (), None)  # a block that raised has not left
                    raise
        except StageExit as exit:
            self._follow(passage, None)
            return exit.outputs
        self._follow(passage, None)
        if isinstance(mode, Emulate):
            mode.check_complete()
        if not self.at_end:
            raise AssertionError("the step ended before the next stage's first block")
        return self._whole(output)

    def _whole(self, output: Any) -> Any:
        """Gather what the step returns split."""
        outputs = self.step_plan.output if self.step_plan is not None else ()
        if all(layout.replicated for layouts in outputs for layout in layouts):
            return output
        leaves, spec = tree_flatten(output)
        for i, layouts in enumerate(outputs):
            for axis, layout in zip(reversed(AXES), reversed(layouts), strict=True):
                if layout.dim is not None:
                    leaves[i] = gather(leaves[i], layout, self.axes[axis])
        return tree_unflatten(spec, leaves)


def _instead(block: CompiledBlock, module: nn.Module, original: Callable[..., Any]) -> Any:
    return block


def _axes(plan: Plan, groups: MeshGroups) -> dict[str, Axis]:
    sizes = groups.sizes
    balanced = sizes.cp > 1 and plan.options.context_parallel.balance
    return {
        "cp": Axis("cp", groups.cp, groups.cp_rank, sizes.cp, balanced, summed=True),
        "tp": Axis("tp", groups.tp, groups.tp_rank, sizes.tp),
    }


def _hide(hooks: MutableMapping[int, Any], ours: int) -> Callable[[], None]:
    """Take the hook ``ours`` out; return what puts it back in its place.

    The user's code may register and remove others meanwhile.
    """
    before = dict(hooks)
    hooks.pop(ours, None)

    def show() -> None:
        kept = {k: hook for k, hook in before.items() if k == ours or k in hooks}
        added = {k: hook for k, hook in hooks.items() if k not in before}
        hooks.clear()
        hooks.update(kept | added)

    return show


def _boundary(values: tuple[Crossing, ...]) -> Boundary:
    return Boundary(tuple(TensorSpec(c.local_shape, c.dtype, c.requires_grad) for c in values))


@contextmanager
def _modes_restored() -> Iterator[None]:
    """Leave the stack of torch-function modes as it was, also when the user's code raises."""
    before = pause()
    resume(before)
    try:
        yield
    finally:
        resume(before)

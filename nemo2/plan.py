"""The plan: the frozen result of analysis, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .edges import check_blocks, context_entries, exits_needed, shared_gathers
from .errors import Nemo2Error, ShardingError
from .lengths import find_lengths
from .limits import check_limits, check_module, check_same_path
from .mesh.sizes import MeshSizes
from .options import Options
from .pipeline.absent import Absent
from .pipeline.balance import block_costs
from .pipeline.microbatch import first_microbatch
from .pipeline.stages import (
    Crossing,
    StagePlan,
    block_names,
    block_of,
    check_microbatches,
    crossings,
    expected_stages,
    module_order,
    ranks_of,
    split_blocks,
    stage_of,
)
from .places import Place, places
from .planning import planning, run_step, uncollected
from .pytree import tree_map
from .randomness import Randomness, key_dropout
from .record import Recorder
from .record_calls import Setting
from .repeats import Numbers, Repeats
from .sharding.annotate import Mark, check, collect
from .sharding.layout import REPLICATED, Layout, Sharding
from .sharding.prove import Prover, prove, vary_mixed
from .sharding.scripts import Programs
from .trace import BlockOutput, Trace


@dataclass(frozen=True)
class ParamPlan:
    """Where one parameter lives.

    Attributes:
        name: its first name in the unsplit model; ``aliases`` are the names it is tied to.
        shape: global shape; ``local_shape``: of one tensor-parallel rank, before FSDP.
        tp_dim: dim split over ``tp``, or None; ``dp_dim``: dim that FSDP splits, or None when it
            stays whole (zero-dimensional, or shared by blocks).
        homes: the stage of each of its names, ``name`` first; ``stages`` are these in order, more
            than one when it is tied across them; ``ranks`` the pipeline ranks that hold it, the
            first stage's rank (its *owner*) first.
        dtype: as users and optimizers see it; a run may compute in another.
        parts: sizes of the parts of a fused ``tp_dim``, each split alone, or None.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    tp_dim: int | None
    dp_dim: int | None
    homes: tuple[int, ...]
    ranks: tuple[int, ...]
    parts: tuple[int, ...] | None = None

    @property
    def tp_layout(self) -> Layout:
        return REPLICATED if self.tp_dim is None else Layout.fused(self.tp_dim, self.parts)

    @property
    def stages(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.homes)))

    def homes_of(self, names: Iterable[str]) -> frozenset[int]:
        """Return the stages of a place that has these names."""
        by_name = dict(zip((self.name, *self.aliases), self.homes, strict=True))
        return frozenset(by_name[name] for name in names)


@dataclass(frozen=True)
class StepPlan:
    """What one kind of step needs: known once a step and a batch are.

    Attributes:
        programs: forwards and scripts for tensor parallelism.
        partial: parameters whose gradient is summed over ``tp`` at the end of a step.
        boundaries: what crosses from each stage to the next.
        blocks: what each block returns, for the stages where it is absent.
        borrowed: parameters used on stages that do not hold them: name -> stages (the same
            rank may run a stage that holds them).
        output: per leaf of the step's result, its layout.
        randomness: which calls draw random numbers, and how.
        called: the blocks that the step calls, in order.
    """

    programs: Programs
    partial: frozenset[str]
    boundaries: tuple[tuple[Crossing, ...], ...]
    blocks: Mapping[int, BlockOutput]
    borrowed: Mapping[str, tuple[int, ...]]
    output: tuple[Sharding, ...]
    trace: Trace
    randomness: Randomness
    called: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The frozen analysis of a model on a mesh; ``str(plan)`` prints it as tables."""

    sizes: MeshSizes
    options: Options
    params: tuple[ParamPlan, ...]
    blocks: tuple[str, ...]
    stages: tuple[StagePlan, ...]
    step: StepPlan | None = None
    derived: tuple[tuple[str, str, str], ...] = ()

    def __str__(self) -> str:
        from .explain import tables

        return tables(self)

    @property
    def alone(self) -> bool:
        """Whether one rank holds the whole model, whose code may then take any path."""
        return self.sizes.tp == self.sizes.pp == self.sizes.cp == 1

    @cached_property
    def whole(self) -> Plan:
        """This plan for steps on whole sequences: ``cp`` coordinates run batches of their own."""
        sizes, options = replace(self.sizes, cp=1), replace(self.options, sequence_parallel=False)
        return replace(self, sizes=sizes, options=options)

    def param(self, name: str) -> ParamPlan:
        return next(p for p in self.params if p.name == name)

    def stages_of(self, rank: int) -> tuple[StagePlan, ...]:
        """Return the stages that a pipeline rank runs: several when they are interleaved."""
        return tuple(s for s in self.stages if s.rank == rank)


def plan(
    model: nn.Module,
    mesh: DeviceMesh | Mapping[str, int] | str,
    *,
    step: Callable[[nn.Module, Any], Any] | None = None,
    batch: Any = None,
    **options: Any,
) -> Plan:
    """Return the plan of ``model`` on ``mesh``; nothing is changed, moved or communicated.

    Args:
        model: an annotated module, on any device, meta included.
        mesh: a ``DeviceMesh``, or sizes such as ``{"tp": 2}`` or ``"dp=2,tp=2"``.
        step: ``step(model, batch)``, the loss function or a forward; with ``batch`` (one dp
            coordinate's, real or of the same shapes) the plan also covers activations.
        options: those of ``parallelize``.

    Communication: none; needs no process group and no GPU.
    Raises: ShardingError, PipelineError or Nemo2Error that list all problems found.

    >>> import torch, nemo2
    >>> net = torch.nn.Linear(4, 8)
    >>> _ = nemo2.shard(net.weight, "tp", dim=0)
    >>> nemo2.plan(net, "tp=2").param("weight").local_shape
    (4, 4)
    """
    check_module(model, "plan")
    sizes = MeshSizes.of(mesh)
    options.pop("inplace", None)
    resolved = Options.resolve(sizes, **options)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    notes = collect(model).on(sizes.tp, shapes)
    blocks = block_names(model, notes.blocks, sizes)
    if resolved.pipeline.schedule == "interleaved":
        check_microbatches(resolved.pipeline.microbatches, sizes.pp)
    if resolved.remat is not None and not blocks:
        raise Nemo2Error(
            f"remat={resolved.remat!r} recomputes the blocks of a model, and none are annotated\n"
            '  options: shard(self.layers, "pp") on their list, with pp=1 too | remat=None'
        )
    if resolved.compile is not None and not blocks:
        raise Nemo2Error(
            "compile=True compiles the blocks of a model, and none are annotated\n"
            '  options: shard(self.layers, "pp") on their list, with pp=1 too | compile=False'
        )
    costs = block_costs(model, blocks, _tp_size(model, notes.marks, sizes.tp))
    stages = split_blocks(costs, sizes.pp, resolved.pipeline)
    params = _plan_params(model, notes.marks, notes.aliases, blocks, stages, sizes)
    result = Plan(sizes, resolved, params, blocks, stages, derived=notes.derived)
    if step is not None:
        part = first_microbatch(batch, resolved.pipeline.microbatches)
        part = tree_map(resolved.cast, part)
        result = replace(result, step=plan_step(result, model, step, part))
    return result


def _tp_size(
    model: nn.Module, marks: Mapping[str, tuple[Mark, ...]], degree: int
) -> Callable[[Tensor], int]:
    """Return a function of a parameter: how many of its elements one rank has."""
    split = {
        id(p)
        for name, p in model.named_parameters()
        if any(m.axis == "tp" and m.dim is not None for m in marks[name])
    }
    return lambda p: p.numel() // degree if id(p) in split else p.numel()


def _plan_params(
    model: nn.Module,
    marks: Mapping[str, tuple[Mark, ...]],
    aliases: Mapping[str, tuple[str, ...]],
    blocks: tuple[str, ...],
    stages: tuple[StagePlan, ...],
    sizes: MeshSizes,
) -> tuple[ParamPlan, ...]:
    problems: list[str] = []
    plans = []
    order = module_order(model)
    for name, param in model.named_parameters():
        shape = tuple(param.shape)
        problems += _problems(name, shape, marks[name], sizes)
        by_axis = {m.axis: m for m in marks[name]}
        tp_dim = by_axis["tp"].dim if "tp" in by_axis and sizes.tp > 1 else None
        names = (name, *aliases[name])
        # FSDP2 gathers each block as a unit, and cannot split what several units hold.
        shared = len({block_of(n, blocks) for n in names}) > 1
        dp_dim = None if shared or not shape else by_axis["dp"].dim if "dp" in by_axis else 0
        homes = expected_stages(order, names, blocks, stages)
        plans.append(
            ParamPlan(
                name,
                aliases[name],
                shape,
                Layout(tp_dim).local_shape(shape, sizes.tp),
                param.dtype,
                param.requires_grad,
                tp_dim,
                dp_dim,
                homes,
                ranks_of(homes, stages),
                by_axis["tp"].parts if tp_dim is not None else None,
            )
        )
    if problems:
        raise ShardingError("\n".join(problems))
    return tuple(plans)


def _problems(
    name: str, shape: tuple[int, ...], marks: tuple[Mark, ...], sizes: MeshSizes
) -> list[str]:
    problems = [p for m in marks for p in check(name, shape, m.axis, m.dim, m.parts)]
    if problems:
        return problems
    axes = [m.axis for m in marks]
    if len(set(axes)) < len(axes) or (None in axes and len(axes) > 1):
        shown = " and ".join(f"({m})" for m in marks)
        return [
            f"annotations of '{name}' disagree: {shown}\n  options: annotate it once for each axis"
        ]
    for m in marks:
        if m.axis == "tp" and m.dim is not None and sizes.tp > 1:
            odd = [p for p in m.parts or () if p % sizes.tp]
            if odd:
                problems.append(
                    f"cannot shard '{name}' with parts={m.parts} on tp={sizes.tp}:"
                    f" {odd[0]} % {sizes.tp} = {odd[0] % sizes.tp}\n"
                    "  options: a tp that divides each part | leave it replicated"
                )
            elif shape[m.dim] % sizes.tp:
                problems.append(_indivisible(name, shape, m.dim, sizes.tp))
    return problems


def _indivisible(name: str, shape: tuple[int, ...], dim: int, tp: int) -> str:
    size = shape[dim]
    fits = [n for n in range(1, min(size, 64) + 1) if size % n == 0]
    other = next((d for d, s in enumerate(shape) if d != dim and s % tp == 0), None)
    alternative = f" | dim={other} ({shape[other]} divides)" if other is not None else ""
    return (
        f"cannot shard '{name}' on mesh axis 'tp' along dim {dim}\n"
        f"  global shape {shape}, dim {dim} = {size}; tp degree {tp}; {size} % {tp} = {size % tp}\n"
        f"  options: tp in {{{', '.join(map(str, fits))}}}{alternative}"
        f" | pad dim {dim} to {-(-size // tp) * tp}"
    )


@uncollected()
def plan_step(
    plan: Plan,
    model: nn.Module,
    step: Callable[[nn.Module, Any], Any],
    batch: Any,
    where: Sequence[Place] | None = None,
    device: torch.device | None = None,
) -> StepPlan:
    """Plan the activations of one step: run it once with every parameter absent.

    Args:
        batch: one microbatch, in the dtypes that a run gives it.
        where: the places of parameters in ``model``; found when it is unsplit.
        device: what user code sees as the parameters' device; cpu by default.

    Raises: the errors of ``staging``: glue that reads values, blocks called twice or out of
        order, and in-place writes that no layout allows, each with the user's line.
    """
    by_name = {p.name: p for p in plan.params}
    where = places(model) if where is None else where
    home = _home(model) if device is None else device
    ordered = plan.sizes.pp > 1 or plan.sizes.cp > 1
    blocks = {n: i for i, n in enumerate(plan.blocks)} if ordered else {}

    def absent(name: str, local: bool = False) -> Absent:
        param = by_name[name]
        dtype = plan.options.compute_dtype(param.dtype)
        out = Absent.like(param.local_shape if local else param.shape, dtype, home)
        out.param, out.needs_grad = name, param.trainable
        out.layouts = (REPLICATED, param.tp_layout)
        return out

    split = plan.sizes.cp * plan.sizes.tp > 1
    numbers = Numbers(model, plan.blocks)

    def record(setting: Setting, given: Any = batch) -> Trace:
        setting = replace(setting, by_module=split)
        recorder = Recorder(setting, blocks)
        recorder.repeats = Repeats(plan.blocks, numbers)
        with planning(model, where, absent, recorder), numbers.watched():
            return run_step(lambda: step(model, given), recorder)

    def attempt(prover: Prover) -> str | None:
        prover.repeats = Repeats(plan.blocks, numbers, prover.apart)
        own = planning(model, where, lambda name: absent(name, local=True), prover)
        with own, numbers.watched():
            return prover.attempt(lambda: step(model, batch))

    setting, trace = _settle(plan, batch, record)
    setting = replace(setting, by_module=split)
    check_limits(plan, trace)
    randomness = key_dropout(trace, batch, lambda given: record(Setting(), given))
    randomness = replace(randomness, own=(*randomness.own, *trace.notes.draws))
    boundaries = crossings(trace, plan.stages)
    captured = {c.key for b in boundaries for c in b}
    mixed = [n for n in trace.partial_uses if n in trace.full_uses]
    vary_mixed(trace, mixed)
    programs = prove(trace, setting, blocks, captured, attempt)
    borrowed: dict[str, tuple[int, ...]] = {}
    for name, uses in trace.param_uses.items():
        missing = sorted({stage_of(p, plan.stages) for p in uses} - set(by_name[name].stages))
        if missing:
            borrowed[name] = tuple(missing)
    return StepPlan(
        programs,
        frozenset(trace.partial_uses) - frozenset(mixed),
        boundaries,
        trace.blocks,
        borrowed,
        trace.output_layouts,
        trace,
        randomness,
        trace.blocks_called(plan.blocks),
    )


def _settle(plan: Plan, batch: Any, record: Callable[..., Trace]) -> tuple[Setting, Trace]:
    """Plan the layouts of a step: what splits the sequence, where it is joined again."""
    sizes, options = plan.sizes, plan.options
    check_blocks(plan.blocks, sizes.cp)
    alone = sizes.cp == 1 and (sizes.tp == 1 or options.sequence_parallel is False)
    lengths = None if alone else find_lengths(batch, lambda given: record(Setting(), given))
    setting = Setting((sizes.cp, sizes.tp), attention=options.context_parallel.method)
    if lengths is None:
        if sizes.cp > 1 or (options.sequence_parallel and sizes.tp > 1):
            raise _no_sequence(plan)
        return setting, record(setting)
    scatter = sizes.tp > 1 and options.sequence_parallel is not False
    setting = replace(setting, scatter=scatter, sequence=lengths.calls)
    if sizes.cp > 1:
        balance = options.context_parallel.balance
        tp = sizes.tp if scatter else 1
        entries = context_entries(lengths, plan.blocks[0], sizes.cp, tp, balance)
        setting = replace(setting, entries=entries)
    trace = record(setting)
    check_same_path(plan, lengths.trace, trace)
    if plan.blocks:
        exits = exits_needed(trace, plan.blocks[-1])
        if exits:
            setting = replace(setting, exits=exits)
            trace = record(setting)
    shared = shared_gathers(trace)
    if shared:
        both = {e: (*setting.entries.get(e, ()), *own) for e, own in shared.items()}
        setting = replace(setting, entries={**setting.entries, **both})
        trace = record(setting)
    return setting, trace


def _no_sequence(plan: Plan) -> ShardingError:
    asked = f"cp={plan.sizes.cp}" if plan.sizes.cp > 1 else "sequence_parallel=True"
    return ShardingError(
        f"{asked}: the step was run on a shorter batch to find which dims are the sequence, and"
        " could not be\n"
        "  options: batches whose first tensor is (batch, sequence, ...), and code that takes any"
        f" length | {'cp=1' if plan.sizes.cp > 1 else 'sequence_parallel=None'}"
    )


def _home(model: nn.Module) -> torch.device:
    """Return the device that user code will see: that of the parameters, or cpu when on meta."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None or first.is_meta else first.device

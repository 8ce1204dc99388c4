"""The plan as tables: what is where, what crosses, which collectives run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING

from .communication import boundary_bytes, collectives, data_parallel
from .options import DataParallel
from .pipeline.stages import block_of
from .plan import ParamPlan, Plan, StepPlan
from .randomness import Randomness

if TYPE_CHECKING:
    from .model import ParallelModel


def explain(model_or_plan: ParallelModel | Plan) -> str:
    """Return the plan of a model as text: parameters, stages, boundaries, collectives.

    >>> import torch, nemo2
    >>> print(nemo2.explain(nemo2.plan(torch.nn.Linear(4, 8), "dp=2")).splitlines()[0])
    mesh pp=1 dp=2 cp=1 tp=1 (2 ranks), data_parallel=fsdp, microbatches=1, schedule=1f1b
    """
    if isinstance(model_or_plan, Plan):
        return tables(model_or_plan)
    return "\n\n".join([tables(model_or_plan.plan), *_compiled(model_or_plan)])


def _compiled(model: ParallelModel) -> list[str]:
    """Return how this rank's blocks run, when they are to be compiled."""
    blocks = model.runner.compiled
    if not blocks:
        return []
    states: dict[tuple[str, str], int] = {}
    for name, block in blocks.items():
        key = _family(name), block.state
        states[key] = states.get(key, 0) + 1
    rows = [(name, count, state) for (name, state), count in states.items()]
    return [table("compiled blocks of this rank", ("blocks", "count", "how they run"), rows)]


def tables(plan: Plan) -> str:
    """Return ``plan`` as text tables; a table row stands for all blocks that are alike."""
    options = plan.options
    head = (
        f"mesh {plan.sizes} ({plan.sizes.world} ranks), "
        f"data_parallel={_kind(options.data_parallel)}, "
        f"microbatches={options.pipeline.microbatches}, schedule={options.pipeline.schedule}"
    )
    if options.pipeline.virtual_stages > 1:
        head += f", virtual_stages={options.pipeline.virtual_stages}"
    if options.precision is not None:
        head += f", precision={options.precision}"
    if options.remat is not None:
        head += f", remat={options.remat}"
    if options.compile is not None:
        head += f", compile={options.compile.backend}"
        head += ", async_tp" if options.compile.async_tp else ""
    parts = [
        head,
        "weights and buffers: copied from the first rank of the mesh; those on meta are drawn by"
        " module name, the same on any mesh",
        _parameters(plan),
        _derived(plan),
        _stages(plan),
    ]
    parts.append(_data_parallel(plan))
    if plan.step is None:
        parts.append(
            "activations: planned at the first call, or with plan(model, mesh, step=..., batch=...)"
        )
    else:
        parts += [_boundaries(plan, plan.step), _collectives(plan, plan.step), _modules(plan.step)]
        parts.append(_randomness(plan.step.randomness))
    return "\n\n".join(p for p in parts if p)


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return rows as aligned text under a title."""
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([title, lines[0], "  " + "  ".join("-" * w for w in widths), *lines[1:]])


def _family(name: str) -> str:
    """Return a name with its block numbers replaced, the same for all blocks that are alike."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def placement(param: ParamPlan, plan: Plan) -> str:
    """Return how a parameter is placed, for example ``tp: Shard(0), dp: Shard(0)``."""
    tp = "Replicate()" if param.tp_dim is None else f"Shard({param.tp_dim})"
    split = plan.options.data_parallel.shards(plan.sizes) > 1 and param.dp_dim is not None
    dp = f"Shard({param.dp_dim})" if split else "Replicate()"
    parts = [f"tp: {tp}"] if plan.sizes.tp > 1 else []
    if plan.sizes.dp * plan.sizes.cp > 1:
        parts += ["replicate: Replicate()"] if plan.options.data_parallel.replicate > 1 else []
        parts.append(f"dp: {dp}")
    return ", ".join(parts) or "whole"


def _kind(options: DataParallel) -> str:
    parts = [options.kind]
    parts += [f"replicate={options.replicate}"] if options.replicate != 1 else []
    parts += [f"reshard={options.reshard}"] if options.reshard != "auto" else []
    return " ".join(parts)


def _parameters(plan: Plan) -> str:
    groups: dict[tuple[str, ...], list[ParamPlan]] = {}
    for p in plan.params:
        key = (
            _family(p.name),
            str(p.shape),
            str(p.local_shape),
            str(p.dtype),
            placement(p, plan),
            str(p.trainable),
        )
        groups.setdefault(key, []).append(p)
    rows = []
    for (name, shape, local, dtype, where, _), same in groups.items():
        first = same[0]
        count = f" x{len(same)}" if len(same) > 1 else ""
        stages = sorted({s for p in same for s in p.stages})
        notes = [f"tied to {', '.join(first.aliases)}"] if first.aliases else []
        notes += [] if first.trainable else ["frozen"]
        shown = f"{stages[0]}-{stages[-1]}" if len(stages) > 1 else stages[0]
        rows.append(
            (
                name + count,
                dtype.removeprefix("torch."),
                shape,
                where,
                local,
                shown,
                "; ".join(notes),
            )
        )
    total = sum(prod(p.shape) for p in plan.params)
    header = ("name", "dtype", "global shape", "placement", "local (tp)", "stage", "")
    return table(f"parameters: {total:,}", header, rows)


def _derived(plan: Plan) -> str:
    """Say which annotations are not the user's, and what they come from."""
    if not plan.derived:
        return ""
    counted = Counter((_family(name) or "(model)", what, why) for name, what, why in plan.derived)
    rows = [(f"{n} x{k}" if k > 1 else n, what, why) for (n, what, why), k in counted.items()]
    return table("derived annotations", ("name", "annotation", "why"), rows)


def _stages(plan: Plan) -> str:
    several = len(plan.stages) > plan.sizes.pp
    rows: list[tuple[object, ...]] = []
    for stage in plan.stages:
        names = plan.blocks[stage.first : stage.last + 1]
        blocks = f"{names[0]} .. {names[-1]} ({len(names)})" if names else "(whole model)"
        held = [p for p in plan.params if stage.index in p.stages]
        outside = [p.name for p in held if block_of(p.name, plan.blocks) is None]
        count = sum(prod(p.shape) for p in held)
        local = sum(prod(p.local_shape) for p in held)
        listed = ", ".join(outside[:4]) + (" ..." if len(outside) > 4 else "")
        chunk = (stage.index // plan.sizes.pp,) if several else ()
        shown = listed if plan.blocks else ""
        rows.append((stage.index, stage.rank, *chunk, blocks, f"{count:,}", f"{local:,}", shown))
    chunk_header = ("chunk",) if several else ()
    sizes = ("parameters", "on a rank (tp)", "outside blocks")
    return table("stages", ("stage", "rank", *chunk_header, "blocks", *sizes), rows)


def _boundaries(plan: Plan, step: StepPlan) -> str:
    if len(plan.stages) == 1:
        return ""
    rows = []
    for i, (boundary, nbytes) in enumerate(zip(step.boundaries, boundary_bytes(plan), strict=True)):
        for c in boundary:
            source = (
                f"{c.key[1]}[{c.key[3]}]"
                if c.key[0] == "out"
                else f"torch call {c.key[1]} of the step"
            )
            grad = "gradient returns" if c.requires_grad else "no gradient"
            rows.append(
                (
                    f"{i} -> {i + 1}",
                    source,
                    c.local_shape,
                    str(c.dtype).removeprefix("torch."),
                    f"{nbytes:,}",
                    grad,
                )
            )
    text = table(
        "boundaries, for one microbatch",
        ("stages", "value", "local shape", "dtype", "bytes", ""),
        rows,
    )
    for name, stages in step.borrowed.items():
        held = plan.param(name).ranks
        lent = [s for s in stages if plan.stages[s].rank not in held]
        if lent:
            text += (
                f"\n  '{name}' is used on stage {', '.join(map(str, lent))} and lent there each"
                " step: register its module where it is used to save that"
            )
    return text


def _collectives(plan: Plan, step: StepPlan) -> str:
    counted = Counter(
        (
            c.axis,
            _family(c.module) or "(step)",
            c.call,
            c.direction,
            c.kind,
            c.shape,
            c.dtype,
            c.nbytes,
        )
        for c in collectives(step.trace, plan.blocks, plan.options.remat)
    )
    rows: list[tuple[object, ...]] = [
        (axis, module, call, direction, kind, count, shape, f"{nbytes * count:,}")
        for (axis, module, call, direction, kind, shape, _, nbytes), count in counted.items()
    ]
    rows += [
        ("tp", n, "", "end of step", "all-reduce of gradient", 1, plan.param(n).local_shape, "")
        for n in sorted(step.partial)
    ]
    rows += _end_of_step(plan)
    header = ("axis", "module", "call", "when", "collective", "count", "shape", "bytes")
    return table("collectives, for one microbatch (end of step: once)", header, rows)


def _data_parallel(plan: Plan) -> str:
    """List what a rank of each stage communicates over ``dp`` in a step."""
    rows: list[tuple[object, ...]] = []
    what = {
        "all-gather": ("of parameters", "before use"),
        "reduce-scatter": ("of gradients", "during backward"),
        "all-reduce": ("of gradients", "during backward"),
    }
    for stage in plan.stages:
        counted = Counter(
            (_family(c.unit) or "(outside blocks)", c.kind, c.count, c.elements, c.nbytes)
            for c in data_parallel(plan, stage.index)
        )
        for (unit, kind, count, elements, nbytes), units in counted.items():
            of, when = what[kind]
            name = f"{unit} x{units}" if units > 1 else unit
            total = count * units
            row = (stage.index, name, when, f"{kind} {of}", total, elements, f"{nbytes * total:,}")
            rows.append(row)
    if not rows:
        return ""
    header = ("stage", "unit", "when", "collective", "count", "elements", "bytes")
    return table("data-parallel collectives, for one step on one rank", header, rows)


def _end_of_step(plan: Plan) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for p in plan.params:
        if len(p.ranks) > 1:
            rows.append(
                (
                    "pp",
                    p.name,
                    "",
                    "end of step",
                    "all-reduce of tied gradient",
                    1,
                    p.local_shape,
                    "",
                )
            )
    rows.append(("all", "(step)", "", "end of step", "all-reduce of loss and count", 1, (4,), "32"))
    return rows


def _randomness(random: Randomness) -> str:
    """Say which modules' random numbers depend on the mesh, and why."""
    keyed = Counter(_family(name) or "(step)" for name in random.keyed)
    rows = [
        (f"{name} x{n}" if n > 1 else name, "dropout", "keyed, independent of the mesh")
        for name, n in keyed.items()
    ]
    own = Counter((_family(name) or "(step)", call, why) for name, call, why in random.own)
    rows += [
        (f"{name} x{n}" if n > 1 else name, call, f"draws its own numbers: {why}")
        for (name, call, why), n in own.items()
    ]
    return table("random numbers", ("module", "call", ""), rows) if rows else ""


def _modules(step: StepPlan) -> str:
    """Say how each module that tensor parallelism touches runs."""
    groups: dict[tuple[str, str], int] = {}
    for name, action in step.programs.installed.items():
        how = "column-split"
        if action.kind == "rowwise":
            how = f"row-split, then summed over {' and '.join(action.value[1])}"
        elif action.kind == "embedding":
            how = "rows of the table here, then summed over tp"
        key = (_family(name), how)
        if action.kind != "dropout":
            groups[key] = groups.get(key, 0) + 1
    for name in step.programs.scripts:
        if step.programs.scripts[name].only_draws:
            continue
        if name or any(
            a.kind != "call" or a.fixes for a in step.programs.scripts[name].actions.values()
        ):
            groups[
                (_family(name) or "(step)", "own code, sees global sizes (calls translated)")
            ] = 1
    for name in step.programs.proved:
        key = (_family(name), "own code on local tensors, proved equal")
        groups[key] = groups.get(key, 0) + 1
    if not groups:
        return ""
    return table("modules under tp", ("module", "runs"), groups)

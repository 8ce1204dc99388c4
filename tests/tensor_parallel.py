"""Run one module under its plan on real ranks, and compare it with the unsharded module.

This is the smallest runtime that obeys a plan: local shards of the parameters, the planned
forwards and scripts, and the sum of the gradients that the plan calls partial. It has no
data parallelism, no pipeline and no storage: what fails here is a wrong rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo2.pipeline.forwards import edged_forward
from nemo2.plan import Plan, plan
from nemo2.pytree import tensors, tree_leaves
from nemo2.sharding import collectives
from nemo2.sharding.actions import Emulate, Script
from nemo2.sharding.collectives import Axis
from nemo2.sharding.layout import REPLICATED, Layout
from nemo2.sharding.modes import suspended
from nemo2.sharding.scripts import Programs, needing, programs

RTOL = 1e-11  # float64; sums run in another order
Build = Callable[[], nn.Module]


def forward(model: nn.Module, batch: Sequence[Any]) -> Any:
    """The step of all cases: one call of the model."""
    return model(*batch)


def check_build(
    build: Build, batch: Sequence[Any], *, train: bool = True, rtol: float = RTOL
) -> dict[str, Plan]:
    """Compare the sharded with the unsharded run, as proved and with everything emulated.

    Raises: AssertionError that names the value that differs.
    """
    degree, rank = dist.get_world_size(), dist.get_rank()
    axis = Axis("tp", dist.group.WORLD, rank, degree)
    torch.manual_seed(1)
    model = build().double().train(train)
    want = _run(copy.deepcopy(model), batch)
    made = plan(model, f"tp={degree}", step=forward, batch=batch, sequence_parallel=False)
    assert made.step is not None
    names = needing(made.step.trace, soft=True)
    emulated = replace(
        made, step=replace(made.step, programs=programs(made.step.trace, names, set()))
    )
    split = plan(model, f"tp={degree}", step=forward, batch=batch)
    ways = [("proved", made), ("emulated", emulated)]
    if split.step is not None and scatters(split):
        ways.append(("sequence", split))
    for how, chosen in ways:
        got = run_plan(model, chosen, batch, axis)
        _compare(how, want, got, rtol)
    return {"proved": made, "emulated": emulated}


def scatters(made: Plan) -> bool:
    """Say whether sequence parallelism changes anything."""
    assert made.step is not None
    events = (e for a in made.step.trace.root.walk() for e in a.events())
    return any(e.action is not None and e.action.scatter is not None for e in events)


Result = tuple[list[Any], dict[str, Tensor | None], list[Tensor | None]]


def _run(model: nn.Module, batch: Sequence[Any]) -> Result:
    inputs = _inputs(batch)
    out = tree_leaves(forward(model, inputs))
    _objective(out, [REPLICATED] * len(out), None)
    return (
        [x.detach() if isinstance(x, Tensor) else x for x in out],
        {n: p.grad for n, p in model.named_parameters()},
        [x.grad for x in tensors(inputs)],
    )


def run_plan(model: nn.Module, made: Plan, batch: Sequence[Any], axis: Axis) -> Result:
    """Run ``model`` on this rank as ``made`` says; outputs and gradients come back whole."""
    step = made.step
    assert step is not None
    local = shard_model(model, made, axis)
    inputs = _inputs(batch)
    with applied(local, step.programs, axis):
        for _ in range(2):  # a second step must not see anything of the first
            local.zero_grad()
            for x in tensors(inputs):
                x.grad = None
            with root_of(step.programs, axis):
                out = tree_leaves(forward(local, inputs))
            _objective(out, [layouts[1] for layouts in step.output], axis)
    whole = [_whole(x, step.output[i][1], axis) for i, x in enumerate(out)]
    grads = {n: p.grad for n, p in local.named_parameters()}
    for param in made.params:
        grad = grads[param.name]
        if param.name in step.partial:
            zero = torch.zeros(param.local_shape, dtype=torch.float64)
            grads[param.name] = collectives.all_reduce(zero if grad is None else grad, axis)
        elif param.tp_dim is not None and grad is not None:
            grads[param.name] = collectives.all_gather(grad, param.tp_dim, axis)
    return whole, grads, [x.grad for x in tensors(inputs)]


def shard_model(model: nn.Module, made: Plan, axis: Axis) -> nn.Module:
    """Return a copy of ``model`` whose parameters are this rank's shards; ties stay ties."""
    local = copy.deepcopy(model)
    dims = {p.name: p.tp_dim for p in made.params}
    names = {id(p): n for n, p in local.named_parameters()}
    shards: dict[int, nn.Parameter] = {}
    for module in local.modules():
        for param in module._parameters.values():
            if param is not None and id(param) not in shards:
                data = _take(param.detach(), dims[names[id(param)]], axis).clone()
                shards[id(param)] = nn.Parameter(data, requires_grad=param.requires_grad)
        module._parameters.update(
            {k: p if p is None else shards[id(p)] for k, p in module._parameters.items()}
        )
    return local


@contextmanager
def applied(model: nn.Module, todo: Programs, axis: Axis) -> Iterator[None]:
    """Put the planned forwards around those of the modules that need them."""
    modules = dict(model.named_modules())
    scripts = {n: s for n, s in todo.scripts.items() if n}
    scripts |= {n: Script(n, (a.name,), {0: a}, {}) for n, a in todo.installed.items()}
    wrapped = {n: _emulated(modules[n].forward, s, axis) for n, s in scripts.items()}
    wrapped |= {n: _quiet(modules[n].forward) for n in todo.quiet}
    for n in {**todo.entries, **todo.exits}:
        inner = wrapped.get(n, modules[n].forward)
        edges = todo.entries.get(n, ()), todo.exits.get(n, ())
        wrapped[n] = edged_forward(modules[n], inner, *edges, {"tp": axis})
    with ExitStack() as undo:
        undo.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        for name, planned in wrapped.items():
            module = modules[name]
            own = module.__dict__.get("forward")
            module.__dict__["forward"] = planned
            undo.callback(module.__dict__.pop, "forward")
            if own is not None:
                undo.callback(module.__dict__.__setitem__, "forward", own)
        yield


def _emulated(original: Callable[..., Any], script: Script, axis: Axis) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with suspended(), Emulate(script, {"tp": axis}) as mode:
            out = original(*args, **kwargs)
        assert mode.count == len(script.calls), (script.module, mode.count, script.calls)
        return out

    return forward


def _quiet(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with suspended():
            return original(*args, **kwargs)

    return forward


@contextmanager
def root_of(todo: Programs, axis: Axis) -> Iterator[None]:
    """Run the step itself under its script, if it has one."""
    script = todo.scripts.get("")
    if script is None:
        yield
        return
    with Emulate(script, {"tp": axis}) as mode:
        yield
    assert mode.count == len(script.calls), ("", mode.count, script.calls)


def _inputs(batch: Sequence[Any]) -> list[Any]:
    return [
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in batch
    ]


def _objective(out: list[Any], layouts: Sequence[Layout], axis: Axis | None) -> None:
    """Backward from all outputs with fixed random gradients; this rank gives its part."""
    roots, grads = [], []
    for i, (x, layout) in enumerate(zip(out, layouts, strict=True)):
        if isinstance(x, Tensor) and x.requires_grad:
            shape = list(x.shape)
            if axis is not None and layout.dim is not None:
                shape[layout.dim] = shape[layout.dim] * axis.degree - layout.stored(0)
            seeded = torch.Generator().manual_seed(i)
            grad = torch.rand(shape, generator=seeded, dtype=torch.float64).to(x.dtype)
            roots.append(x)
            split = axis is not None and layout.dim is not None
            grads.append(collectives.split(grad, layout, axis) if split else grad)
    if roots:
        torch.autograd.backward(roots, grads)


def _compare(how: str, want: Result, got: Result, rtol: float) -> None:
    for i, (w, g) in enumerate(zip(want[0], got[0], strict=True)):
        if isinstance(w, Tensor):
            _close(f"{how}: output {i}", w, g, rtol)
        else:
            assert w == g, (how, i, w, g)
    for name, w in want[1].items():
        _close(f"{how}: gradient of {name}", w, got[1][name], rtol)
    for i, (w, g) in enumerate(zip(want[2], got[2], strict=True)):
        _close(f"{how}: gradient of input {i}", w, g, rtol)


def _close(what: str, want: Tensor | None, got: Tensor | None, rtol: float) -> None:
    if want is None:
        assert got is None or not got.any(), f"{what}: {got} where none is due"
        return
    assert got is not None, f"{what} is missing"
    assert want.shape == got.shape, f"{what}: {got.shape}, not {want.shape}"
    assert want.dtype == got.dtype, f"{what}: {got.dtype}, not {want.dtype}"
    rtol = max(rtol, 0.0 if want.dtype == torch.float64 else 1e-5)
    if not want.numel():
        return
    wide = torch.complex128 if want.is_complex() else torch.float64
    scale = float(want.detach().to(wide).abs().max())
    error = float((want.to(wide) - got.to(wide)).abs().max())
    assert error <= rtol * max(scale, 1.0), f"{what} differs by {error:.2g} of {scale:.2g}"


def _take(x: Tensor, dim: int | None, axis: Axis) -> Tensor:
    return x if dim is None else collectives.take(x, dim, axis).contiguous()


def _whole(x: Any, layout: Layout, axis: Axis) -> Any:
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    return x if layout.dim is None else collectives.gather(x, layout, axis)

"""The parity certificate: a model on a mesh against the same model on one device."""

from __future__ import annotations

import copy
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from .errors import Nemo2Error, PipelineError
from .functional import global_norm, value_and_grad
from .limits import check_module
from .mesh import MeshSizes, make_mesh
from .options import Options
from .parallelize import parallelize
from .pipeline.losses import checked_loss
from .pipeline.microbatch import split_batch
from .pytree import tree_map
from .randomness import Randomness
from .sharding.annotate import annotate

if TYPE_CHECKING:
    from .model import ParallelModel
    from .sharding.storage import Entry

_RTOL = {torch.float64: 1e-9, torch.float32: 1e-5}
_EPS = {torch.float64: 1e-6}  # of AdamW: a gradient of zero must not become a step of lr


@dataclass(frozen=True)
class Row:
    """One compared quantity: its size on one device, the largest error of any rank, the bound."""

    name: str
    size: float
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return 0 <= self.error <= self.bound


@dataclass(frozen=True)
class Report:
    """What ``verify`` found; ``str(report)`` is a table."""

    mesh: str
    dtype: torch.dtype
    rtol: float
    loss: Row
    norm: Row
    gradients: tuple[Row, ...]
    weights: tuple[Row, ...]
    note: str = ""

    @property
    def ok(self) -> bool:
        return all(row.ok for row in (self.loss, self.norm, *self.gradients, *self.weights))

    @property
    def first(self) -> str | None:
        """The first quantity that differs: the loss, else a parameter, in the model's order."""
        rows = (self.loss, *self.gradients, self.norm, *self.weights)
        return next((row.name for row in rows if not row.ok), None)

    def __str__(self) -> str:
        bad = [r for r in (self.loss, *self.gradients, self.norm, *self.weights) if not r.ok]
        head = f"verify on {self.mesh}, {self.dtype}, rtol {self.rtol:g}: " + (
            "equal to one device" if self.ok else f"DIFFERS, first in {self.first}"
        )
        worst = max(self.gradients, key=lambda r: r.error / r.bound, default=None)
        shown = bad[:12] if bad else [self.loss, self.norm, *([worst] if worst else [])]
        width = max((len(r.name) for r in shown), default=0)
        lines = [head, f"  {'':{width}}  {'one device':>12}  {'error':>10}  {'bound':>10}"]
        for r in shown:
            error = f"{r.error:10.2e}" if r.error >= 0 else "   missing"
            mark = "" if r.ok else "  <--"
            lines.append(f"  {r.name:{width}}  {r.size:12.6g}  {error}  {r.bound:10.2e}{mark}")
        if len(bad) > len(shown):
            lines.append(f"  ... and {len(bad) - len(shown)} more")
        sizes = f"{len(self.gradients)} gradients and {len(self.weights)} weights"
        counts = f"  {sizes} after AdamW compared"
        return "\n".join([*lines, counts, *([f"  note: {self.note}"] if self.note else [])])


def verify(
    build: Callable[[], nn.Module],
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], Any],
    mesh: DeviceMesh | Mapping[str, int] | str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    rules: Mapping[str, Any] | None = None,
    rtol: float | None = None,
    **options: Any,
) -> Report:
    """Compare loss, every gradient, the global norm and the weights after one AdamW step.

    Uses the running process group when there is one (all its ranks call ``verify``), else
    starts the processes itself; then ``build``, ``loss_fn`` and ``batch`` must pickle.

    Args:
        build: returns the (annotated) model; called under a fixed seed.
        batch: the *global* batch; each dp coordinate gets its equal part of the first dim.
        loss_fn: as for ``value_and_grad``.
        mesh: a mesh or its sizes.
        dtype: of the model and of float tensors of the batch. In float64 the model's own casts
            to float32 (in norms, losses) are widened too, so that rounding hides nothing.
        rules: given to ``annotate`` first.
        rtol: bound on ``|g - r| <= rtol |r| + rtol |all| / sqrt(number of parameters)``;
            1e-9 in float64, 1e-5 in float32, else 1e-2; with ``precision="bf16"`` 5e-2.
        options: those of ``parallelize``. With ``precision`` the model on one device computes in
            it, too, on copies of parameters that it keeps in ``dtype``.

    Returns:
        the same ``Report`` on every rank.

    Communication: that of a step and a few small reductions over the world.
    """
    job = _Job(build, batch, loss_fn, device, dtype, rules, rtol, options)
    if dist.is_initialized():
        running = mesh if isinstance(mesh, DeviceMesh) else None
        return job.run(running or _mesh_of(MeshSizes.of(mesh), device))
    sizes = MeshSizes.of(mesh)
    if sizes.world > 1:
        return _spawn(job, sizes)
    report = job.run(_mesh_of(sizes, device))
    dist.destroy_process_group()
    return report


def _mesh_of(sizes: MeshSizes, device: str) -> DeviceMesh:
    return make_mesh(dp=sizes.dp, pp=sizes.pp, cp=sizes.cp, tp=sizes.tp, device=device)


@dataclass(frozen=True)
class _Job:
    build: Callable[[], nn.Module]
    batch: Any
    loss_fn: Callable[[nn.Module, Any], Any]
    device: str
    dtype: torch.dtype
    rules: Mapping[str, Any] | None
    rtol: float | None
    options: Mapping[str, Any]

    def run(self, mesh: DeviceMesh) -> Report:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
            check_module(model, "verify")
            model = _widest(model, self.dtype)
        if self.rules is not None:
            annotate(model, self.rules)
        parallel = parallelize(model, mesh, **self.options)
        parallel.train(model.training)
        home = parallel.groups.device
        whole = tree_map(lambda x: _cast(x, self.dtype, home), self.batch)
        alone = copy.deepcopy(model).to(home)
        low = parallel.plan.options.precision is not None
        rtol = self.rtol or (5e-2 if low else _RTOL.get(self.dtype, 1e-2))
        with _widened_again() if self.dtype is torch.float64 else nullcontext():
            report = compare(parallel, alone, whole, self._loss_fn, rtol)
        if not report.loss.ok and not report.note:
            return self._explain_mean(report, parallel, model.to(home), whole)
        return report

    def _loss_fn(self, model: nn.Module, batch: Any) -> Any:
        """Call the user's loss; what nemo2 itself casts is not widened, and would be seen."""
        with _Wide() if self.dtype is torch.float64 else nullcontext():
            return self.loss_fn(model, batch)

    def _explain_mean(
        self, report: Report, parallel: ParallelModel, alone: nn.Module, whole: Any
    ) -> Report:
        """Say when the loss is the mean of the parts' means, whose counts differ."""
        with torch.no_grad():
            parts = split_batch(
                whole, parallel.plan.sizes.dp * parallel.plan.options.pipeline.microbatches
            )
            low = _lowered(alone, parallel.plan.options)
            values = [self._loss_fn(low, tree_map(parallel.plan.options.cast, p)) for p in parts]
        if any(isinstance(v, tuple) for v in values):
            return report
        mean = torch.stack([v.double() for v in values]).mean().item()
        got = report.loss.size + report.loss.error, report.loss.size - report.loss.error
        if min(abs(g - mean) for g in got) > report.rtol * max(abs(mean), 1.0):
            return report
        note = (
            f"the loss equals the mean of {len(parts)} parts' means ({mean:.9g}): either the parts"
            " weigh unequal counts, then return (sum, count) from loss_fn for the exact mean over"
            " the global batch, or the model mixes the samples of a part (batch statistics)"
        )
        return Report(**{**report.__dict__, "note": note})


class _Wide(TorchFunctionMode):
    """Turns the model's own casts to float32 into casts to float64.

    Many models compute norms and losses in float32 whatever their dtype; what they then
    round away in another order would hide, or look like, a real difference.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        return func(
            *wide,
            **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()},
        )


@contextmanager
def _widened_again() -> Iterator[None]:
    """Run under ``_Wide`` what activation checkpoints run again, which torch does without modes."""
    original = checkpoint._checkpoint_without_reentrant_generator

    def generator(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def again(*given: Any, **named: Any) -> Any:
            with _Wide():
                return fn(*given, **named)

        return original(again, *args, **kwargs)

    checkpoint._checkpoint_without_reentrant_generator = generator
    try:
        yield
    finally:
        checkpoint._checkpoint_without_reentrant_generator = original


def _widest(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model; complex tensors stay complex (``Module.to`` drops their imaginary parts)."""
    pairs = {torch.float64: torch.complex128, torch.float32: torch.complex64}

    def cast(x: Tensor) -> Tensor:
        if x.is_complex():
            return x.to(pairs.get(dtype, x.dtype))
        return x.to(dtype) if x.is_floating_point() else x

    model._apply(cast)  # type: ignore[no-untyped-call]
    return model


def _cast(x: Any, dtype: torch.dtype, device: torch.device) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def compare(
    parallel: ParallelModel,
    alone: nn.Module,
    whole: Any,
    loss_fn: Callable[[nn.Module, Any], Any],
    rtol: float,
) -> Report:
    """Run one training step on both and compare; ``whole`` is the global batch on the device.

    With dropout, the one device is a mesh of one, whose masks are those of any mesh.
    Both take one AdamW step: ``parallel`` and ``alone`` are changed.
    """
    groups, names = parallel.groups, [p.name for p in parallel.plan.params]
    own = split_batch(whole, groups.sizes.dp, "dp")[groups.dp_rank]
    value, grads = value_and_grad(loss_fn, parallel)(parallel.params, own, step=1)
    step_plan = parallel.runner.step_plan
    random = step_plan.randomness if step_plan is not None else Randomness()
    if random.keyed:
        loss, reference = _step_on_one(alone, whole, loss_fn, parallel)
    else:
        loss, reference = _step_alone(alone, whole, loss_fn, parallel.plan.options)
    norm = global_norm(grads, parallel)
    errors = {
        n: _error(g, reference[n], parallel.storage.entries[n], parallel) for n, g in grads.items()
    }
    for name, param in parallel.params.items():
        if param.requires_grad and alone.get_parameter(name).grad is not None:
            param.grad = grads[name]
    eps = _EPS.get(next(alone.parameters()).dtype, 1e-2)
    torch.optim.AdamW(alone.parameters(), lr=1e-2, eps=eps).step()
    torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=eps).step()
    weights = {n: p.detach() for n, p in alone.named_parameters()}
    after = {
        n: _error(p, weights[n], parallel.storage.entries[n], parallel)
        for n, p in parallel.params.items()
    }
    total = math.sqrt(sum(float(g.double().square().sum()) for g in reference.values()))
    share = rtol * total / math.sqrt(len(names))
    scalars = {"loss": abs(float(value) - float(loss)), "gradient norm": abs(float(norm) - total)}
    worst = _worst_of_all_ranks([errors, after, scalars], [names, names, list(scalars)], parallel)
    floor = torch.finfo(value.dtype).tiny
    loss_rtol = max(rtol, 4 * torch.finfo(value.dtype).eps)  # of a loss computed in less precision
    return Report(
        str(parallel.plan.sizes),
        next(alone.parameters()).dtype,
        rtol,
        Row("loss", float(loss), worst[2]["loss"], loss_rtol * max(abs(float(loss)), 1e-30)),
        Row("gradient norm", total, worst[2]["gradient norm"], rtol * total + floor),
        tuple(_row(n, reference[n], worst[0][n], rtol, share + floor) for n in names),
        tuple(_row(f"{n} (weight)", weights[n], worst[1][n], rtol, rtol * 1e-2) for n in names),
        _note(random),
    )


def _note(random: Randomness) -> str:
    notes = ["dropout is on: one device is nemo2 on a mesh of one"] if random.keyed else []
    own = ", ".join(sorted({f"'{module}' {call}" for module, call, _ in random.own}))
    notes += [f"draws its own numbers, on each mesh others: {own}"] if own else []
    return "; ".join(notes)


def _row(name: str, value: Tensor, error: float, rtol: float, floor: float) -> Row:
    size = float(value.double().norm())
    return Row(name, size, error, rtol * size + floor)


def _step_alone(
    model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Any], options: Options
) -> tuple[Tensor, dict[str, Tensor]]:
    low = _lowered(model, options)
    total, count = checked_loss(loss_fn(low, tree_map(options.cast, batch)))
    loss = total / count
    if not loss.requires_grad:
        raise PipelineError("loss_fn returned a loss that depends on no trainable parameter")
    loss.backward()
    for master, copied in zip(model.parameters(), low.parameters(), strict=True):
        master.grad = None if copied.grad is None else copied.grad.to(master.dtype)
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    return loss.detach(), grads


def _step_on_one(
    model: nn.Module, batch: Any, loss_fn: Callable[[nn.Module, Any], Any], parallel: ParallelModel
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the step on a mesh of this rank alone, with the random numbers of ``parallel``.

    Communication: making groups of one rank.
    """
    groups = parallel.groups
    mesh = DeviceMesh(groups.device.type, [groups.rank], mesh_dim_names=("tp",))
    precision = parallel.plan.options.precision
    one = parallelize(model, mesh, data_parallel="ddp", precision=precision)
    one.train(model.training)
    one.draws.seed = parallel.draws.seed
    loss, found = value_and_grad(loss_fn, one)(one.params, batch, step=1)
    grads = {n: g.to_local() for n, g in found.items()}
    for name, param in model.named_parameters():
        if param.requires_grad:
            param.grad = grads[name]
    return loss, grads


def _lowered(model: nn.Module, options: Options) -> nn.Module:
    """Return ``model``, or a copy with parameters in the dtype that a run computes in."""
    if options.precision is None:
        return model
    low = copy.deepcopy(model)
    for param in low.parameters():
        param.data = param.detach().to(options.compute_dtype(param.dtype))
    return low


def _error(value: Tensor, reference: Tensor, entry: Entry, parallel: ParallelModel) -> float:
    """Return the norm of the difference of this rank's part; not finite counts as infinite."""
    from torch.distributed.tensor import Shard

    from .sharding.fused import in_rank_order
    from .sharding.storage import local_of

    part = in_rank_order(reference.detach(), entry.plan, parallel.groups.sizes.tp)
    groups = parallel.storage.mesh.get_all_groups()
    for placement, group in zip(entry.placements, groups, strict=True):
        if isinstance(placement, Shard):
            pieces = part.chunk(group.size(), placement.dim)
            here = group.rank() < len(pieces)
            part = pieces[group.rank()] if here else part.narrow(placement.dim, 0, 0)
    local = local_of(value)
    if local.shape != part.shape:
        return math.inf
    error = float((local.double() - part.double()).norm())
    return error if math.isfinite(error) else math.inf


def _worst_of_all_ranks(
    found: list[dict[str, float]], names: list[list[str]], parallel: ParallelModel
) -> list[dict[str, float]]:
    """Return the largest error of any rank for each name; -1 where no rank holds it."""
    flat = [d.get(n, -1.0) for d, keys in zip(found, names, strict=True) for n in keys]
    values = torch.tensor(flat, dtype=torch.float64, device=parallel.groups.device)
    if parallel.groups.sizes.world > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=parallel.groups.world)
    left = iter(values.tolist())
    return [{n: next(left) for n in keys} for keys in names]


def _spawn(job: _Job, sizes: MeshSizes) -> Report:
    """Run the job in new processes, one for each rank.

    Raises: the Nemo2Error of the first rank that has one.
    """
    from torch.multiprocessing.spawn import ProcessRaisedException, spawn

    try:
        text = pickle.dumps((job, sizes))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise Nemo2Error(
            f"verify starts {sizes.world} processes and cannot send them its arguments: {error}\n"
            "  options: define build and loss_fn at the top level of a module"
            " | call verify under torchrun"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, "report")
        start: Any = spawn  # untyped upstream
        try:
            start(_worker, (sizes.world, text, folder, result), nprocs=sizes.world)
        except ProcessRaisedException:
            for rank in range(sizes.world):
                if os.path.exists(said := f"{result}{rank}"):
                    with open(said, "rb") as file:
                        raise pickle.load(file) from None
            raise
        with open(result, "rb") as file:
            report: Report = pickle.load(file)
    return report


def _worker(rank: int, world: int, text: bytes, folder: str, result: str) -> None:
    job, sizes = pickle.loads(text)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if job.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if job.device == "cuda" else "gloo"
    store = f"file://{os.path.join(folder, 'store')}"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
    try:
        report = job.run(_mesh_of(sizes, job.device))
    except Nemo2Error as error:
        with open(f"{result}{rank}", "wb") as file:
            pickle.dump(error, file)
        raise
    if rank == 0:
        with open(result, "wb") as file:
            pickle.dump(report, file)
    dist.barrier()
    dist.destroy_process_group()

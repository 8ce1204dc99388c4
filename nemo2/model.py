"""``ParallelModel``: a module on a mesh, ready to run, differentiate and optimise."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils.weak import WeakIdKeyDictionary

from .errors import Nemo2Error, PipelineError
from .host_random import host_state, host_state_kept, set_host_state
from .limits import without_gradients
from .mesh.groups import MeshGroups
from .pipeline.absent import NeedsValueError
from .pipeline.identity import flags, identity
from .pipeline.megatron import Chunk, Groups, run_schedule
from .pipeline.microbatch import plan_batch, split_batch
from .pipeline.program import KINDS, Losses, LossKind, Program
from .pipeline.results import from_last_stage
from .pipeline.runner import StageRunner, Step
from .pipeline.stages import block_of
from .places import Place
from .plan import Plan, StepPlan, plan_step
from .planning import unfused_layers
from .pytree import tree_flatten, tree_unflatten
from .recurrent import follow_weights
from .sharding.borrow import Loan, give_back, lent, make_loans
from .sharding.data_parallel import DataParallelRun
from .sharding.dropout import Forward, begin, drawing, seed_of
from .sharding.fused import in_rank_order
from .sharding.reduce import gradient, norm_of, reduce_gradients, scale_gradients
from .sharding.state import copy_into, gather_buffers, gather_params, whole_if_fused
from .sharding.storage import Storage, local_of, refuse_uses_outside
from .skipping import SkipWatch


class ParallelModel(nn.Module):
    """A module split over a mesh; made by ``parallelize``.

    Attributes:
        params: original name -> DTensor parameter, those of this rank's stage.
        plan: the frozen analysis, printable.
        mesh: the ``DeviceMesh``.
        dealt: whether the samples of the global batch are dealt out to dp coordinates one by one
            (as samplers do), instead of in parts; only dropout asks for their numbers.
    """

    runner: StageRunner
    managed: list[nn.Module]
    places: tuple[Place, ...]

    def __init__(
        self,
        runner: StageRunner,
        plan: Plan,
        groups: MeshGroups,
        storage: Storage,
        managed: list[nn.Module],
        ties: dict[str, dist.ProcessGroup],
        mesh: DeviceMesh,
        seed: int,
        places: Sequence[Place],
    ) -> None:
        super().__init__()
        self.__dict__["runner"] = runner  # not a submodule: parameter names stay the original ones
        self.__dict__["managed"] = managed
        self.plan, self.mesh, self.groups, self.storage = plan, mesh, groups, storage
        self.ties, self.seed, self.steps, self.dealt = ties, seed, 0, False
        self.__dict__["places"] = tuple(places)
        follow_weights(self.module)
        self._data_parallel = DataParallelRun(plan, runner, managed, storage, groups)
        self._step_plans: OrderedDict[Any, tuple[StepPlan | None, bool]] = OrderedDict()
        self._loss_kinds: Any = WeakIdKeyDictionary()  # of the steps of several stages
        self._loans_made: dict[Any, list[Loan]] = {}
        self._known_flags: tuple[bool, ...] | None = None  # of the module, while they stay the same

    # --- what nn.Module users expect, under original names

    @property
    def module(self) -> nn.Module:
        """The user's module, with this rank's parameters."""
        return self.runner.module

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return {e.name: e.view for e in self.storage}

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (original name, DTensor parameter) of this rank's stage."""
        for name, param in self.params.items():
            yield f"{prefix}.{name}" if prefix else name, param

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_buffers(prefix, recurse, remove_duplicate)

    def train(self, mode: bool = True) -> ParallelModel:
        super().train(mode)
        self.module.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ParallelModel:
        raise Nemo2Error(
            "a parallel model cannot be moved or cast: its memory is laid out on the mesh\n"
            "  options: cast or move the model before parallelize"
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return original name -> DTensor or buffer of this rank's stage, sharing memory.

        Fused projections (``parts``) that ``tp`` splits come as whole copies, for their order.

        Communication: gathers fused projections over tp and dp; else none.
        """
        params = {e.name: whole_if_fused(e, self.storage, self.groups) for e in self.storage}
        return params | self._persistent_buffers()

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the whole model's state on every rank, loadable into the unsplit module.

        Buffers are those of the rank to which they belong, as in checkpoints. What need not be
        gathered shares memory with the model.

        Communication: gathers each parameter over tp and dp, then shares them over stages; an
            all-gather of objects over the world, and a broadcast of each buffer.
        """
        params = gather_params(self.storage, self.plan, self.groups)
        return params | gather_buffers(self.module, self.plan, self.groups)

    def _persistent_buffers(self) -> dict[str, Tensor]:
        persistent = self.module.state_dict()
        return {n: b for n, b in self.module.named_buffers() if n in persistent}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Copy values under original names: this model's ``state_dict``, or whole tensors.

        Communication: none.
        """
        own = {e.name for e in self.storage} | self._persistent_buffers().keys()
        known = {n for p in self.plan.params for n in (p.name, *p.aliases)}
        known.update(n for n, _ in self.module.named_buffers())
        missing, unknown = sorted(own - state_dict.keys()), sorted(state_dict.keys() - known)
        if assign or (strict and (missing or unknown)):
            lost = f"missing {missing[:4]}, unknown {unknown[:4]}"
            why = (
                "assign=True would replace memory that is laid out on the mesh" if assign else lost
            )
            raise Nemo2Error(
                f"cannot load this state: {why}\n  options: the names of state_dict(), or of the"
                " unsplit model | strict=False | nemo2.load for checkpoints"
            )
        with torch.no_grad():
            for entry in self.storage:
                value = state_dict.get(entry.name)
                if isinstance(value, DTensor):
                    entry.view.copy_(value)
                elif value is not None:
                    whole = in_rank_order(value, entry.plan, self.groups.sizes.tp)
                    copy_into(entry.view, whole)
            for name, buffer in self.module.named_buffers():
                if name in state_dict:
                    buffer.copy_(state_dict[name])
        return _IncompatibleKeys(missing, unknown)

    def __deepcopy__(self, memo: Any) -> ParallelModel:
        raise self._no_copy("copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._no_copy("pickled")

    def _no_copy(self, what: str) -> Nemo2Error:
        return Nemo2Error(
            f"a parallel model cannot be {what}: its memory and its groups belong to the mesh\n"
            "  options: full_state_dict() for the unsplit module | nemo2.save | copies of what"
            " model.params holds, for averages"
        )

    def load_full_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy whole tensors, under original names, into this rank's parts."""
        self.load_state_dict({**self._persistent_buffers(), **state})

    # --- running

    def forward(self, *args: Any, broadcast_output: bool = False, **kwargs: Any) -> Any:
        """Run the module forward on this dp coordinate's batch, without gradients.

        Returns:
            the module's output on the last stage, gathered over tp; ``None`` elsewhere, or
            with ``broadcast_output=True`` the output on every stage.

        Communication: that of a forward; broadcast over ``pp`` when asked for.
        """
        self._check_parameters()

        def step(module: nn.Module, batch: Any) -> Any:
            return module(*batch[0], **batch[1])

        outputs = self.run_forward(step, (args, kwargs), key=("forward",))
        output = outputs[0] if outputs else None
        output = self.from_last_stage(output) if broadcast_output else output
        trains = torch.is_grad_enabled() and any(e.view.requires_grad for e in self.storage)
        return without_gradients(output) if trains else output

    def run_forward(
        self, step: Step, batch: Any, *, key: Any = None, microbatches: int = 1
    ) -> list[Any]:
        """Run ``step(module, batch)`` forward only; its results on the last stage, else []."""
        parts = [self._to_device(b) for b in split_batch(batch, microbatches)]
        with torch.no_grad():
            return self._schedule(step, parts, forward_only=True, key=key)

    def run_whole(self, step: Step, parts: Sequence[Any], *, key: Any) -> list[Any]:
        """Run ``step`` forward on microbatches of any sequences, of this dp and cp coordinate.

        No sequence is split, over ``cp`` or ``tp``. Returns the results on the last stage, else [].
        """
        with torch.no_grad():
            given = [self._to_device(part) for part in parts]
            return self._schedule(step, given, forward_only=True, key=key, plan=self.plan.whole)

    @contextmanager
    def inferring(self) -> Iterator[None]:
        """Prepare parameters for many forwards once: the live ones, unchanged until the end.

        Communication: under ``fsdp`` the first forward's gathers, and none after it.
        """
        self._check_parameters()
        self.storage.follow_freezing()
        self._known_flags = flags(self.module)
        try:
            with self.storage.computing(), self._data_parallel.holding():
                yield
        finally:
            self._known_flags = None

    def plan_forward(self, step: Step, part: Any, *, key: Any, plan: Plan) -> StepPlan | None:
        """Return the plan of a forward on one microbatch; None where it needs none."""
        self.storage.follow_freezing()
        with torch.no_grad(), self.storage.computing(), unfused_layers():
            part = self._to_device(part)
            return self._plan_for(step, part, key, plan, forward_only=True)[0]

    def from_last_stage(self, value: Any) -> Any:
        """Return the last stage's ``value`` on every stage; tensors as values, without a graph.

        Communication: over ``pp`` one broadcast of an object, and one of its tensors.
        """
        if len(self.plan.stages) == 1:
            return value
        return from_last_stage(value, self.groups)

    def backward(self, loss_fn: Step, batch: Any) -> Tensor:
        """Add the gradient of the loss to each parameter's ``.grad`` and return the loss.

        Args:
            loss_fn: ``loss_fn(module, batch)`` gets the user's own module; returns a mean, or
                ``(sum, count)`` for an exact mean when counts differ.
            batch: this dp coordinate's part of the global batch.

        Returns:
            the global loss, the same on every rank.
        """
        loss, _ = self.run_backward(loss_fn, batch)
        for entry in self.storage:
            grad = gradient(entry)
            if grad is None:
                continue
            if entry.view.grad is None:
                entry.view.grad = entry.wrap(grad, self.storage.mesh)
            else:
                local_of(entry.view.grad).add_(grad)
            entry.compute.grad = None
        return loss

    def run_backward(
        self,
        loss_fn: Step,
        batch: Any,
        *,
        step: int | None = None,
        has_aux: bool = False,
        key: Any = None,
    ) -> tuple[Tensor, list[Any]]:
        """Run all microbatches forward and backward; leaves reduced gradients on the entries.

        Returns the global loss and, on the last stage, what each loss_fn returned beside it.
        ``key`` says when two calls are the same step; by default the function does.
        """
        self._check_parameters()
        if not callable(loss_fn):
            raise Nemo2Error(
                f"backward(loss_fn, batch): loss_fn is a {type(loss_fn).__name__}, no function\n"
                "  options: model.backward(lambda model, batch: ..., batch)"
            )
        if torch.is_inference_mode_enabled():
            raise Nemo2Error(
                "backward inside of torch.inference_mode, whose tensors have no gradients\n"
                "  options: call it outside | model(...) for a forward"
            )
        for entry in self.storage:
            entry.compute.grad = None
        sizes, microbatches = self.groups.sizes, self.plan.options.pipeline.microbatches
        number = microbatches * sizes.dp
        losses = Losses(loss_fn, has_aux, sizes.cp, number if self._divides_means else 1)
        parts = [self._to_device(b) for b in split_batch(batch, microbatches)]
        self.steps = self.steps + 1 if step is None else step
        with torch.enable_grad():
            self._schedule(losses, parts, forward_only=False, key=key or identity(loss_fn))
        loss, scale = self._global_loss(losses, number)
        step_plan = self.runner.step_plan
        partial = step_plan.partial if step_plan is not None else frozenset()
        planned = step_plan is not None and step_plan.trace.complete and not self._alone
        used = frozenset(step_plan.trace.param_uses) if step_plan is not None and planned else None
        reduce_gradients(self.storage, self.groups, partial, self.ties, used)
        give_back(self._loans(step_plan), self.storage, self.groups, partial)
        if scale is not None:
            scale_gradients(self.storage, scale)
        return loss, losses.aux

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that the global norm is at most ``max_norm``; return the norm.

        Communication: one all-reduce of a scalar over the world.
        """
        grads = {n: p.grad for n, p in self.params.items() if p.grad is not None}
        norm = norm_of(grads, self.storage, self.groups)
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for grad in grads.values():
            local = local_of(grad)
            local.mul_(scale.to(local.dtype))
        return norm

    def _schedule(
        self,
        step: Step,
        parts: list[Any],
        *,
        forward_only: bool,
        key: Any,
        plan: Plan | None = None,
    ) -> list[Any]:
        groups, runner = self.groups, self.runner
        self.storage.follow_freezing()
        with self.storage.computing(), ExitStack() as stack:
            stack.enter_context(unfused_layers())
            step_plan, may_skip = self._plan_for(
                step, parts[0], key, plan or self.plan, forward_only=forward_only
            )
            runner.use(step_plan)
            if not forward_only:
                stack.enter_context(runner.recomputing())
            stack.enter_context(lent(self._loans(step_plan), self.places, self.storage, groups))
            stack.enter_context(self._seeded())
            stack.enter_context(
                self._data_parallel.running(may_skip=may_skip, forward_only=forward_only)
            )
            alike = step_plan is not None and self._draws_alike(step_plan)
            begin = partial(self._begin, _size_of(parts[0]), len(parts), {}, alike)
            chunks = [
                Chunk(
                    Program(runner, stage, step, parts, forward_only, begin),
                    runner.incoming(stage),
                    runner.outgoing(stage),
                )
                for stage in runner.stages
            ]
            # Interleaved rounds must be full; only a forward may come with less.
            microbatches = len(parts)
            if len(chunks) > 1:
                microbatches += -len(parts) % groups.sizes.pp
            results = run_schedule(
                chunks,
                microbatches=microbatches,
                pp_group=groups.pp if groups.sizes.pp > 1 else None,
                pp_rank=groups.pp_rank,
                pp_size=groups.sizes.pp,
                device=groups.device,
                forward_only=forward_only,
                no_sync=self._data_parallel.no_sync if self._data_parallel.active else None,
                groups=Groups(groups.tp, groups.cp, groups.dp_cp),
                schedule=self.plan.options.pipeline.schedule,
            )
        return results[: len(parts)]

    def _plan_for(
        self, step: Step, batch: Any, key: Any, plan: Plan, *, forward_only: bool
    ) -> tuple[StepPlan | None, bool]:
        """Return the step's plan, made at the first call for these shapes, or None if not needed.

        And whether dp ranks may skip blocks.
        """
        alone = _is_alone(plan)
        switches = flags(self.module) if self._known_flags is None else self._known_flags
        still: Any = None
        if alone and not self.managed:
            still = (key, switches, torch.is_grad_enabled())
            trains = any(m.training for m in self.module.modules())
            if not trains or still in self._step_plans:  # it draws nothing
                return None, False
        leaves, spec = tree_flatten(batch)
        shapes = tuple(
            (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else _hashable(x) for x in leaves
        )
        full = (key, spec, shapes, switches, torch.is_grad_enabled())
        if full not in self._step_plans:
            made, may_skip = self._plan_step(step, batch, plan)
            if not forward_only and made is not None and made.trace.complete:
                cast("Losses", step).check(made.trace.output)
            if still and made is not None and not made.randomness.keyed:
                full = still
            if alone and made is not None and not made.randomness.keyed:
                made = None
            self._step_plans[full] = made, may_skip
            while len(self._step_plans) > 64:
                self._step_plans.popitem(last=False)
        return self._step_plans[full]

    def _plan_step(self, step: Step, batch: Any, plan: Plan) -> tuple[StepPlan | None, bool]:
        """Plan a step; only one that is alone on its mesh may read values before its end."""
        alone = _is_alone(plan)
        blocks = [self.module.get_submodule(name) for name in self.plan.blocks]
        with self.runner.as_written(self.managed), host_state_kept():
            watch = SkipWatch(blocks)

            def watched(module: nn.Module, given: Any) -> Any:
                with watch:
                    return step(module, given)

            try:
                made = plan_step(plan, self.module, watched, batch, self.places, self.groups.device)
            except NeedsValueError:
                if not alone:
                    raise
                return None, watch.may_skip
            except Exception:  # if it is the user's, the run itself raises it
                if not alone or self.managed:
                    raise
                return None, False
        if self.managed:
            refuse_uses_outside(made.trace, self.plan)
        self._warn_of_draws(made)
        return made, watch.may_skip

    def _loans(self, step_plan: StepPlan | None) -> list[Loan]:
        """Return the loans of a step, made once for each set of borrowed parameters."""
        if step_plan is None or not step_plan.borrowed:
            return []
        key = tuple(sorted(step_plan.borrowed.items()))
        if key not in self._loans_made:
            self._loans_made[key] = make_loans(
                step_plan.borrowed, self.plan, self.places, self.groups
            )
        return self._loans_made[key]

    @cached_property
    def _divides_means(self) -> bool:
        """Whether each mean is divided by the number of losses before its backward.

        That spares a pass over the gradients. In 16 bits the number is rounded, so gradients in 16
        bits are divided themselves.
        """
        return not any(p.dtype in (torch.bfloat16, torch.float16) for p in self.plan.params)

    def _global_loss(self, losses: Losses, number: int) -> tuple[Tensor, Tensor | float | None]:
        """Return the global mean loss, and what gradients are to be multiplied by, if anything.

        Values stay on the device: that they are not read lets the host run ahead. The loss is NaN
        if some dp ranks returned means and others pairs.

        Args:
            number: of losses in the global batch.

        Communication: one all-reduce of five numbers over the world.
        """
        device = self.groups.device
        if self.runner.last and self.groups.tp_rank == 0 and self.groups.cp_rank == 0:
            totals = losses.totals(device)
        else:
            totals = torch.zeros(5, dtype=torch.float64, device=device)
        if self.groups.sizes.world > 1:
            dist.all_reduce(totals, group=self.groups.world)
        total, count, kinds, pairs, ranks = totals.unbind()
        kind = losses.kind if len(self.plan.stages) == 1 else self._kind_for(losses, kinds / ranks)
        dtype = kind.dtype
        if self.plan.options.precision is not None:  # a mean over much more than one value
            dtype = torch.promote_types(dtype, torch.float32)
        wrong = (count == 0) | ((pairs != 0) & (pairs != ranks))
        loss = torch.where(wrong, torch.nan, total / count).to(dtype)
        if kind.pair:
            return loss, torch.where(count == 0, 0.0, 1 / count)
        return loss, None if self._divides_means else 1 / number

    def _kind_for(self, losses: Losses, kinds: Tensor) -> LossKind:
        """Return the kind of a step's losses, which only the last stage sees; others ask once.

        Raises: PipelineError on the last stage when it is not what it was.
        """
        step_plan = self.runner.step_plan
        assert step_plan is not None
        if step_plan not in self._loss_kinds:
            self._loss_kinds[step_plan] = KINDS[round(float(kinds))]
        known: LossKind = self._loss_kinds[step_plan]
        if self.runner.last and losses.kind.pair != known.pair:
            says = ("a mean", "(sum, count)")
            raise PipelineError(
                f"loss_fn returned {says[losses.kind.pair]}, and {says[known.pair]} in an earlier"
                " step like this one, by which the other stages go\n"
                "  options: (sum, count) in all steps | a mean in all steps"
            )
        return known

    @property
    def _alone(self) -> bool:
        return _is_alone(self.plan)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Keep the user's generators as they are; each microbatch draws from its own seed."""
        devices = [self.groups.device] if self.groups.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), drawing():
            yield

    def seed_for(self, stage: int, microbatch: int) -> int:
        """Return the seed of torch's generators, for what is not keyed dropout."""
        return seed_of(self.seed, self.steps, (self.groups.dp_rank, stage, microbatch))

    def _begin(
        self,
        size: int,
        count: int,
        begun: dict[int, Any],
        alike: bool,
        stage: int,
        microbatch: int,
    ) -> Forward | None:
        """Start the random numbers of one forward, of one of ``count`` microbatches of ``size``.

        Args:
            begun: microbatch -> the states of Python's and NumPy's generators when this rank began
                it: its other stages draw the same.
            alike: whether all stages draw the same numbers.
        """
        if len(self.runner.stages) > 1:
            if microbatch in begun:
                set_host_state(begun[microbatch])
            else:
                begun[microbatch] = host_state()
        plan = self.runner.step_plan
        if not self.module.training and (plan is None or not plan.randomness.keyed):
            return None
        dp_rank, dp = self.groups.dp_rank, self.groups.sizes.dp
        first, stride = (dp_rank * count + microbatch) * size, 1
        if self.dealt:
            first, stride = microbatch * size * dp + dp_rank, dp
        coordinates = (dp_rank, 0 if alike else stage, microbatch)
        return begin(self.seed, self.steps, coordinates, first, stride)

    def _draws_alike(self, plan: StepPlan) -> bool:
        """Say whether all stages draw the same numbers, as code outside of blocks needs them.

        A step's noise goes into the model on the first stage and into the loss on the last. Not
        where blocks draw as well, which would draw the same on all stages; nor where a rank must
        tell the forwards of its stages apart by their seeds, to run parts of them again.
        """
        if len(self.plan.stages) == 1 or not plan.randomness.own:
            return False
        outside = self._drawn_outside(plan)
        again = len(self.runner.stages) > 1 and self.plan.options.remat is not None
        return len(outside) == len(plan.randomness.own) and not again

    def _drawn_outside(self, plan: StepPlan) -> list[str]:
        """Return the calls outside of blocks that draw numbers without positions."""
        blocks = self.plan.blocks
        own = plan.randomness.own
        return [call for module, call, _ in own if block_of(module, blocks) is None]

    def _warn_of_draws(self, plan: StepPlan) -> None:
        outside = self._drawn_outside(plan)
        if len(self.plan.stages) > 1 and outside and not self._draws_alike(plan):
            warnings.warn(
                f"the step draws random numbers outside of blocks ({outside[0]}), and stages draw"
                " different ones, as blocks draw some of their own or run again: right for what"
                " one stage alone uses\n"
                "  options: draw them where the batch is made | in a block",
                stacklevel=2,
            )

    def _to_device(self, batch: Any) -> Any:
        device = self.groups.device
        leaves, spec = tree_flatten(batch)
        moved = [
            self.plan.options.cast(x.to(device, non_blocking=True)) if isinstance(x, Tensor) else x
            for x in leaves
        ]
        return tree_unflatten(spec, moved)

    def _check_parameters(self) -> None:
        """Refuse ways of torch to run with other parameters, which a run would not see."""
        if torch._C._functorch.maybe_current_level() is not None:
            raise Nemo2Error(
                "torch.func transforms over a ParallelModel are not supported:"
                " its gradients cross ranks\n"
                "  options: nemo2.value_and_grad(loss_fn, model)(model.params, batch) | nemo2.grad"
            )
        self.storage.check_places(self)


def _is_alone(plan: Plan) -> bool:
    """Say whether one rank holds the whole model, and its code may take any path."""
    return plan.sizes.tp == plan.sizes.pp == plan.sizes.cp == 1


def _size_of(batch: Any) -> int:
    """Return the number of samples; 0 for a batch that names none, where nothing asks for it."""
    try:
        return plan_batch(batch, 1).size
    except PipelineError:
        return 0


def _hashable(x: Any) -> Any:
    try:
        hash(x)
    except TypeError:
        return repr(x)
    return x

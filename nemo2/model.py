"""``ParallelModel``: a module on a mesh, ready to run, differentiate and optimise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys

from .draws import Draws
from .errors import Nemo2Error
from .limits import without_gradients
from .mesh.groups import MeshGroups
from .pipeline.identity import flags, identity
from .pipeline.losses import GlobalLosses, Losses
from .pipeline.megatron import Chunk, Groups, run_schedule
from .pipeline.microbatch import split_batch
from .pipeline.program import Program
from .pipeline.results import from_last_stage
from .pipeline.runner import StageRunner, Step
from .places import Place
from .plan import Plan, StepPlan
from .planning import unfused_layers
from .pytree import tree_flatten, tree_unflatten
from .recurrent import follow_weights
from .sharding.borrow import Loan, give_back, lent, make_loans
from .sharding.data_parallel import DataParallelRun
from .sharding.fused import in_rank_order
from .sharding.reduce import gradient, norm_of, reduce_gradients, scale_gradients
from .sharding.state import copy_into, gather_buffers, gather_params, whole_if_fused
from .sharding.storage import Storage, local_of
from .step_plans import StepPlans


class ParallelModel(nn.Module):
    """A module split over a mesh; made by ``parallelize``.

    Attributes:
        params: original name -> DTensor parameter, those of this rank's stage.
        plan: the frozen analysis, printable.
        mesh: the ``DeviceMesh``.
        draws: what its runs draw random numbers from.
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
        self.ties, self.draws = ties, Draws(plan, groups, runner, seed)
        self.__dict__["places"] = tuple(places)
        follow_weights(self.module)
        self._data_parallel = DataParallelRun(plan, runner, managed, storage, groups)
        self._step_plans = StepPlans(runner, groups, managed, self.places, self.draws.warn)
        self._losses = GlobalLosses(plan, groups)
        self._loans_made: dict[Any, list[Loan]] = {}

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
        self._step_plans.known_flags = flags(self.module)
        try:
            with self.storage.computing(), self._data_parallel.holding():
                yield
        finally:
            self._step_plans.known_flags = None

    def plan_forward(self, step: Step, part: Any, *, key: Any, plan: Plan) -> StepPlan | None:
        """Return the plan of a forward on one microbatch; None where it needs none."""
        self.storage.follow_freezing()
        with torch.no_grad(), self.storage.computing(), unfused_layers():
            part = self._to_device(part)
            return self._step_plans.find(step, part, key, plan)[0]

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
        losses = self._losses.begin(loss_fn, has_aux=has_aux)
        microbatches = self.plan.options.pipeline.microbatches
        rounds = self.groups.sizes.pp if len(self.runner.stages) > 1 else 1  # interleaved
        split = split_batch(batch, microbatches, rounds=rounds)
        parts = [self._to_device(b) for b in split]
        self.draws.steps = self.draws.steps + 1 if step is None else step
        with torch.enable_grad():
            self._schedule(losses, parts, forward_only=False, key=key or identity(loss_fn))
        step_plan = self.runner.step_plan
        loss, scale = self._losses.end(losses, step_plan, last=self.runner.last)
        partial = step_plan.partial if step_plan is not None else frozenset()
        planned = step_plan is not None and step_plan.trace.complete and not self.plan.alone
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
            step_plan, may_skip = self._step_plans.find(
                step,
                parts[0],
                key,
                plan or self.plan,
                step.check if isinstance(step, Losses) else None,
            )
            runner.use(step_plan)
            if not forward_only:
                stack.enter_context(runner.recomputing())
            stack.enter_context(lent(self._loans(step_plan), self.places, self.storage, groups))
            begin = stack.enter_context(self.draws.run(parts))
            stack.enter_context(
                self._data_parallel.running(may_skip=may_skip, forward_only=forward_only)
            )
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
            stack.enter_context(self._explained())
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

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what to do about torch's errors of blocks that write into what they are given."""
        try:
            yield
        except RuntimeError as error:
            said, first = str(error), str(error).partition(". ")[0]
            if "RegisterPostBackwardFunction" in said:
                raise Nemo2Error(
                    "a block writes into a tensor that it is given (x += ...), and fsdp and zero1"
                    " need it as it was: " + first + "\n"
                    "  options: x = x + ... | data_parallel='ddp' | dp=1"
                ) from error
            if "modified by an inplace operation" in said and self.plan.options.remat:
                raise Nemo2Error(
                    "backward needs a tensor that was written into; with remat a block must leave"
                    " what it is given as it was, to run again: " + first + "\n"
                    "  options: x = x + ... instead of x += ... | remat=None"
                ) from error
            raise

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

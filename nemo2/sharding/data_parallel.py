"""Data parallelism in a run: when parameters are gathered and gradients are reduced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..mesh.groups import MeshGroups
from ..plan import Plan
from ..pytree import tree_leaves
from .buckets import Buckets
from .modes import suspended
from .reduce import agree
from .storage import Storage

AHEAD = 2  # blocks that are gathered before the first runs


class DataParallelRun:
    """Reduces gradients over ``dp``: FSDP2 those of split parameters, buckets the others.

    FSDP2 expects that all ranks use the same parameters in the same order. Here gradients are
    reduced in one order whatever a rank uses: the blocks last to first, then what is outside of
    them; what this rank has not used is zeros. Parameters that are kept for the step are
    gathered in one order, before anything else of it, so a rank may skip blocks.
    """

    def __init__(
        self,
        plan: Plan,
        runner: nn.Module,
        managed: Sequence[nn.Module],
        storage: Storage,
        groups: MeshGroups,
    ) -> None:
        self.groups = groups
        self.active = groups.dp_cp.size() > 1
        self._plan = plan
        self._runner: Any = runner  # an FSDPModule when there are managed modules
        self._managed: list[Any] = list(managed)
        self._split = [e for e in storage if not e.replicated_over_dp]
        whole = [e for e in storage if e.replicated_over_dp] if self.active else []
        self._buckets = Buckets(whole, groups.dp_cp, groups.device)
        self._kept = self._keeps = plan.options.data_parallel.keeps(
            plan.sizes, plan.options.pipeline
        )
        self._ungathered: list[Any] = []  # of what is kept for the step
        # The first blocks run while the host asks for the others, on ranks that skip them, too.
        for i, module in enumerate(self._managed[:-1]):
            module.register_forward_hook(self._gather_the_rest)
            if i >= AHEAD:
                module.register_forward_pre_hook(self._gather_the_rest, prepend=True)
        self._training = False
        self._used: set[int] = set()  # the split parameters that had a gradient, by id
        self._units: list[Any] = []  # FSDP2's groups of parameters, in the order of reductions
        self._turns: list[int] = []  # those that are trained in this step
        self._reduced = 0  # how many turns this step has seen
        self._waiting: set[int] = set()  # units with gradients, whose turn has not come
        self._waited = False
        for module in (*reversed(self._managed[:-1]), *self._managed[-1:]):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            self._units += _param_groups(module)
        self._reduce = [self._in_order(i, unit) for i, unit in enumerate(self._units)]
        self._backwards = 0  # of microbatches, in this step
        self._in_backward = False
        self._held = False
        if self._managed and not self._kept:
            self._runner.register_forward_hook(self._expect_backward)

    @contextmanager
    def running(self, *, may_skip: bool, forward_only: bool) -> Iterator[None]:
        """Run a schedule inside; when it ends gradients are reduced and shards are left.

        Args:
            may_skip: whether ranks may run different blocks.

        Communication: what FSDP2's hooks and the buckets have not done during the schedule,
            and an all-reduce of a byte for each split parameter.
        """
        if self._held:
            assert forward_only
            yield
            return
        self._used, self._reduced, self._training = set(), 0, not forward_only
        self._waiting, self._waited = set(), False
        self._backwards, self._in_backward = 0, False
        self._turns = [i for i, unit in enumerate(self._units) if _trained(unit)]
        # reshard=True asks for memory; its ranks have to run the same blocks.
        frees = may_skip and self._plan.options.data_parallel.reshard == "auto" and not self._kept
        self._keeps = self._kept or frees
        with self._without_freeing() if frees else self._as_made():
            if self._keeps and self._plan.sizes.pp == 1:
                self._ungathered = [*self._managed[-1:], *self._managed[:-1]]
                self._gather(1 + AHEAD)
            if self._training:
                self._buckets.begin()
                self._listen(True)
            yield
            self._gather()
            if self._training and self._managed:
                self._reduce_the_rest()
        if self._training:
            self._buckets.finish()
            self._forget_unused()

    def _gather(self, count: int | None = None) -> None:
        """Start to gather what is kept for the step, or the first few of it, in one order."""
        count = len(self._ungathered) if count is None else count
        now, self._ungathered = self._ungathered[:count], self._ungathered[count:]
        for module in now:
            module.unshard(async_op=True)

    def _gather_the_rest(self, *_: Any) -> None:
        if self._ungathered:
            with suspended():  # the user's code runs under modes of ours
                self._gather()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep what forwards gather until the end, unless ``reshard=True`` asks for memory.

        Inside all dp ranks run the same forwards, and no backward.
        """
        if not self._managed or self._plan.options.data_parallel.reshard is True:
            yield
            return
        self._training = False
        with self._as_made() if self._kept else self._without_freeing():
            self._held = True
            try:
                yield
            finally:
                self._held = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients unreduced for the time of the context: all but the last backward."""
        self._last_backward(False)
        try:
            yield
        finally:
            self._last_backward(True)

    def _last_backward(self, last: bool) -> None:
        self._listen(last)
        if self._managed:
            self._runner.set_is_last_backward(last)
            if self._keeps:
                self._runner.set_requires_gradient_sync(last)
                self._runner.set_reshard_after_backward(last)

    def _listen(self, on: bool) -> None:
        """Let buckets be launched in the backward; not between the collectives of FSDP2.

        When a bucket is complete may differ between ranks, and they share a group.
        """
        self._buckets.listening = on and not self._managed

    @contextmanager
    def _as_made(self) -> Iterator[None]:
        """Leave nothing gathered, also when the user's code raises."""
        try:
            yield
        finally:
            self._listen(False)
            self._ungathered = []
            for unit in self._units:
                unit.wait_for_unshard()
            for module in self._managed:
                module.reshard()

    @contextmanager
    def _without_freeing(self) -> Iterator[None]:
        """Keep what is gathered for this step only."""
        blocks = self._managed[:-1]
        for module in blocks:
            module.set_reshard_after_forward(False, recurse=False)
        try:
            with self._as_made():
                yield
        finally:
            for module in blocks:
                module.set_reshard_after_forward(True, recurse=False)

    def _in_order(self, index: int, unit: Any) -> Any:
        """Let FSDP2 reduce a unit when it is its turn; return how to reduce it at once.

        A unit without gradients is left for the end of the backward, or of the step when all is
        kept: FSDP2 calls this for what a backward has not reached, too.
        """
        original = unit.post_backward

        def reduce(*args: Any) -> None:
            self._gather_the_rest()
            for param in unit.fsdp_params:
                self._complete(param)
            self._waiting.discard(index)
            self._reduced += 1
            original(*args)

        def post_backward(*args: Any) -> None:
            unit.wait_for_unshard()  # of what was gathered before the step and not used
            if not unit.reduce_grads or not any(map(_has_gradient, unit.fsdp_params)):
                original(*args)
            elif self._turn() == index:
                reduce(*args)
                while self._turn() in self._waiting:
                    self._reduce[self._turn()]()
            else:
                self._waiting.add(index)
                self._waited = True
                unit.reduce_grads = False
                original(*args)
                unit.reduce_grads = True

        unit.post_backward = post_backward
        return reduce

    def _turn(self) -> int:
        return self._turns[self._reduced % len(self._turns)]

    def _complete(self, param: Any) -> None:
        """Note whether FSDP2's parameter has a gradient, and give it zeros if not.

        FSDP2 reduces the gradients that are there, so sizes would differ between ranks. torch
        2.13 has ``set_reduce_scatter_unused_params``, which does not say what was used.
        """
        if _has_gradient(param):
            self._used.add(id(param.sharded_param))
        elif hasattr(param, "_unsharded_param") and param.sharded_param.requires_grad:
            param._unsharded_param.grad = torch.zeros_like(param._unsharded_param)
        if hasattr(param, "_unsharded_param"):
            # In mixed precision some of a unit may have gradients of earlier microbatches, which
            # FSDP2 keeps in the dtype of the reduction, where others have none: one dtype for all.
            param.accumulate_unsharded_grad_if_needed()
            param.to_accumulated_grad_if_needed()

    def _expect_backward(self, runner: nn.Module, args: Any, output: Any) -> None:
        """Let each microbatch's backward end with its reductions, before the next gather."""
        if self._training and not self._keeps:
            for x in tree_leaves(output):
                if isinstance(x, Tensor) and x.requires_grad:
                    x.register_hook(self._begin_backward)  # type: ignore[no-untyped-call]

    def _begin_backward(self, grad: Tensor) -> None:
        if not self._in_backward:
            self._in_backward = True
            Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._in_backward = False
        self._backwards += 1
        self._reduce_up_to(self._backwards)

    def _reduce_up_to(self, passes: int) -> None:
        """Reduce what waits for a unit that this rank has not used, and that unit."""
        while self._reduced < passes * len(self._turns):
            self._waited = True
            self._reduce[self._turn()]()

    def _reduce_the_rest(self) -> None:
        self._reduce_up_to(1 if self._keeps else self._plan.options.pipeline.microbatches)
        if self._waited:
            # Waits for the reductions, as FSDP2 does at the end of a backward.
            self._runner._get_fsdp_state()._root_post_backward_final_callback()

    def _forget_unused(self) -> None:
        """Leave no gradient where no rank had one."""
        entries = [e for e in self._split if e.trainable]
        used = [id(e.compute) in self._used for e in entries]
        agreed = agree(used, self.groups.dp_cp, self.groups.device)
        if all(used):
            return
        for entry, by_any in zip(entries, agreed(), strict=True):
            if not by_any:
                entry.compute.grad = None


def fsdp_params(managed: Sequence[nn.Module]) -> list[Any]:
    """Return FSDP2's own records of the parameters that it splits."""
    return [p for module in managed for group in _param_groups(module) for p in group.fsdp_params]


def _has_gradient(param: Any) -> bool:
    """Say whether FSDP2's parameter has a gradient that is not reduced."""
    if param.unsharded_accumulated_grad is not None:
        return True
    return hasattr(param, "_unsharded_param") and param._unsharded_param.grad is not None


def _trained(unit: Any) -> bool:
    return any(param.sharded_param.requires_grad for param in unit.fsdp_params)


def _param_groups(module: nn.Module) -> list[Any]:
    """Return FSDP2's groups of parameters of a module; none where it has no own parameters."""
    state = cast(Any, module)._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [g for g in [state._fsdp_param_group] if g is not None]  # an early torch 2.11

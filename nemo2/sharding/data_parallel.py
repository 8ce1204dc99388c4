"""Data parallelism in a run: when parameters are gathered and gradients are reduced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, cast

import torch
from torch import nn

from ..mesh.groups import MeshGroups
from ..plan import Plan
from .buckets import Buckets
from .reduce import agree
from .storage import Storage


class Use(Enum):
    """What may differ between dp ranks in a step, because the step reads values of tensors."""

    SAME = "nothing"
    PARAMETERS = "which parameters it uses, in blocks that all ranks run"
    BLOCKS = "which blocks it runs"


class DataParallelRun:
    """Reduces gradients over ``dp``: FSDP2 those of split parameters, buckets the others.

    FSDP2 expects that all ranks use the same parameters. When a step may differ, missing
    gradients are zeros; when blocks may be skipped, too, all is gathered before the step and
    reduced after it, in one order on all ranks.
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
        self._runner: Any = runner  # an FSDPModule when there are managed modules
        self._managed: list[Any] = list(managed)
        self._keeps = plan.options.data_parallel.keeps(plan.sizes, plan.options.pipeline)
        self._split = [e for e in storage if not e.replicated_over_dp]
        whole = [e for e in storage if e.replicated_over_dp] if self.active else []
        self._buckets = Buckets(whole, groups.dp_cp, groups.device)
        self._use = Use.SAME
        self._used: set[int] = set()  # the split parameters that had a gradient, by id
        for module in self._managed:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            for group in _param_groups(module):
                self._complete_before_reducing(group)

    @contextmanager
    def running(self, use: Use, *, forward_only: bool) -> Iterator[None]:
        """Run a schedule inside; gradients are reduced when it ends, and shards are left.

        Communication: in training that of ``Buckets.finish``, and when use may differ one
            all-reduce of a byte for each split parameter; what FSDP2 has not done before.
        """
        self._use, self._used = use, set()
        with self._all_gathered() if use is Use.BLOCKS else self._gathered_by_fsdp():
            if not forward_only:
                self._buckets.begin()
            try:
                yield
            finally:
                self._buckets.listening = False
            if not forward_only and use is Use.BLOCKS:
                self._reduce_all()
        if forward_only:
            for module in self._managed:
                module.reshard()
            return
        self._buckets.finish()
        if use is not Use.SAME:
            self._forget_unused()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients unreduced for the time of the context: all but the last backward."""
        self._last_backward(False)
        try:
            yield
        finally:
            self._last_backward(True)

    def _last_backward(self, last: bool) -> None:
        self._buckets.listening = last
        if self._managed and self._use is not Use.BLOCKS:
            self._runner.set_is_last_backward(last)
            if self._keeps:
                self._reduce_in_backward(last)

    def _reduce_in_backward(self, on: bool) -> None:
        self._runner.set_requires_gradient_sync(on)
        self._runner.set_reshard_after_backward(on)

    @contextmanager
    def _gathered_by_fsdp(self) -> Iterator[None]:
        yield

    @contextmanager
    def _all_gathered(self) -> Iterator[None]:
        """Gather all parameters, and let FSDP2 neither gather, free nor reduce."""
        groups = [g for m in self._managed for g in _param_groups(m)]
        frees = [g._reshard_after_forward for g in groups]
        self._runner.set_is_last_backward(False)
        self._reduce_in_backward(False)
        for module in (self._runner, *self._managed[:-1]):  # as the forward needs them
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard(async_op=True)
        try:
            yield
        finally:
            self._runner.set_is_last_backward(True)
            self._reduce_in_backward(True)
            for module, free in zip(self._managed, frees, strict=True):
                module.set_reshard_after_forward(free, recurse=False)

    def _reduce_all(self) -> None:
        """Reduce the gradients of all FSDP modules, in one order on all ranks."""
        for module in self._managed:
            module.unshard()  # ends the gathers that this rank has not waited for
        self._runner.set_is_last_backward(True)
        self._reduce_in_backward(True)
        # What FSDP2 does at the end of a backward with the modules that it did not reach.
        self._runner._get_fsdp_state()._root_post_backward_final_callback()

    def _complete_before_reducing(self, group: Any) -> None:
        """Let missing gradients of an FSDP2 group be zeros when ranks may differ.

        FSDP2 reduces only the gradients that are there, so sizes would not fit. torch 2.13 has
        ``set_reduce_scatter_unused_params``, which does not say what was used.
        """
        original = group.post_backward

        def post_backward(*args: Any) -> None:
            if self._use is not Use.SAME and group.reduce_grads:
                for param in group.fsdp_params:
                    self._complete(param)
            original(*args)

        group.post_backward = post_backward

    def _complete(self, param: Any) -> None:
        if not hasattr(param, "_unsharded_param") or not param.sharded_param.requires_grad:
            return
        whole = param._unsharded_param
        if whole.grad is not None or param.unsharded_accumulated_grad is not None:
            self._used.add(id(param.sharded_param))
        else:
            whole.grad = torch.zeros_like(whole)

    def _forget_unused(self) -> None:
        """Leave no gradient where no rank had one."""
        entries = [e for e in self._split if e.trainable]
        flags = agree(
            [id(e.compute) in self._used for e in entries], self.groups.dp_cp, self.groups.device
        )
        for entry, used in zip(entries, flags, strict=True):
            if not used:
                entry.compute.grad = None


def _param_groups(module: nn.Module) -> list[Any]:
    """Return FSDP2's groups of parameters of a module; none where it has no own parameters."""
    state = cast(Any, module)._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [g for g in [state._fsdp_param_group] if g is not None]  # an early torch 2.11

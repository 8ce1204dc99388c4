"""``MegatronStrategy``: a few Trainer hooks over ``parallelize`` and ``ParallelModel``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.fabric.utilities.distributed import (
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import _update_dataloader
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import Metric

from ..errors import Nemo2Error
from ..mesh.make import store_of_restart
from ..mesh.sizes import AXES, MeshSizes, fit_sizes
from ..mesh.watchdog import Watchdog
from ..model import ParallelModel
from ..options import Compile, ContextParallel, DataParallel, Pipeline
from ..parallelize import parallelize
from ..sharding.modes import suspended
from .alike import Alike
from .checkpoint import Checkpoints, model_state, optimizer_state
from .data import MeshSampler, can_deal, deal_batches
from .last import check_same
from .launcher import Launcher
from .logs import EQUAL
from .precision import Bf16Masters, supported
from .preemption import Preempted, Preemption
from .refused import check_options, refuse
from .resuming import batches_done, warn_of_gradients
from .steps import (
    clip_by_norm,
    clip_by_value,
    evaluation_step,
    parameters_of,
    training_step,
)
from .summary import summarise_whole
from .together import Together

_PIPELINE = Pipeline()


class MegatronStrategy(ParallelStrategy):
    """Train an unmodified LightningModule on a mesh, in Megatron's schedules.

    The module is split in place before ``configure_optimizers``; the annotations of its
    submodules (``shard``, ``annotate``) say how. ``training_step`` runs once for each
    microbatch, and may return a loss, a dict with ``"loss"``, or ``(sum, count)``; only the
    loss, as its global value, goes on to callbacks. What ``self.log`` logs in a step is
    combined over microbatches and ``dp``, so it is the same on every rank (of a logged
    torchmetrics metric only the epoch's value). Code after the model's call runs on the last
    stage only; what it keeps in the module's attributes, of 1 MiB each at most, comes to the other
    stages after the step. Data is read in the order of the user's sampler, dealt out over
    ``dp``.

    Args:
        dp: data-parallel degree; one of the four may be -1, what is left of the devices.
        pp: pipeline degree.
        cp: context-parallel degree.
        tp: tensor-parallel degree.
        data_parallel: "fsdp", "zero1", "ddp" or a ``DataParallel`` (kind, replicate, reshard).
        pipeline: microbatches and schedule.
        context_parallel: "ring", "all_gather", "ulysses" or a ``ContextParallel``.
        sequence_parallel: split activations between split regions over ``tp`` along the
            sequence; None: where a sequence is found.
        remat: "full" or "selective" run blocks again in backward to save memory; None: keep all.
        compile: True, or a ``Compile``, compiles each block of the list annotated with ``"pp"``.
        asynchronous_save: write checkpoints in the background; saving costs a copy to host memory.
        others: what is unknown, to be refused with the options that there are.

    The options are those of ``parallelize`` without ``inplace`` (always) and ``precision``: the
    Trainer's decides: "32-true", "64-true", "bf16-true", or "bf16-mixed", which is
    ``precision="bf16"``, float32 masters of a module that computes in bfloat16, without autocast.

    Raises: Nemo2Error for options that are unknown or not built yet; MeshError, when the
        Trainer is made, if the sizes do not multiply to its devices.

    >>> import lightning as L, nemo2
    >>> strategy = nemo2.MegatronStrategy(tp=1, pipeline=nemo2.Pipeline(microbatches=2))
    >>> trainer = L.Trainer(devices=1, accelerator="cpu", strategy=strategy, logger=False)
    """

    def __init__(
        self,
        *,
        dp: int = -1,
        pp: int = 1,
        cp: int = 1,
        tp: int = 1,
        data_parallel: str | DataParallel = "fsdp",
        pipeline: Pipeline = _PIPELINE,
        context_parallel: str | ContextParallel = "ring",
        sequence_parallel: bool | None = None,
        remat: str | None = None,
        compile: bool | str | Compile = False,
        asynchronous_save: bool = False,
        **others: Any,
    ) -> None:
        options: dict[str, Any] = {
            "data_parallel": data_parallel,
            "pipeline": pipeline,
            "context_parallel": context_parallel,
            "sequence_parallel": sequence_parallel,
            "remat": remat,
            "compile": compile,
        }
        check_options(MegatronStrategy, {**options, **others}, cp)
        super().__init__()
        self.asked = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
        self.options = options
        self.num_nodes = 1
        self.parallel: ParallelModel | None = None
        self.watchdog: Watchdog | None = None
        self._mesh: DeviceMesh | None = None
        self._deals_samples: bool | None = None
        self._checkpoints = Checkpoints(asynchronous_save)
        self._preemption = Preemption()
        self._alike = Alike()
        self.planning = False  # whether a step runs on shapes, to be planned

    # --- who and where

    is_distributed = True

    @property
    def parallel_model(self) -> ParallelModel:
        """The ``ParallelModel`` around the LightningModule, once the Trainer has set it up."""
        if self.parallel is None:
            raise Nemo2Error("the model is split when the Trainer starts fit, validate or test")
        return self.parallel

    @property
    def mesh(self) -> DeviceMesh:
        if self._mesh is None:
            raise Nemo2Error("the mesh is made when the Trainer starts fit, validate or test")
        return self._mesh

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """The number of processes of this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Each dp coordinate reads its own part of the data; other ranks read the same one."""
        return {"num_replicas": self.mesh["dp"].size(), "rank": self.mesh.get_local_rank("dp")}

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if plugin is not None:
            plugin = supported(plugin)
            # On this instance: the Trainer's clipping ends here.
            plugin.clip_grad_by_norm = self._clip_by_norm  # type: ignore[method-assign]
            plugin.clip_grad_by_value = self._clip_by_value  # type: ignore[method-assign]
        self._precision_plugin = plugin

    # --- processes

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._sizes()  # wrong sizes are told before processes start
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def _sizes(self) -> MeshSizes:
        return fit_sizes(self.asked, self.num_nodes * self.num_processes)

    def set_world_ranks(self) -> None:
        environment = self.cluster_environment
        if environment is not None:
            environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            environment.set_world_size(self.num_nodes * self.num_processes)
        setattr(utilities_rank_zero_only, "rank", self.global_rank)  # noqa: B010

    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        refuse(self.lightning_module.trainer)
        super().setup_environment()  # no reset_seed(): on one device the Trainer has none
        self.set_world_ranks()
        device = self.root_device
        assert self.cluster_environment is not None
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        _init_dist_connection(self.cluster_environment, backend, store=store_of_restart())
        if self._mesh is None:
            shape = tuple(size for _, size in self._sizes().items())
            self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
        self.lightning_module._device_mesh = self._mesh
        if dist.get_world_size() > 1:
            self.watchdog = Watchdog()
        self._agree_on_last()

    def _agree_on_last(self) -> None:
        """Raise on all ranks unless all have found the same ``ckpt_path="last"``."""
        assert isinstance(self._launcher, Launcher)
        if self._launcher.asked_for_last and dist.get_world_size() > 1:
            found: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(found, self._launcher.last)
            check_same(found)

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build the model on the host, or with ``empty_init`` on meta: shapes without memory."""
        shapes = torch.device("meta") if empty_init else nullcontext()
        with shapes, self.precision_plugin.tensor_init_context():
            yield

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        connector = trainer._accelerator_connector
        if self._deals_samples is None:  # ours keep the user's order, see MeshSampler
            self._deals_samples = connector.use_distributed_sampler
            connector.use_distributed_sampler = False
        module = self.lightning_module
        assert module is not None
        if self.parallel is None or self.parallel.module is not module:
            summarise_whole(trainer)
            self.parallel = self._split(module)
        self.model = module
        self._alike = Alike()
        if trainer.state.fn == TrainerFn.FITTING:
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self._preemption.attach(self, trainer)

    def _split(self, module: LightningModule) -> ParallelModel:
        if any(isinstance(p, DTensor) for p in module.parameters()):
            raise Nemo2Error(
                f"{type(module).__name__} has been split by another strategy\n"
                "  options: use the same Trainer again | build a new module and load a checkpoint"
            )
        self.precision_plugin.convert_module(module)
        precision = "bf16" if isinstance(self.precision_plugin, Bf16Masters) else None
        options = {**self.options, "precision": precision}
        parallel = parallelize(module, self.mesh, inplace=True, **options)
        parallel.draws.dealt = True  # by MeshSampler, or torch's DistributedSampler
        for sub in module.modules():
            if isinstance(sub, Metric):
                sub.to(self.root_device)
                if sub.process_group is None:
                    sub.process_group = parallel.groups.dp
        for sub in module.modules():  # their device: they were never moved as a whole
            if isinstance(sub, _DeviceDtypeModuleMixin):
                sub._device = self.root_device
        return parallel

    def setup_optimizers(self, trainer: Trainer) -> None:
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            if "multiple optimizers" not in str(error):
                raise
            raise Nemo2Error(
                "several optimizers do not work with MegatronStrategy: Lightning has them with"
                " manual optimization, and the schedule runs forward and backward together\n"
                "  options: one optimizer with parameter groups | nemo2.parallelize and your own"
                " loop"
            ) from None

    def model_to_device(self) -> None:
        """Nothing to do: splitting the model moves it."""

    def teardown(self) -> None:
        self._checkpoints.end()
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self._preemption.detach()
        if self.watchdog is not None:
            self.watchdog.stop()
            self.watchdog = None

    def on_exception(self, exception: BaseException) -> None:
        """Tell the other ranks, which may be waiting for this one, or say which one was lost."""
        if isinstance(exception, Preempted):  # on all ranks alike
            return
        self._checkpoints.failed = True
        watchdog = self.watchdog
        if watchdog is None:
            return
        lost = watchdog.explain(exception)
        if lost is None:
            watchdog.report(self.global_rank, watchdog.step, exception)
        elif not isinstance(exception, Nemo2Error):  # it came from outside a step
            exception.add_note(f"nemo2: {lost}")

    # --- steps

    def training_step(self, batch: Any, *args: Any) -> Tensor:
        module = self.lightning_module
        assert module is not None
        trainer = module.trainer
        with self.precision_plugin.train_step_context(), self._guarded(trainer.global_step):
            self._alike.check(self.parallel_model.groups, "training_step", batch)
            self._free_gradients(trainer, args)
            return training_step(self.parallel_model, batch, args)

    def validation_step(self, batch: Any, *args: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._evaluate("validation_step", batch, args)

    def test_step(self, batch: Any, *args: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._evaluate("test_step", batch, args)

    def predict_step(self, batch: Any, *args: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._evaluate("predict_step", batch, args)

    def _evaluate(self, name: str, batch: Any, args: tuple[Any, ...]) -> Any:
        module = self.lightning_module
        assert module is not None
        with self._guarded(module.trainer.global_step):
            of = f"{name} of dataloader {args[1]}" if len(args) > 1 else name
            self._alike.check(self.parallel_model.groups, of, batch)
            return evaluation_step(self.parallel_model, name, batch, args)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, *args, **kwargs)
        self._checkpoints.prepare(self.parallel_model, self.optimizers)
        return output

    @contextmanager
    def _guarded(self, step: int) -> Iterator[None]:
        with self.watchdog.guard(step) if self.watchdog is not None else nullcontext():
            yield

    def _free_gradients(self, trainer: Trainer, args: tuple[Any, ...]) -> None:
        """Drop the last step's gradients before new ones are made: Lightning zeroes them later."""
        module = type(trainer.lightning_module)
        if module.optimizer_zero_grad is not LightningModule.optimizer_zero_grad:
            return
        batch_idx = trainer.fit_loop.epoch_loop.batch_idx
        if batch_idx % trainer.accumulate_grad_batches == 0:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_norm(self.parallel_model, parameters_of(optimizer), float(clip_val))

    def _clip_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_value(parameters_of(optimizer), float(clip_val))

    def process_dataloader(self, dataloader: object) -> object:
        """Let each dp coordinate read its own part, in the order that the user's sampler has."""
        if isinstance(dataloader, DataLoader):  # as Lightning would, with this rank's number
            _auto_add_worker_init_fn(dataloader, self.distributed_sampler_kwargs["rank"])
        if not self._deals_samples or not can_deal(dataloader):
            return self._together(dataloader)
        assert isinstance(dataloader, DataLoader)
        assert self.lightning_module is not None
        kwargs = self.distributed_sampler_kwargs
        sampler = MeshSampler(dataloader.sampler, kwargs["num_replicas"], kwargs["rank"])
        trainer = self.lightning_module.trainer
        if not trainer.training and sampler.repeated:
            rank_zero_warn(
                f"dp={sampler.replicas} does not divide the number of samples: the first"
                f" {sampler.repeated} are read twice, as by DistributedSampler"
            )
        if trainer.predicting:
            # The loader is Lightning's own already, with a wrapper that notes the indices.
            inner = getattr(dataloader.batch_sampler, "_batch_sampler", None)
            if inner is not None:
                inner.sampler = sampler
            return dataloader
        own = deal_batches(dataloader, kwargs["num_replicas"], kwargs["rank"])
        if own is not None:
            return own
        made = _update_dataloader(dataloader, sampler)
        return self._checkpoints.followed(trainer, made) if trainer.training else made

    def _together(self, loader: object) -> object:
        """Guard data that ranks read as they like; a ``DistributedSampler`` deals it out evenly."""
        assert self.lightning_module is not None
        even = isinstance(getattr(loader, "sampler", None), (DistributedSampler, MeshSampler))
        done = batches_done(self.lightning_module.trainer)
        if not isinstance(loader, Iterable):
            return loader
        if done and not hasattr(loader, "load_state_dict"):
            rank_zero_warn(
                f"the training data cannot say where it stands: its first {done} batches are read"
                " and dropped, which is where the run stood if they are those of before\n"
                "  options: a map-style dataset, whose samples are dealt out | a dataloader with"
                " state_dict and load_state_dict, on the same mesh"
            )
            return Together(loader, self.root_device, done)
        alone = dist.get_world_size() == 1
        return loader if even or alone else Together(loader, self.root_device)

    # --- communication

    def _planned(self, what: str) -> bool:
        """Say whether this is a step that is only planned, where ranks do not meet.

        Raises: Nemo2Error, with stages, for what all ranks of the world do together: when it runs,
            they are not in the same part of the step.
        """
        if self.planning and self.mesh["pp"].size() > 1:
            raise Nemo2Error(
                f"{what} in a step: all ranks do that together, and under pp the stages are in"
                " different parts of it\n"
                "  options: in a hook, such as on_fit_start, kept in an attribute | self.log,"
                " self.all_gather"
            )
        return self.planning

    def barrier(self, name: str | None = None) -> None:
        if self._planned("trainer.strategy.barrier"):
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            devices = [self.root_device.index] if self.root_device.type == "cuda" else None
            dist.barrier(device_ids=devices)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return obj
        if self._planned("trainer.strategy.broadcast (of which trainer.log_dir makes use)"):
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=src, device=self.root_device)
        return box[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over ``dp``: the other ranks of a dp coordinate have the same values."""
        if not isinstance(tensor, Tensor) or group == EQUAL or self.planning:
            return tensor
        return _sync_ddp_if_available(tensor, self._group(group), reduce_op=reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather over ``dp``, also for ``LightningModule.all_gather``: of shape (dp, *shape).

        With dp=1 it is ``tensor``, as on one device. In a step, after the model's call, it runs on
        the ranks of the last stage.
        """
        group = self._group(group)
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return tensor
        if self.planning:  # alone: the other ranks may have planned this step before
            parts = (tensor,) * dist.get_world_size(group)
        else:
            with suspended(), torch.set_grad_enabled(sync_grads and torch.is_grad_enabled()):
                parts = _Gather.apply(tensor.contiguous(), group)  # type: ignore[no-untyped-call]
        return torch.stack(parts)  # the one call that is planned

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if not dist.is_initialized() or self._planned("trainer.strategy.reduce_boolean_decision"):
            return decision
        flag = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(flag.item())

    def _group(self, group: Any) -> Any:
        if group is not None and group is not dist.group.WORLD:  # LightningModule's default
            return group
        return self.parallel.groups.dp if self.parallel is not None else self.mesh.get_group("dp")

    # --- checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return name -> DTensor or buffer, of what this rank's stage owns."""
        return model_state(self.parallel_model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the groups' options: ``save_checkpoint`` takes the state itself."""
        return optimizer_state(optimizer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        if storage_options is not None:
            raise Nemo2Error("MegatronStrategy writes checkpoints itself: no storage_options")
        assert self.lightning_module is not None
        warn_of_gradients(self.lightning_module.trainer)
        path = self.broadcast(filepath)
        self._checkpoints.save(self.parallel_model, self.optimizers, checkpoint, path)

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            self._checkpoints.remove(filepath)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        fitting = module.trainer.state.fn == TrainerFn.FITTING
        return self._checkpoints.load(
            self.parallel_model,
            self.optimizers if fitting else [],
            self.broadcast(checkpoint_path),
            strict=module.strict_loading,
            resume=fitting,
        )

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Nothing to do: ``load_checkpoint`` has filled the parameters."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Nothing to do: ``load_checkpoint`` has filled the optimizers."""


class _Gather(torch.autograd.Function):
    """Gathers a tensor from all ranks of a group; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> tuple[Tensor, ...]:
        ctx.group = group
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor, group=group)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        whole = torch.stack([g.contiguous() for g in grads])
        dist.all_reduce(whole, group=ctx.group)
        return whole[dist.get_rank(ctx.group)], None

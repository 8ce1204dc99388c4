"""``Throughput``: tokens a second, MFU, peak memory and bubble share of a training."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from torch import Tensor, nn

from ..errors import Nemo2Error
from ..pipeline.balance import bubble_share
from ..plan import Plan, StepPlan
from ..pytree import tree_leaves
from .precision import Bf16Masters
from .strategy import MegatronStrategy

# Dense products, in bfloat16; half of it in TF32. Lightning's table has those of sparse ones here.
_HOPPER = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12}


class Throughput(Callback):
    """Log how fast a training under ``MegatronStrategy`` runs: on the progress bar and in loggers.

    ``tokens/s``: tokens of the global batch a second, with the optimizer and the wait for data,
    without validation and the first step (which plans). ``mfu``: the FLOPs that the model needs
    for these tokens, by what all devices could do in the time (arXiv 2204.02311, appendix B); not
    logged where the peak is unknown, as on CPUs. ``peak_GiB``: the most memory that a rank has
    allocated so far (on CPUs: that its process had resident). ``bubble``: the share of a step
    that a rank waits in the schedule, ``(pp - 1) / (virtual_stages * microbatches + pp - 1)``
    if all stages take as long and transfers take nothing (arXiv 2104.04473, section 2.2). The
    same values on every rank; ``values`` has the latest.

    Args:
        tokens: returns the number of tokens in the batch that one dp coordinate gets; None: the
            elements of the first integer tensor in it.
        flops_per_token: of forward and backward; None: 6 for each trainable weight that
            multiplies (4 for a frozen one; tables that are looked up: none), and of each call of
            ``F.scaled_dot_product_attention`` 12 for each pair of positions and feature, causal
            or not. Weights count once a token: give the number for mixtures of experts,
            convolutions, models that use a weight twice, and attention written out.
        available_flops: of one device, a second; None: known for most NVIDIA GPUs, by dtype.
        every: optimizer steps between two measurements.

    Communication: for each measurement one all-gather of 3 numbers over the world, after waiting
        for the device.
    Raises: Nemo2Error with another strategy, and for a batch without an integer tensor.
    """

    def __init__(
        self,
        tokens: Callable[[Any], int] | None = None,
        flops_per_token: float | None = None,
        available_flops: float | None = None,
        every: int = 5,
    ) -> None:
        if every < 1:
            raise Nemo2Error(f"Throughput(every={every}): give an integer >= 1")
        self.tokens = tokens or count_tokens
        self.flops_per_token, self.available_flops = flops_per_token, available_flops
        self.every = every
        self.values: dict[str, float] = {}
        self._since = 0.0  # when the measurement began; 0: none has

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, MegatronStrategy):
            raise Nemo2Error(
                f"nemo2.lightning.Throughput measures MegatronStrategy, and the Trainer has"
                f" {type(trainer.strategy).__name__}\n"
                "  options: Trainer(strategy=nemo2.MegatronStrategy(...)) |"
                " lightning's ThroughputMonitor"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = _strategy(trainer)
        model = strategy.parallel_model
        if self.available_flops is None:
            self.available_flops = _peak(strategy)
        self._weights = weight_flops(model.plan, model.module)
        self._step = trainer.global_step
        self._tokens = self._flops = self._since = self._paused = 0.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._since:
            self._paused = _now(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._since:
            self._since += _now(trainer) - self._paused

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        model = _strategy(trainer).parallel_model
        tokens = self.tokens(batch)
        self._tokens += tokens
        if self.flops_per_token is None:
            count = model.plan.options.pipeline.microbatches
            self._flops += tokens * self._weights
            self._flops += count * attention_flops(model.runner.step_plan)
        else:
            self._flops += tokens * self.flops_per_token
        steps = trainer.global_step - self._step
        if not self._since:  # the first step is not measured
            if steps:
                self._begin(trainer)
        elif steps >= self.every:
            self.values = self._measure(trainer)
            pl_module.log_dict(self.values, prog_bar=True)
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self._step, self._since = trainer.global_step, _now(trainer)
        self._tokens = self._flops = 0.0

    def _measure(self, trainer: Trainer) -> dict[str, float]:
        strategy = _strategy(trainer)
        sizes, options = strategy.parallel_model.plan.sizes, strategy.parallel_model.plan.options
        seconds = _now(trainer) - self._since
        own = [self._tokens, self._flops, seconds, _peak_memory(strategy.root_device)]
        rows = torch.tensor(own, dtype=torch.float64, device=strategy.root_device)
        every = [rows.clone() for _ in range(sizes.world)]
        dist.all_gather(every, rows)
        table = torch.stack(every).tolist()
        copies = sizes.world // sizes.dp  # ranks that have the same batch
        tokens, flops = (sum(row[i] for row in table) / copies for i in (0, 1))
        seconds, memory = (max(row[i] for row in table) for i in (2, 3))
        values = {"tokens/s": tokens / seconds}
        if self.available_flops is not None:
            values["mfu"] = flops / seconds / (sizes.world * self.available_flops)
        return values | {
            "peak_GiB": memory / 2**30,
            "bubble": bubble_share(sizes.pp, options.pipeline),
        }


def count_tokens(batch: Any) -> int:
    """Return the number of elements of the first integer tensor in ``batch``."""
    for x in tree_leaves(batch):
        if isinstance(x, Tensor) and not x.is_floating_point() and x.dtype != torch.bool:
            return x.numel()
    raise Nemo2Error(
        "Throughput: the batch has no integer tensor whose elements are the tokens\n"
        "  options: Throughput(tokens=lambda batch: <tokens of this dp coordinate's batch>)"
    )


def weight_flops(plan: Plan, module: nn.Module) -> int:
    """Return the FLOPs a token, forward and backward, of the weights that multiply.

    A weight tied to a table counts where it multiplies.
    """
    tables = {
        n for n, m in module.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
    }
    total = 0
    for p in plan.params:
        uses = sum(n.rpartition(".")[0] not in tables for n in (p.name, *p.aliases))
        if len(p.shape) > 1 and uses:
            total += (6 if p.trainable else 4) * torch.Size(p.shape).numel()
    return total


def attention_flops(step: StepPlan | None) -> int:
    """Return the FLOPs of the attention calls in one microbatch of a dp coordinate.

    Two products, (queries, features) by keys and back, of two FLOPs for each element, and twice
    as many in backward; 0 of a step that was not planned (on a single device it may read values).
    """
    if step is None:
        return 0
    calls = [e for a in step.trace.root.walk() for e in a.events()]
    shapes = [e.global_shapes for e in calls if e.name == "scaled_dot_product_attention"]
    return sum(12 * torch.Size(q).numel() * k[-2] for q, k, *_ in shapes)


def _strategy(trainer: Trainer) -> MegatronStrategy:
    assert isinstance(trainer.strategy, MegatronStrategy)
    return trainer.strategy


def _now(trainer: Trainer) -> float:
    """Return the time, in seconds, when the device has done what it was given."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def _peak(strategy: MegatronStrategy) -> float | None:
    """Return the FLOPs a second of one device for dense products, where they are known."""
    plugin, device = strategy.precision_plugin, strategy.root_device
    masters = isinstance(plugin, Bf16Masters)
    dtype = torch.bfloat16 if masters else _plugin_to_compute_dtype(plugin)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        dense = next((flops for chip, flops in _HOPPER.items() if chip in name), None)
        if dense is not None and dtype in (torch.bfloat16, torch.float16):
            return dense
        if dense is not None and dtype == torch.float32:
            tf32 = torch.get_float32_matmul_precision() != "highest"
            return dense / 2 if tf32 else 67e12
    return get_available_flops(device, dtype)

"""What of the Trainer cannot work on a mesh: refused before anything runs, on all ranks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from ..errors import Nemo2Error
from ..mesh.sizes import MeshSizes
from ..options import Options

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def refuse(trainer: Trainer) -> None:
    """Raise Nemo2Error if this run needs what ``MegatronStrategy`` cannot do."""
    for name in _STEPS:
        step = getattr(trainer.lightning_module, name, None)
        if callable(step) and "dataloader_iter" in inspect.signature(step).parameters:
            raise Nemo2Error(
                f"{name}(self, dataloader_iter) does not work with MegatronStrategy: it draws its"
                " batch itself, and the schedule needs it before, to split it\n"
                f"  options: {name}(self, batch, batch_idx)"
            )
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if not trainer.lightning_module.automatic_optimization:
        raise Nemo2Error(
            "manual optimization (automatic_optimization = False) does not work with "
            "MegatronStrategy: the schedule runs forward and backward together\n"
            "  options: automatic_optimization = True | nemo2.parallelize and your own loop"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            raise Nemo2Error(
                f"{type(callback).__name__} does not work with MegatronStrategy: which parameters"
                " are trained is settled when the model is split\n"
                "  options: requires_grad_(False) before fit, and a second fit, of a new module"
                " from a checkpoint, with more of them"
            )
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise Nemo2Error(
                f"{type(callback).__name__} does not work with MegatronStrategy: it copies the"
                " module before it is split\n"
                "  options: a callback that averages module.named_parameters(), which are this"
                " rank's shards, in on_train_batch_end"
            )


def check_options(strategy: type, options: Mapping[str, Any], cp: int) -> None:
    """Raise Nemo2Error for options that are unknown, have no such value, or are not the strategy's.

    Args:
        options: of ``parallelize``, and whatever else was given.
    """
    for name, instead in (
        ("precision", 'Trainer(precision="bf16-mixed")'),
        ("inplace", "nothing: it is always in place"),
    ):
        if name in options:
            raise Nemo2Error(f"MegatronStrategy takes no {name!r}; use {instead}")
    taken = inspect.signature(strategy).parameters.values()
    known = [p.name for p in taken if p.kind is not p.VAR_KEYWORD]
    unknown = [repr(name) for name in options if name not in known]
    if unknown:
        raise Nemo2Error(
            f"MegatronStrategy: unknown option {', '.join(unknown)}\n  options: {', '.join(known)}"
        )
    replicate = getattr(options.get("data_parallel"), "replicate", 1)  # dp may not be known yet
    fits = replicate if isinstance(replicate, int) and replicate > 0 else 1
    Options.resolve(MeshSizes(dp=fits, cp=cp if isinstance(cp, int) and cp > 0 else 1), **options)

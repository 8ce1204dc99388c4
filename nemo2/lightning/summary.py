"""Lightning's summary of a model, of all of it: a stage has only its own parameters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import summarize


def summarise_whole(trainer: Trainer) -> None:
    """Let the summaries that the Trainer prints be of its module as it is now, not split yet."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelSummary) and callback._max_depth:
            whole = _summary_of(trainer.lightning_module, callback._max_depth)
            callback._summary = lambda *_, made=whole: made  # type: ignore[method-assign]


def _summary_of(module: LightningModule, max_depth: int) -> Any:
    """Return what the callback reads of a summary; Lightning's own counts when it is read.

    Without sizes of inputs and outputs: they take a forward of ``example_input_array``, and the
    module may be on meta, or too large for this rank's device.
    """
    example, module.example_input_array = module.example_input_array, None
    try:
        made = summarize(module, max_depth=max_depth)
        data = made._get_summary_data()
    finally:
        module.example_input_array = example
    facts = ("total_parameters", "trainable_parameters", "model_size", "total_training_modes")
    read = {name: getattr(made, name) for name in (*facts, "total_flops")}
    return SimpleNamespace(_get_summary_data=lambda: data, **read)

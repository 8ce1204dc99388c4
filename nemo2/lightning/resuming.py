"""Where the Trainer's loops stand in the training data, when they save and when they resume."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from .data import Dealt


def under_way(trainer: Trainer) -> int:
    """Return how many batches have been fetched for training and not been trained on yet."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None:
        return 0
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(fetcher.fetched - current.processed)


def batches_done(trainer: Trainer) -> int:
    """Return how many batches of its epoch a run that resumes has trained on; 0 between epochs.

    Called when the loops have their progress again and have not looked at it.
    """
    if not trainer.training or not trainer.fit_loop.is_resuming or _where(trainer) != "inside":
        return 0
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(current.processed)


def _where(trainer: Trainer) -> str:
    """Say where a run that resumes stands: "inside" of an epoch, at its "end", or in the "next".

    What the loops will do with the first iterator follows from it (lightning 2.6).
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    total: Any = progress.total
    saved_in_batch_end = total.completed == total.processed - 1
    if not trainer.fit_loop.restarting or (progress.is_last_batch and saved_in_batch_end):
        return "next"  # the loops begin the next epoch with it
    return "end" if progress.is_last_batch else "inside"


def go_on(
    trainer: Trainer, loader: DataLoader[Any], position: Any, generators: dict[str, Any]
) -> None:
    """Let a training dataloader go on where a checkpoint was saved.

    Called when the loops have their progress again and have not looked at it.
    """
    assert isinstance(loader, Dealt)
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    where = _where(trainer)
    done = loader.resume(position, where, generators)
    if where == "inside":
        # Counted in batches of today: the global batch may have another size than it had.
        more = done - current.processed
        current.ready += more
        current.started += more
        current.processed += more
        current.completed += more


def warn_of_gradients(trainer: Trainer) -> None:
    """Say that a checkpoint saved inside of accumulated gradients does not hold them."""
    if trainer.state.fn != TrainerFn.FITTING:
        return
    loop = trainer.fit_loop.epoch_loop
    current: Any = loop.batch_progress.current
    done = current.processed % trainer.accumulate_grad_batches
    if done and loop._should_accumulate():
        rank_zero_warn(
            f"saved after {done} of {trainer.accumulate_grad_batches} batches whose gradients are"
            " accumulated: a checkpoint does not hold them, and a run that resumes goes on without"
            "\n  options: val_check_interval, every_n_train_steps that accumulate_grad_batches"
            " divides"
        )

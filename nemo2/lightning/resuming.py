"""Where the Trainer's loops stand in the training data, when they save and when they resume."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from .data import Dealt


def under_way(trainer: Trainer) -> int:
    """Return how many batches have been fetched for training and not been trained on yet."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None:
        return 0
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(fetcher.fetched - current.processed)


def go_on(
    trainer: Trainer, loader: DataLoader[Any], position: Any, generators: dict[str, Any]
) -> None:
    """Let a training dataloader go on where a checkpoint was saved.

    Called when the loops have their progress again and have not looked at it: what they will do
    with the first iterator follows from it (lightning 2.6).
    """
    assert isinstance(loader, Dealt)
    fit_loop, progress = trainer.fit_loop, trainer.fit_loop.epoch_loop.batch_progress
    total: Any = progress.total
    current: Any = progress.current
    saved_in_batch_end = total.completed == total.processed - 1
    if not fit_loop.restarting or (progress.is_last_batch and saved_in_batch_end):
        where = "next"  # the loops begin the next epoch with it
    else:
        where = "end" if progress.is_last_batch else "inside"
    done = loader.resume(position, where, generators)
    if where == "inside":
        # Counted in batches of today: the global batch may have another size than it had.
        more = done - current.processed
        current.ready += more
        current.started += more
        current.processed += more
        current.completed += more

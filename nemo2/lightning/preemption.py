"""SIGTERM while a Trainer fits: all ranks finish the step, save one checkpoint, and leave.

Lightning 2.6 has its own way, which one signal to one rank turns into a hang: it broadcasts from
inside of the signal's handler, and each rank leaves the loop by its own flag. Here the handler
only takes a note, and after each step the ranks agree on who has one.
"""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ..checkpoint import files
from ..checkpoint.index import is_checkpoint
from ..errors import CheckpointError

if TYPE_CHECKING:
    from .strategy import MegatronStrategy

EXIT_STATUS = 128 + signal.SIGTERM  # 143, what shells say of a process that SIGTERM has ended
_PREFIX = "preempted-step="


class Preempted(SIGTERMException):
    """Raised on all ranks when one was told to end, once the checkpoint is complete.

    A ``SystemExit`` with status 143: the training has not come to its end.
    """

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Preemption:
    """Lets one strategy's fit end at SIGTERM.

    Communication: after each step an all-reduce of one number over the world; it takes the place
    of the broadcast that Lightning has before each batch.
    """

    def __init__(self) -> None:
        self.told = False  # this rank
        self._trainer: Trainer | None = None

    def attach(self, strategy: MegatronStrategy, trainer: Trainer) -> None:
        """Take SIGTERM over from the Trainer, which is about to register its handlers."""
        self._trainer, self.told = trainer, False
        connector = trainer._signal_connector
        if trainer.state.fn != TrainerFn.FITTING:
            # Nothing to save: without its broadcast, Lightning's way ends this rank.
            connector._sigterm_notifier_fn = partial(_note, connector)  # type: ignore[method-assign]
            return
        connector._sigterm_notifier_fn = self._tell  # type: ignore[method-assign, assignment]
        if strategy.watchdog is not None:
            strategy.watchdog.on_sigterm = self._tell
        loop = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
        loop.on_advance_end = partial(self._after_batch, strategy, loop)  # type: ignore[method-assign]

    def detach(self) -> None:
        """Give the handlers back that were there before the Trainer registered its own."""
        if self._trainer is not None:
            self._trainer._signal_connector.teardown()
            self._trainer = None

    def _tell(self, signum: Any = None, frame: Any = None) -> None:
        self.told = True

    def _after_batch(
        self, strategy: MegatronStrategy, loop: _TrainingEpochLoop, data_fetcher: Any
    ) -> None:
        """End a batch as Lightning does, validation included; then stop if a rank was told to."""
        _TrainingEpochLoop.on_advance_end(loop, data_fetcher)
        if not _between_steps(loop):
            return
        with strategy._guarded(loop.global_step):
            told = self._first_told(strategy)
        if told is not None:
            self._stop(strategy, loop.trainer, told)

    def _first_told(self, strategy: MegatronStrategy) -> int | None:
        """Return the first rank that has had SIGTERM, the same on all ranks."""
        rank, world = strategy.global_rank, strategy.world_size
        if world == 1:
            return 0 if self.told else None
        # On the host where there is a way: a GPU does not have to be awaited for it.
        host = "cpu:" in dist.get_backend_config()
        device = torch.device("cpu") if host else strategy.root_device
        first = torch.tensor(world - rank if self.told else 0, device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MAX)
        return world - int(first) if first else None

    def _stop(self, strategy: MegatronStrategy, trainer: Trainer, told: int) -> None:
        trainer._signal_connector.received_sigterm = True  # trainer.received_sigterm, for callbacks
        step = trainer.global_step
        path = folder_of(trainer) / f"{_PREFIX}{step}.ckpt"
        said = f"rank {told} was told to end (SIGTERM) at global step {step}"
        try:
            trainer.save_checkpoint(path)
            strategy._checkpoints.end()
        except CheckpointError as error:
            error.add_note(f"nemo2: {said}: no checkpoint was saved")
            raise
        if strategy.is_global_zero:
            for old in path.parent.glob(f"{_PREFIX}*.ckpt"):
                if old.name != path.name and is_checkpoint(old):
                    files.remove(old)
            text = f"nemo2: {said}: saved '{path}', leaving with exit status {EXIT_STATUS}"
            print(text, file=sys.stderr, flush=True)
        raise Preempted


def folder_of(trainer: Trainer) -> Path:
    """Return where a fit that is told to end saves: beside the checkpoints that it has made."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            return Path(callback.dirpath)
    return Path(trainer.default_root_dir) / "checkpoints"


def _between_steps(loop: _TrainingEpochLoop) -> bool:
    """Say whether a checkpoint can be saved from which training goes on exactly; on all ranks.

    Not inside of accumulated gradients. Not at the end of an epoch, whose metrics would be lost,
    unless an epoch has one batch; nor of the training, which is about to end by itself.
    """
    if loop.restarting or loop._should_accumulate() or loop.global_step == loop.max_steps:
        return False
    return loop.batch_progress.current.ready == 1 or not loop.done


def _note(connector: Any, signum: Any, frame: Any) -> None:
    connector.received_sigterm = True


def _nothing() -> None:
    return

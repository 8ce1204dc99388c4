"""``ckpt_path="last"``: the newest checkpoint from which a Trainer can go on.

Lightning 2.6 looks for names that begin with "last", and takes a folder for a checkpoint whatever
is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn

from ..checkpoint.index import Index
from ..checkpoint.newest import newest_first
from ..errors import CheckpointError
from .checkpoint import has_trainer_state


def last_of(trainer: Trainer) -> str | None:
    """Return the newest complete checkpoint beside those of this Trainer; None if there is none.

    It looks where this Trainer's ``ModelCheckpoint`` callbacks save, or without one where a fit
    that is told to end does: in ``default_root_dir/checkpoints``. Saves that did not finish, and
    checkpoints without a Trainer's state, or to fit without that of its loops, are left alone.

    Raises: CheckpointError when there are checkpoints and all of them are damaged.
    """
    folders = _folders(trainer)
    damaged = []
    for path in newest_first(folders):
        try:
            index = Index.read(path)
            problems = index.check_sizes()
        except CheckpointError as error:
            problems = [str(error)]
        if problems:
            damaged.append(f"'{path}': {problems[0]}")
        elif has_trainer_state(index, fitting=trainer.state.fn == TrainerFn.FITTING):
            if damaged:
                rank_zero_warn(f'ckpt_path="last" takes an older one, {path}, as {damaged[0]}')
            return str(path)
    shown = ", ".join(f"'{folder}'" for folder in folders)
    if damaged:
        raise CheckpointError(
            "\n  ".join([f'ckpt_path="last": every checkpoint in {shown} is damaged', *damaged])
            + "\n  options: restore or remove them | ckpt_path=None, to begin anew"
        )
    rank_zero_warn(
        f'ckpt_path="last" finds no checkpoint in {shown}: nothing is loaded. A folder that is the'
        " same in each start is ModelCheckpoint(dirpath=...)"
    )
    return None


def check_same(found: Sequence[str | None]) -> None:
    """Raise CheckpointError if the ranks have found different checkpoints.

    Args:
        found: of each rank, what ``last_of`` has returned.
    """
    if len(set(found)) > 1:
        lines = [
            f"ranks {[r for r, own in enumerate(found) if own == path]}: {path or 'none'}"
            for path in dict.fromkeys(found)
        ]
        raise CheckpointError(
            "\n  ".join(['ckpt_path="last" is not the same on all ranks', *lines])
            + "\n  options: a folder that all ranks see | the path of a checkpoint"
        )


def _folders(trainer: Trainer) -> list[Path]:
    # In a first fit the callbacks do not know it themselves yet.
    own = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    found = [Path(getattr(c, "_ModelCheckpoint__resolve_ckpt_dir")(trainer)) for c in own]  # noqa: B009
    return list(dict.fromkeys(found)) or [Path(trainer.default_root_dir) / "checkpoints"]

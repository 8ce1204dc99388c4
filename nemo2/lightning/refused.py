"""What of the Trainer cannot work on a mesh: refused before anything runs, on all ranks."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from ..errors import Nemo2Error


def refuse(trainer: Trainer) -> None:
    """Raise Nemo2Error if this fit needs what ``MegatronStrategy`` cannot do."""
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if not trainer.lightning_module.automatic_optimization:
        raise Nemo2Error(
            "manual optimization (automatic_optimization = False) does not work with "
            "MegatronStrategy: the schedule runs forward and backward together\n"
            "  options: automatic_optimization = True | nemo2.parallelize and your own loop"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise Nemo2Error(
                f"{type(callback).__name__} does not work with MegatronStrategy: it copies the"
                " module before it is split\n"
                "  options: a callback that averages module.named_parameters(), which are this"
                " rank's shards, in on_train_batch_end"
            )

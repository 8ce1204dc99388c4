"""Checkpoints of a Trainer: nemo2's own, with the Trainer's state as plain data beside the tensors.

Loops, callbacks, schedulers and hyperparameters are in JSON: what that cannot hold is refused,
or, of hyperparameters, left out with a warning, because nothing goes on from them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import optree
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..checkpoint import files
from ..checkpoint.agree import Problems
from ..checkpoint.host import HOST
from ..checkpoint.index import Index
from ..checkpoint.plain import bytes_of, decode, encode
from ..checkpoint.restoring import load_training
from ..checkpoint.saving import Saving
from ..checkpoint.shards import OWN_OPTIONS, content_of
from ..checkpoint.target import target_of
from ..checkpoint.training import Extra, save_training
from ..errors import CheckpointError
from ..model import ParallelModel
from ..sharding.state import buffer_owners, persistent_buffers
from ..sharding.storage import local_of
from .data import dealt, is_position
from .resuming import go_on, under_way

_TRAINER = "lightning"  # the Trainer's state in the extra of a checkpoint
_HYPER = (LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, "datamodule_hyper_parameters")


def model_state(parallel: ParallelModel) -> dict[str, Tensor]:
    """Return name -> tensor of the parameters and buffers that this rank's stage owns."""
    here, owners = parallel.groups.pp_rank, buffer_owners(parallel.plan, parallel.module)
    state: dict[str, Tensor] = {
        e.name: e.view.detach() for e in parallel.storage if here == e.plan.ranks[0]
    }
    return state | {
        n: b for n, b in persistent_buffers(parallel.module).items() if owners[n] == here
    }


def optimizer_state(optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
    """Return the options of an optimizer's groups; its tensors go their own way."""
    hidden = ("params", *OWN_OPTIONS)
    groups = _plain(optimizer).param_groups
    return {"param_groups": [{k: v for k, v in g.items() if k not in hidden} for g in groups]}


def _plain(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


class Checkpoints:
    """The checkpoints of one strategy: the save under way, and where data goes on after a load.

    Attributes:
        asynchronous: whether saves are written in the background.
        failed: whether training has failed, so that other ranks may be gone.
    """

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous, self.failed = asynchronous, False
        self._saving: Saving | None = None
        self._prepared = False
        self._positions: list[Any] = []  # of the training dataloaders
        self._generators: dict[str, Any] = {}

    def prepare(
        self, parallel: ParallelModel, optimizers: Sequence[Optimizer | LightningOptimizer]
    ) -> None:
        """Get host memory for the first save ahead of it, once optimizers have their state."""
        if self.asynchronous and not self._prepared:
            self._prepared = True
            with suppress(CheckpointError):  # the save itself says so, on all ranks
                plain = [_plain(o) for o in optimizers]
                HOST.prepare(content_of(target_of(parallel), plain).shards)

    def save(
        self,
        parallel: ParallelModel,
        optimizers: Sequence[Optimizer | LightningOptimizer],
        checkpoint: Mapping[str, Any],
        path: str | Path,
    ) -> None:
        """Write ``checkpoint``, as the Trainer made it, to the folder ``path``.

        Hooks may have taken names out of its ``state_dict``: these are not saved.

        Communication: that of ``nemo2.save``, and two all-gathers of objects over the world.
        Raises: CheckpointError on all ranks alike.
        """
        rest = dict(checkpoint)
        names = rest.pop("state_dict")
        full = rest.pop("optimizer_states", None) is not None
        problems = Problems(f"cannot save the Trainer's state to '{path}'", parallel.groups)
        problems.facts += _changed(names, parallel)
        problems.facts += _own_tensors(rest.get("callbacks", {}), parallel)
        problems.raise_together()
        for key in _HYPER:
            if key in rest:
                rest[key] = _sayable(rest[key], key)
        states = _loaders(rest) or []
        self._saving = save_training(
            path,
            target_of(parallel),
            [_plain(o) for o in optimizers] if full else [],
            extra=Extra({_TRAINER: rest}, None if all(map(is_position, states)) else states),
            only=names,
            asynchronous=self.asynchronous,
        )

    def load(
        self,
        parallel: ParallelModel,
        optimizers: Sequence[Optimizer | LightningOptimizer],
        path: str | Path,
        *,
        strict: bool,
        resume: bool,
    ) -> dict[str, Any]:
        """Fill parameters, buffers and optimizers from the folder ``path``.

        Returns:
            the Trainer's state.

        Communication: that of ``nemo2.load``.
        Raises: CheckpointError on all ranks alike.
        """
        chosen = [_plain(o) for o in optimizers]
        restored = load_training(path, target_of(parallel), chosen, strict=strict, resume=resume)
        extra = restored.loaded.extra
        if not isinstance(extra, dict) or _TRAINER not in extra:
            raise CheckpointError(
                f"'{path}' has no Trainer's state: it was saved by nemo2.save\n"
                "  options: nemo2.load(path, model) in on_fit_start, for the weights |"
                " nemo2.load(path, model, optimizer=...) and your own loop"
            )
        trainer: dict[str, Any] = extra[_TRAINER]
        self._positions = []
        if resume:
            if restored.own is not None:
                _fit_state(trainer)["combined_loader"] = restored.own
            states = _loaders(trainer) or []
            self._positions = [state for state in states if is_position(state)]
            self._generators = restored.generators
            if restored.own is None and len(self._positions) < len(states):
                raise CheckpointError(
                    f"cannot go on from '{path}' on another mesh: a dataloader with its own"
                    " state_dict says what one rank has read\n"
                    "  options: the same mesh | a map-style dataset in a torch DataLoader, whose"
                    " samples are dealt out"
                )
        return trainer

    def followed(self, trainer: Trainer, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Return a training loader that knows where it stands, and goes on where it was saved."""
        made = dealt(loader, partial(under_way, trainer))
        if self._positions and trainer.fit_loop.is_resuming:
            go_on(trainer, made, self._positions.pop(0), self._generators)
        return made

    def remove(self, path: str | Path) -> None:
        """Remove a checkpoint, but not before the save under way has made another one."""
        now = partial(files.remove, Path(path))
        if self._saving is None:
            now()
        else:
            self._saving.then(now)

    def end(self) -> None:
        """Wait for a save under way; after a failure only for this rank's part of it.

        Communication: one all-gather of objects over the world, if there was one.
        """
        saving, failed = self._saving, self.failed
        self._saving, self.failed, self._prepared = None, False, False
        if saving is not None and failed:
            saving.give_up()
            saving.join()
        elif saving is not None and self.asynchronous:
            saving.wait()
        HOST.release()


def has_trainer_state(index: Index, *, fitting: bool) -> bool:
    """Say whether a Trainer has saved a checkpoint; to go on fitting, not the weights alone."""
    extra = decode(index.extra)
    state = extra.get(_TRAINER) if isinstance(extra, dict) else None
    return isinstance(state, dict) and ("callbacks" in state or not fitting)


def _changed(names: Mapping[str, Any], parallel: ParallelModel) -> list[str]:
    """Return what hooks have put into the ``state_dict`` that is not the model's own."""
    mine = model_state(parallel)
    strange = [n for n in names if n not in mine]
    other = [n for n in names if n in mine and not _same_memory(names[n], mine[n])]
    facts = [f"the state_dict has '{n}', which the model does not have" for n in strange[:4]]
    facts += [f"the state_dict has other values for '{n}' than the model" for n in other[:4]]
    if facts:
        facts.append("options: change the model itself | keep plain data in the checkpoint")
    return facts


def _own_tensors(callbacks: Mapping[str, Any], parallel: ParallelModel) -> list[str]:
    """Return which tensors of callbacks differ from rank to rank: a checkpoint would hold one.

    Communication: one all-gather of objects over the world.
    """
    tree: Any = callbacks
    buffers = {name for name, _ in parallel.module.named_buffers()}
    paths, leaves, _ = optree.tree_flatten_with_path(tree, none_is_leaf=True)
    mine = {
        path: zlib.crc32(bytes_of(x.detach().cpu()))
        for path, x in zip(paths, leaves, strict=True)
        if isinstance(x, Tensor)
        and not isinstance(x, DTensor)
        and x.numel() > 1
        and path[-1] not in buffers  # rank 0's, as they are in the model
    }
    ranks: list[Any] = [None] * parallel.groups.sizes.world
    dist.all_gather_object(ranks, mine, group=parallel.groups.world)
    facts = [
        f"the callback {path[0]} keeps a tensor that differs from rank to rank: {list(path[1:])}"
        for path in dict.fromkeys(path for rank in ranks for path in rank)
        if len({rank.get(path) for rank in ranks}) > 1
    ]
    if facts:
        facts[4:] = [
            "options: for what is like the weights a dict by the parameters' names of"
            " p.detach().clone(), without to_local(): it is saved with them, and loaded on any mesh"
        ]
    return facts


def _same_memory(given: Any, own: Tensor) -> bool:
    return isinstance(given, Tensor) and local_of(given).data_ptr() == local_of(own).data_ptr()


def _sayable(hyper: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the hyperparameters that are plain data; a warning names the others."""
    kept = {}
    for name, value in hyper.items():
        try:
            encode(value, name)
        except CheckpointError:
            rank_zero_warn(
                f"{key}: '{name}' is a {type(value).__name__}, which a checkpoint does not hold;"
                " it is left out (save_hyperparameters(ignore=[...]) says so)"
            )
        else:
            kept[name] = value
    return kept


def _fit_state(trainer: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = trainer.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    return found


def _loaders(trainer: Mapping[str, Any]) -> list[Any] | None:
    """Return the states of the training dataloaders that have one."""
    return _fit_state(trainer).get("combined_loader")

"""``save`` and ``load``: checkpoints of training, and folders of weights; any mesh reads both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim import Optimizer

from .errors import CheckpointError

if TYPE_CHECKING:
    from .checkpoint.load import Loaded
    from .checkpoint.saving import Saving


def save(
    path: str | Path,
    model: nn.Module,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    extra: Any = None,
    format: Literal["dcp", "safetensors"] = "dcp",
    asynchronous: bool = False,
) -> Saving | None:
    """Write a checkpoint to the folder ``path``; called on all ranks.

    With ``format="dcp"`` it is the state of training under original names, which ``load`` gives
    back on any mesh: weights, optimizers, random numbers, what dropout is keyed by. An earlier
    one at ``path`` is replaced when the new one is complete; docs/checkpoints.md has the rest.

    With ``format="safetensors"`` it is a Hugging Face folder of the weights: ``from_pretrained``
    opens it when the model is one of transformers, whose config is written too. Weights of an
    earlier save are replaced. Each pipeline stage writes its own files, of at most 5 GB, from its
    first rank, which holds one file's tensors at a time; the others hold one tensor.

    Args:
        model: a ``ParallelModel``; a module inside of its ``module``, such as the model that a
            LightningModule holds; or a module on one device, which one process saves alone.
        optimizer: of the model's parameters, or several.
        extra: plain data: numbers, texts, lists, tuples, dicts, small tensors, such as
            ``scheduler.state_dict()``. Rank 0's is saved.
        asynchronous: only copy the tensors to host memory now, which is kept for the next save,
            and write in the background. An error there is raised by the next ``save`` or
            ``load``, or by ``wait``.

    Returns:
        with ``format="dcp"`` the save, with ``wait()``; else None.

    Communication: dcp: four all-gathers of objects over the world and a broadcast; asynchronous
        three, and one when it is waited for. safetensors: gathers each tensor over tp and dp of
        its stage; six all-gathers of objects over the world.
    Raises: CheckpointError on all ranks alike, naming the ranks that cannot write.
    """
    if format not in ("dcp", "safetensors"):
        raise CheckpointError(
            f"format={format!r} is unknown\n  options: format='dcp' | format='safetensors'"
        )
    from .checkpoint.target import target_of

    target = target_of(model)
    if format == "dcp":
        from .checkpoint.training import Extra, save_training

        return save_training(
            path, target, _several(optimizer), extra=Extra(extra), asynchronous=asynchronous
        )
    asked = {"optimizer=": optimizer, "extra=": extra, "asynchronous=": asynchronous or None}
    given = [what for what, value in asked.items() if value is not None]
    if given:
        raise CheckpointError(
            f"a folder of weights cannot have {' and '.join(given)}\n"
            "  options: format='dcp' | format='safetensors' for the weights alone"
        )
    from .checkpoint.save import save_folder

    save_folder(path, target)
    return None


def load(
    path: str | Path,
    model: nn.Module,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    strict: bool = True,
) -> Loaded:
    """Fill ``model`` from a checkpoint or a Hugging Face folder; called on all ranks.

    Each rank reads the bytes of its own shards, whatever the mesh, and converts them to the
    parameter's dtype. With ``optimizer`` training goes on where it was: the optimizer's state,
    its groups' options, random numbers and dropout are those of the save; on another mesh the
    generators of all ranks are rank 0's. Without it only the weights are taken.

    A model of transformers also takes Hugging Face files whose names transformers changes: with
    or without the base model's prefix, experts one by one.

    Args:
        path: what ``save`` or MegatronStrategy wrote; a folder with ``model.safetensors`` or an
            index of such files, or one such file. The same on every rank. Tied weights are in it
            under any of their names.
        model: a ``ParallelModel``; a module inside of its ``module``, whose own names the file
            has; or a module on one device. Gradients stay as they are.
        optimizer: of the same kind, with the same groups, as the saved one; or several.
        strict: whether missing and unexpected tensors are an error.

    Returns:
        ``Loaded``: the names in ``missing`` (left as they were) and ``unexpected`` (not read), and
        the ``extra`` of the save.

    Communication: three all-gathers of objects over the world.
    Raises: CheckpointError on all ranks alike, naming tensors and their shapes, files that are
        missing, truncated or altered, and ranks that cannot read. Nothing has changed then,
        unless a disk fails while it is read.
    """
    from .checkpoint.agree import Problems
    from .checkpoint.index import Index, is_checkpoint, is_unfinished
    from .checkpoint.target import target_of

    target = target_of(model)
    ours = is_checkpoint(Path(path))
    Problems(f"cannot load '{path}'", target.groups).raise_together(ours)
    if ours:
        from .checkpoint.restoring import load_training

        optimizers = _several(optimizer)
        resume = bool(optimizers)
        return load_training(path, target, optimizers, strict=strict, resume=resume).loaded
    if optimizer is not None or is_unfinished(Path(path)):
        Index.read(Path(path))  # says why it is none
    from .checkpoint.load import load_folder

    return load_folder(path, target, strict=strict)


def _several(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    if optimizer is None:
        return ()
    return (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)

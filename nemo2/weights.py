"""``save`` and ``load``: a model's weights in files that any mesh reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from .errors import CheckpointError

if TYPE_CHECKING:
    from .checkpoint.load import Loaded


def save(
    path: str | Path,
    model: nn.Module,
    *,
    optimizer: Any = None,
    extra: Any = None,
    format: Literal["dcp", "safetensors"] = "dcp",
) -> None:
    """Write the weights of ``model`` to the folder ``path``; called on all ranks.

    With ``format="safetensors"`` it is a Hugging Face folder: ``from_pretrained`` opens it when
    the model is one of transformers, whose config is written too. Weights of an earlier save are
    replaced. Each pipeline stage writes its own files, of at most 5 GB, from its first rank, which
    holds one file's tensors at a time; the others hold one tensor.

    Args:
        model: a ``ParallelModel``; a module inside of its ``module``, such as the model that a
            LightningModule holds; or a module on one device, which one process saves alone.
        optimizer, extra: not yet.
        format: ``"safetensors"``; ``"dcp"`` not yet.

    Communication: gathers each tensor over tp and dp of its stage; five all-gathers of objects
        over the world.
    Raises: CheckpointError on all ranks alike, naming the ranks that cannot write.
    """
    if format not in ("dcp", "safetensors"):
        raise CheckpointError(f"format={format!r} is unknown\n  options: format='safetensors'")
    asked = {"format='dcp'": format == "dcp", "optimizer=": optimizer is not None}
    _refuse("save", asked | {"extra=": extra is not None}, ", format='safetensors'")
    from .checkpoint.save import save_folder
    from .checkpoint.target import target_of

    save_folder(path, target_of(model))


def load(
    path: str | Path, model: nn.Module, *, optimizer: Any = None, strict: bool = True
) -> Loaded:
    """Fill the weights of ``model`` from a Hugging Face folder; called on all ranks.

    Each rank reads the bytes of its own shards, whatever the mesh, and converts them to the
    parameter's dtype. A model of transformers also takes files whose names transformers changes:
    with or without the base model's prefix, experts one by one.

    Args:
        path: a folder with ``model.safetensors`` or an index of such files, or one such file; the
            same on every rank. Tied weights are in it under any of their names.
        model: a ``ParallelModel``; a module inside of its ``module``, whose own names the file
            has; or a module on one device. Gradients stay as they are.
        optimizer: not yet.
        strict: whether missing and unexpected tensors are an error.

    Returns:
        ``Loaded``: the names in ``missing`` (left as they were) and ``unexpected`` (not read).

    Communication: two all-gathers of objects over the world.
    Raises: CheckpointError on all ranks alike, naming tensors and their shapes, files, and ranks
        that cannot read. Nothing has changed then, unless a disk fails while it is read.
    """
    _refuse("load", {"optimizer=": optimizer is not None}, "")
    from .checkpoint.load import load_folder
    from .checkpoint.target import target_of

    return load_folder(path, target_of(model), strict=strict)


def _refuse(name: str, asked: dict[str, bool], how: str) -> None:
    """Raise for what is asked and not built."""
    given = [what for what, is_given in asked.items() if is_given]
    if given:
        raise CheckpointError(
            f"nemo2.{name} cannot do {' and '.join(given)} yet\n"
            f"  options: nemo2.{name}(path, model{how}) for the weights"
            " | MegatronStrategy saves optimizers and loops, too"
        )

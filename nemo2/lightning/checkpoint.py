"""Checkpoints of a run: a folder with tensors by torch.distributed.checkpoint, and metadata.

Tensors are saved under original parameter names, each by the first stage that holds it, and so
can be read on another mesh. The metadata (loops, callbacks, schedulers, hyperparameters) is read
with ``torch.load(weights_only=True)``; the index of the tensors is torch's own and pickled.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..errors import CheckpointError
from ..model import ParallelModel
from ..sharding.state import buffer_owner, persistent_buffers
from ..sharding.storage import Entry, local_of

METADATA = "meta.pt"  # the names that Lightning's own sharded checkpoints use
RUN = "nemo2"


def model_state(parallel: ParallelModel) -> dict[str, Tensor]:
    """Return name -> tensor of the parameters and buffers that this rank's stage owns."""
    here = parallel.groups.pp_rank
    state: dict[str, Tensor] = {
        e.name: e.view.detach() for e in parallel.storage if here == e.plan.ranks[0]
    }
    return state | {
        n: b
        for n, b in persistent_buffers(parallel.module).items()
        if buffer_owner(parallel.plan, n) == here
    }


def optimizer_state(
    parallel: ParallelModel, optimizer: Optimizer | LightningOptimizer
) -> dict[str, Any]:
    """Return the state of one optimizer by parameter name, and its groups without parameters."""
    optimizer = _plain(optimizer)
    state = {}
    for entry in _entries(parallel, optimizer):
        if parallel.groups.pp_rank == entry.plan.ranks[0]:
            state[entry.name] = dict(optimizer.state.get(entry.view, {}))
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return {"state": state, "param_groups": groups}


def save(parallel: ParallelModel, checkpoint: dict[str, Any], filepath: Any) -> None:
    """Write ``checkpoint``, as the Trainer made it, to the folder ``filepath``.

    Communication: that of torch.distributed.checkpoint, over the world.
    """
    path = Path(filepath)
    if dist.get_rank() == 0:
        if path.is_file():
            path.unlink()
        elif (path / METADATA).is_file():
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
    dist.barrier(group=parallel.groups.world)
    checkpoint = dict(checkpoint)
    tensors: dict[str, Any] = {"state_dict": checkpoint.pop("state_dict")}
    groups, others = [], []
    for i, given in enumerate(checkpoint.pop("optimizer_states", [])):
        tensors[f"optimizer_{i}"] = {
            "state": {
                name: {k: v for k, v in values.items() if isinstance(v, Tensor)}
                for name, values in given["state"].items()
            }
        }
        groups.append(given["param_groups"])
        others.append(
            {
                name: {k: _described(v) for k, v in values.items()}
                for name, values in given["state"].items()
            }
        )
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, others)
    merged = [{n: v for part in everyone for n, v in part[i].items()} for i in range(len(others))]
    save_tensors(tensors, checkpoint_id=path)
    if dist.get_rank() == 0:
        checkpoint[RUN] = {
            "steps": parallel.steps,
            "seed": parallel.seed,
            "param_groups": groups,
            "optimizer_values": merged,
        }
        torch.save(checkpoint, path / METADATA)
    dist.barrier(group=parallel.groups.world)


def load(
    parallel: ParallelModel,
    optimizers: Sequence[Optimizer],
    filepath: Any,
    *,
    strict: bool,
    weights_only: bool | None,
) -> dict[str, Any]:
    """Fill parameters, buffers and optimizers from the folder ``filepath``; return the metadata.

    Raises: CheckpointError on all ranks alike for what is missing.
    Communication: that of torch.distributed.checkpoint, over the world.
    """
    path = Path(filepath)
    problems: list[str] = []
    metadata: dict[str, Any] = {}
    run: dict[str, Any] = {}
    target: dict[str, Any] = {}
    try:
        metadata = _read_metadata(path, weights_only)
        run = metadata.get(RUN, {})
        saved = FileSystemReader(path).read_metadata().state_dict_metadata
        target, problems = _target(parallel, optimizers, run, saved, strict)
    except CheckpointError as error:
        problems = [str(error)]
    _raise_together(path, problems)
    load_tensors(target, checkpoint_id=path)
    parallel.take_fused(target["state_dict"])
    for i, optimizer in enumerate(optimizers):
        _fill_optimizer(parallel, optimizer, i, run, target)
    parallel.steps, parallel.seed = run["steps"], run["seed"]
    return metadata


def _target(
    parallel: ParallelModel,
    optimizers: Sequence[Optimizer],
    run: Mapping[str, Any],
    saved: Mapping[str, Any],
    strict: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Return the tensors to read into, and what is missing."""
    wanted: dict[str, Tensor] = dict(parallel.state_dict()) | persistent_buffers(parallel.module)
    missing = [n for n in wanted if f"state_dict.{n}" not in saved]
    problems = [f"no tensor for '{n}'" for n in missing] if strict else []
    model = {n: t for n, t in wanted.items() if n not in missing}
    for name, tensor in model.items():
        size = tuple(saved[f"state_dict.{name}"].size)
        if size != tuple(tensor.shape):
            problems.append(f"'{name}' has shape {tuple(tensor.shape)}, the checkpoint {size}")
    target: dict[str, Any] = {"state_dict": model}
    values = run.get("optimizer_values", [])
    if optimizers and len(values) != len(optimizers):
        problems.append(f"{len(optimizers)} optimizers, the checkpoint has {len(values)}")
        return target, problems
    for i, optimizer in enumerate(optimizers):
        groups = run["param_groups"][i]
        if len(groups) != len(optimizer.param_groups):
            problems.append(
                f"optimizer {i} has {len(optimizer.param_groups)} parameter groups, "
                f"the checkpoint {len(groups)}"
            )
        state: dict[str, dict[str, Tensor]] = {}
        for entry in _entries(parallel, optimizer):
            for key, value in values[i].get(entry.name, {}).items():
                if isinstance(value, _TENSORS):
                    item = saved[f"optimizer_{i}.state.{entry.name}.{key}"]
                    made = _empty(parallel, entry, value, item)
                    state.setdefault(entry.name, {})[key] = made
        target[f"optimizer_{i}"] = {"state": state}
    return target, problems


_TENSORS = str  # how a tensor is described: "like the parameter" or "plain"


def _described(value: Any) -> Any:
    """Return a number as it is, and for a tensor how it is laid out."""
    if isinstance(value, DTensor):
        return "like the parameter"
    if isinstance(value, Tensor):
        return "plain"
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise CheckpointError(
        f"cannot save optimizer state of type {type(value).__name__}: only tensors and numbers are"
    )


def _empty(parallel: ParallelModel, entry: Entry, described: str, saved: Any) -> Tensor:
    dtype = saved.properties.dtype
    if described == "plain":
        return torch.empty(tuple(saved.size), dtype=dtype)
    return entry.wrap(torch.empty_like(entry.local, dtype=dtype), parallel.storage.mesh)


def _fill_optimizer(
    parallel: ParallelModel,
    optimizer: Optimizer,
    index: int,
    run: Mapping[str, Any],
    target: Mapping[str, Any],
) -> None:
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for entry in _entries(parallel, optimizer):
        group = group_of[id(entry.view)]
        on_device = group.get("capturable") or group.get("fused")
        state: dict[str, Any] = {}
        for key, value in run["optimizer_values"][index].get(entry.name, {}).items():
            state[key] = value
            if isinstance(value, _TENSORS):
                read = target[f"optimizer_{index}"]["state"][entry.name][key]
                moves = not isinstance(read, DTensor) and (on_device or key != "step")
                state[key] = read.to(local_of(entry.view).device) if moves else read
        if state:
            optimizer.state[entry.view] = state
    for group, saved in zip(optimizer.param_groups, run["param_groups"][index], strict=True):
        group.update(saved)


def _read_metadata(path: Path, weights_only: bool | None) -> dict[str, Any]:
    file = path / METADATA
    if not file.is_file():
        kind = (
            "a file"
            if path.is_file()
            else "no folder"
            if not path.exists()
            else "a folder without it"
        )
        raise CheckpointError(
            f"expected a folder with {METADATA}, as MegatronStrategy saves it; found {kind}"
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=weights_only)  # type: ignore[no-any-return]
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{METADATA} holds objects that are not plain data ({reason})\n"
            "  options: if you trust the file, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 | "
            "save plain hyperparameters"
        ) from error


def _raise_together(path: Path, problems: list[str]) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problems)
    found = list(dict.fromkeys(p for part in everyone for p in part))
    if found:
        raise CheckpointError(f"cannot load '{path}':\n" + "\n".join(f"  {p}" for p in found))


def _entries(parallel: ParallelModel, optimizer: Optimizer) -> list[Entry]:
    chosen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [e for e in parallel.storage if id(e.view) in chosen]


def _plain(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer

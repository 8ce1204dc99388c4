"""Loading the state of training, saved on any mesh, into a model and optimizers on this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sharding.slices import Box, Part
from .agree import Problems
from .beside import put_in, stored_beside
from .folder import check_safetensors
from .generators import set_generator_states
from .index import MODEL, OPTIMIZER, Index
from .load import LENIENT, Loaded, left_out
from .plain import decode
from .shards import params_of
from .storage import Wanted, read_into
from .target import Item, Target
from .training import device_of, failures_of_last, local_path, mesh_of, rank_of


@dataclass(frozen=True)
class Restored:
    """What was loaded.

    Attributes:
        own: what this rank alone had saved; None when the mesh was another one.
        same_mesh: whether the mesh is the one that was saved on.
        generators: the states of the random generators at the time of the save.
    """

    loaded: Loaded
    own: Any
    same_mesh: bool
    generators: Any


def load_training(
    path: str | Path,
    target: Target,
    optimizers: Sequence[Optimizer] = (),
    *,
    strict: bool,
    resume: bool,
) -> Restored:
    """Fill model and optimizers from a checkpoint of any mesh.

    Args:
        resume: whether generators and what dropout is keyed by are set, too.

    Communication: two all-gathers of objects over the world.
    Raises: CheckpointError on all ranks alike; before anything is changed, unless the disk fails.
    """
    groups = target.groups
    problems = Problems(f"cannot load '{path}' into {type(target.module).__name__}", groups)
    problems.failures += failures_of_last()
    plan = _Plan(Index(Path(path), "", {}), target, problems)
    rank, world = rank_of(groups)
    with problems.caught():
        check_safetensors()
        plan = _Plan(Index.read(local_path(path)), target, problems)
        problems.facts += plan.index.check_sizes()
        plan.want_model(strict)
        plan.want_optimizers(optimizers)
        plan.want_beside()
        if not problems.facts:
            for name in list(plan.index.files)[rank::world]:
                problems.facts += plan.index.check_bytes(name)
    problems.raise_together((plan.index.token, plan.missing, plan.unexpected))
    with problems.caught(), torch.no_grad():
        read_into(plan.index, plan.wanted)
    problems.raise_together(note="some parameters hold the checkpoint's values already")
    index = plan.index
    for number, optimizer in enumerate(optimizers):
        _fill(optimizer, target, index.optimizers[number], plan.states[number])
    same = dict(index.mesh) == mesh_of(target) and len(index.ranks) == world
    own = decode(index.ranks[rank if same else 0])
    if resume:
        set_generator_states(own["generators"], device_of(target))
        if target.parallel is not None and index.run:
            draws = target.parallel.draws
            draws.seed, draws.steps = index.run["seed"], index.run["steps"]
    extra = decode(index.extra)
    put_in(extra, plan.beside)
    loaded = Loaded(tuple(plan.missing), tuple(plan.unexpected), extra)
    return Restored(loaded, own["own"] if same else None, same, own["generators"])


class _Plan:
    """What is read from a checkpoint into this rank's memory; what stands against it is noted."""

    def __init__(self, index: Index, target: Target, problems: Problems) -> None:
        self.index, self.target, self.problems = index, target, problems
        self.wanted: dict[str, Wanted] = {}
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.states: list[dict[str, dict[str, Any]]] = []
        self.beside: dict[tuple[str, ...], Tensor] = {}
        # Any name of a parameter -> the one that it has in the checkpoint.
        self.names = {n.removeprefix(MODEL): n.removeprefix(MODEL) for n in _model_names(index)}
        for first, others in index.aliases.items():
            if first in self.names:
                self.names = dict.fromkeys(others, first) | self.names

    def saved_as(self, item: Item) -> str | None:
        """Return the name that an item has in the checkpoint."""
        return next((self.names[name] for name in item.names if name in self.names), None)

    def want_model(self, strict: bool) -> None:
        """Note the memory of parameters and buffers to fill."""
        used = set()
        for item in self.target.items:
            there = dict.fromkeys(self.names[name] for name in item.names if name in self.names)
            used |= set(there)
            if not there:
                self.missing.append(item.name)
            elif len(there) > 1:
                self.problems.facts.append(
                    f"'{item.name}' is tied, and the checkpoint has {len(there)} tensors for it"
                )
            elif self._fits(item, MODEL + next(iter(there)), f"'{item.name}'"):
                assert item.local is not None
                self.wanted[MODEL + next(iter(there))] = Wanted(item.local, item.parts)
        self.unexpected = [n for n in map(_bare, _model_names(self.index)) if n not in used]
        if strict and (self.missing or self.unexpected):
            count = len(self.target.items)
            self.problems.facts += left_out(self.missing, self.unexpected, count, "checkpoint")
            self.problems.options = LENIENT

    def _fits(self, item: Item, name: str, shown: str) -> bool:
        """Say whether this rank reads a tensor of the layout of ``item``; note why not."""
        info = self.index.tensors[name]
        floats = info.dtype.is_floating_point, item.dtype.is_floating_point
        if info.shape != item.shape:
            what = f"has shape {item.shape}, in the checkpoint {info.shape}"
        elif floats[0] != floats[1]:
            what = f"is {item.dtype}, in the checkpoint {info.dtype}"
        else:
            return item.local is not None
        self.problems.facts.append(f"{shown} {what}")
        return False

    def want_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Make the memory of the optimizers' new state, and note it to be filled."""
        if not optimizers:
            return
        saved = self.index.optimizers
        if len(saved) != len(optimizers):
            self.problems.facts.append(
                f"{len(optimizers)} optimizers are to be loaded; the checkpoint has {len(saved)}"
            )
            return
        for number, optimizer in enumerate(optimizers):
            found = self._misfits(optimizer, saved[number])
            self.problems.facts += [f"optimizer {number}: {what}" for what in found]
            state: dict[str, dict[str, Any]] = {}
            if not found:
                for name, (item, _) in params_of(self.target, optimizer).items():
                    state[name] = self._state_of(item, number, saved[number]["state"])
            self.states.append(state)

    def _state_of(self, item: Item, number: int, saved: Mapping[str, Any]) -> dict[str, Any]:
        there = self.saved_as(item) or item.name
        state: dict[str, Any] = {}
        for key, described in saved.get(there, {}).items():
            if not isinstance(described, dict) or "$like" not in described:
                state[key] = decode(described)
                continue
            name = f"{OPTIMIZER}{number}.{there}.{key}"
            info = self.index.tensors[name]
            if not described["$like"]:
                state[key] = torch.empty(info.shape, dtype=info.dtype)
                whole = Part(Box.whole(info.shape), (0,) * len(info.shape))
                self.wanted[name] = Wanted(state[key], (whole,))
            elif self._fits(item, name, f"the optimizer's '{key}' of '{item.name}'"):
                state[key] = self._like(item, name)
        return state

    def _like(self, item: Item, name: str) -> Tensor:
        """Make the memory of a tensor laid out as ``item``, and note it to be filled."""
        assert item.local is not None
        local = torch.empty_like(item.local, dtype=self.index.tensors[name].dtype)
        self.wanted[name] = Wanted(local, item.parts)
        return item.wrap(local)

    def want_beside(self) -> None:
        """Make the memory of what plain data keeps under parameters' names, to be filled."""
        for name, path, item in stored_beside(self.index, self.target):
            if self._fits(item, name, f"'{item.name}' in {list(path[:-1])}"):
                self.beside[path] = self._like(item, name)

    def _misfits(self, optimizer: Optimizer, saved: Mapping[str, Any]) -> list[str]:
        """Return why an optimizer cannot take what was saved."""
        kind, groups = type(optimizer).__name__, len(optimizer.param_groups)
        if kind != saved["class"]:
            return [f"it is {kind}, the checkpoint has the state of {saved['class']}"]
        if groups != len(saved["groups"]):
            return [f"it has {groups} parameter groups, in the checkpoint {len(saved['groups'])}"]
        params = params_of(self.target, optimizer)
        group_of = {name: g for g, group in enumerate(saved["groups"]) for name in group["params"]}
        problems = []
        for item in self.target.items:
            mine = params[item.name][1] if item.name in params else None
            there = group_of.get(self.saved_as(item) or "")
            if item.param is not None and mine != there:
                problems.append(f"'{item.name}' is {_of(mine)}, in the checkpoint {_of(there)}")
        return problems


def _model_names(index: Index) -> list[str]:
    return [name for name in index.tensors if name.startswith(MODEL)]


def _bare(name: str) -> str:
    return name.removeprefix(MODEL)


def _of(group: int | None) -> str:
    return "in none of its groups" if group is None else f"in group {group}"


def _fill(
    optimizer: Optimizer,
    target: Target,
    saved: Mapping[str, Any],
    states: Mapping[str, dict[str, Any]],
) -> None:
    """Give an optimizer the state that was read, and the options of its groups."""
    for name, (item, number) in params_of(target, optimizer).items():
        assert item.param is not None
        assert item.local is not None
        optimizer.state.pop(item.param, None)
        group = optimizer.param_groups[number]
        on_device = group.get("capturable") or group.get("fused")
        state = {}
        for key, value in states[name].items():
            moves = isinstance(value, Tensor) and (on_device or key != "step")
            state[key] = value.to(item.local.device) if moves else value
        if state:
            optimizer.state[item.param] = state
    for group, own in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(decode(own["options"]))

"""The log calls of one step, from all microbatches and ``dp`` ranks: one call for each name.

Values of tensors stay on the device; what is known of the calls themselves travels by the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh.groups import MeshGroups
from .metrics import MetricName

_REDUCTIONS: Mapping[Any, Any] = {
    given: reduction
    for reduction, ways in {
        torch.sum: ("sum", sum, torch.sum),
        torch.min: ("min", min, torch.min),
        torch.max: ("max", max, torch.max),
    }.items()
    for given in ways
}


@dataclass(frozen=True)
class Call:
    """One call of ``self.log`` (or, with ``name=None``, of ``self.print``)."""

    name: str | None
    value: Any
    dtype: torch.dtype | None
    options: dict[str, Any]


@dataclass(frozen=True)
class _Spot:
    """Where the value of a call stands among those of all."""

    index: int


def gather_calls(
    runs: Sequence[Sequence[Call]], groups: MeshGroups
) -> tuple[list[list[Call]], Tensor]:
    """Return the calls of each run of all dp ranks, and the values of tensors that they name.

    Communication: over ``dp`` one all-gather of objects, and one of float64 numbers.
    """
    values: list[Tensor] = []
    named: list[list[Call]] = []
    for calls in runs:
        named.append([])
        for call in calls:
            x = call.value
            if isinstance(x, Tensor):
                values.append(x.to(groups.device, torch.float64).reshape(()))
                x = _Spot(len(values) - 1)
            named[-1].append(replace(call, value=x))
    table = torch.stack(values) if values else torch.empty(0, device=groups.device)
    size = groups.sizes.dp
    if size == 1:
        return named, table
    every: list[Any] = [None] * size
    dist.all_gather_object(every, (len(values), named), group=groups.dp)
    most = max(count for count, _ in every)
    if most:
        own = torch.zeros(most, dtype=torch.float64, device=groups.device)
        own[: len(values)] = table
        parts = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(parts, own, group=groups.dp)
        table = torch.cat(parts)
    return [
        [_moved(call, rank * most) for call in calls]
        for rank, (_, part) in enumerate(every)
        for calls in part
    ], table


def _moved(call: Call, by: int) -> Call:
    spot = call.value
    return replace(call, value=_Spot(spot.index + by)) if isinstance(spot, _Spot) else call


def combine(runs: Sequence[Sequence[Call]], table: Tensor) -> list[Call]:
    """Return one call for each (name, how often it was called before), in the order met."""
    numbers = table.unbind()
    together: dict[tuple[str | None, int], list[Call]] = {}
    for calls in runs:
        seen: dict[str | None, int] = {}
        for call in calls:
            number = seen[call.name] = seen.get(call.name, -1) + 1
            together.setdefault((call.name, number), []).append(call)
    combined: list[Call] = []
    for (name, _), same in together.items():
        if name is None:
            combined += same
        else:
            combined.append(_combine_same(same, numbers))
    return combined


def _combine_same(calls: list[Call], numbers: Sequence[Tensor]) -> Call:
    first = calls[0]
    options = dict(first.options)
    sizes = [c.options.get("batch_size") for c in calls]
    weights = [1.0 if s is None else float(s) for s in sizes]
    if None not in sizes:
        options["batch_size"] = round(sum(weights))
    if isinstance(first.value, MetricName):
        return replace(first, options=options)
    on_device = any(isinstance(c.value, _Spot) for c in calls)
    if on_device:
        values = torch.stack([_on_device(c.value, numbers) for c in calls])
    else:
        values = torch.tensor([float(c.value) for c in calls], dtype=torch.float64)
    how = options.get("reduce_fx", "mean")
    reduction = _REDUCTIONS.get(how.lower() if isinstance(how, str) else how)
    value = reduction(values) if reduction is not None else _mean(values, weights)
    kind = first.dtype if first.dtype is not None and first.dtype.is_floating_point else None
    kind = kind or torch.get_default_dtype()
    made: Any = value.to(kind) if on_device else float(value)
    return replace(first, value=made, dtype=kind, options=options)


def _on_device(value: Any, numbers: Sequence[Tensor]) -> Tensor:
    if isinstance(value, _Spot):
        return numbers[value.index]
    return torch.full_like(numbers[0], float(value))  # a copy would wait for the device


def _mean(values: Tensor, weights: Sequence[float]) -> Tensor:
    if all(w == weights[0] for w in weights):
        return values.mean()
    counted = [v * w for v, w in zip(values.unbind(), weights, strict=True) if w]
    return torch.stack(counted).sum() / sum(weights)

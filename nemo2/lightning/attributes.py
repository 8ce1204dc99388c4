"""What a step leaves in its module's attributes: planning undoes it, a run brings it to all stages.

``self.outputs.append(loss)`` after the model's call runs on the last stage only. So that hooks find
the same everywhere, the changes that the last stage has made take the place of those of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..pytree import tree_leaves, tree_map

_MODULE_STATE = frozenset(vars(nn.Module()))
_OURS = ("log", "print")  # what the capture of logs puts there
_LARGEST = 1 << 20  # bytes of tensors that go to other stages after a step
_PLAIN = (bool, int, float, complex, str, bytes, type(None))

State = Mapping[str, tuple[Any, Any]]
"""Name -> (value, a copy if it is a list, dict or set)."""


def own_state(module: LightningModule) -> State:
    """Return the plain attributes of the user's module."""
    copied = (list, dict, set)
    return {
        name: (value, value.copy() if type(value) in copied else None)
        for name, value in vars(module).items()
        if name not in _MODULE_STATE and name not in _OURS
    }


def put_back(module: LightningModule, before: State) -> None:
    attributes = module.__dict__
    for name in [n for n in attributes if n not in before and n not in _MODULE_STATE]:
        if name not in _OURS:
            del attributes[name]
    for name, (value, copied) in before.items():
        attributes[name] = value
        if copied is not None:
            value.clear()
            value.extend(copied) if isinstance(value, list) else value.update(copied)


# --- on all stages


def changes(module: LightningModule, before: State) -> dict[str, Any]:
    """Return what has changed since, as plain data with tensors on the host.

    Lists as (what is kept of them, new items); of dicts the new items. Attributes that are neither
    plain data nor tensors stay as each stage has them; tensors of more than 1 MiB do, too, with a
    warning.
    """
    found = dict(_changed(module, before))
    size = 0
    for name, (_, value) in list(found.items()):
        own = sum(x.nbytes for x in tree_leaves(value) if isinstance(x, Tensor))
        size += own
        if size > _LARGEST:
            size -= own
            del found[name]
            rank_zero_warn(
                f"self.{name} holds {own} bytes of tensors after a step, too many to bring to the"
                " other stages after each one: it is on the last stage only\n"
                "  options: keep what the epoch needs of it: losses, counts, metrics"
            )
    return tree_map(_packed, found) if found else {}


def _changed(module: LightningModule, before: State) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name, (value, copied) in own_state(module).items():
        was, once = before.get(name, (_NEW, None))
        if name.startswith("_") or not all(map(_goes, tree_leaves(value))):
            continue
        if value is not was:
            yield name, ("set", value)
        elif isinstance(value, list):
            pairs = zip(value, once, strict=False)
            kept = next((i for i, (a, b) in enumerate(pairs) if a is not b), len(once))
            kept = min(kept, len(value))
            if kept < max(len(value), len(once)):
                yield name, (kept, value[kept:])
        elif isinstance(value, dict):
            new = {k: v for k, v in value.items() if k not in once or once[k] is not v}
            gone = [k for k in once if k not in value]
            if new or gone:
                yield name, (("dict", gone), new)
        elif copied is not None and copied != once:
            yield name, ("set", value)


def apply(
    module: LightningModule, before: State, found: Mapping[str, Any], device: torch.device
) -> None:
    """Make the changes of the last stage to this stage's attributes as they were before."""
    attributes = module.__dict__
    for name, (how, sent) in found.items():
        value = tree_map(partial(_unpacked, device=device), sent)
        was, once = before.get(name, (None, None))
        if how == "set":
            attributes[name] = value
        elif isinstance(how, int):
            was[:] = [*once[:how], *value]
            attributes[name] = was
        else:
            was.clear()
            was.update({k: v for k, v in once.items() if k not in how[1]} | value)
            attributes[name] = was


_NEW = object()


def _goes(x: Any) -> bool:
    return isinstance(x, _PLAIN) or (
        isinstance(x, Tensor) and not isinstance(x, (DTensor, nn.Parameter)) and not x.is_meta
    )


class _Sent:
    """A tensor on the host, and whether it belongs there; no dataclass, which is a tree."""

    def __init__(self, held: Tensor, host: bool) -> None:
        self.held, self.host = held, host


def _packed(x: Any) -> Any:
    return _Sent(x.detach().to("cpu", copy=True), x.is_cpu) if isinstance(x, Tensor) else x


def _unpacked(x: Any, device: torch.device) -> Any:
    if not isinstance(x, _Sent):
        return x
    return x.held if x.host else x.held.to(device)

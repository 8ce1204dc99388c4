"""What a step leaves in attributes: planning undoes it, and a run brings it to all stages.

A step is planned on shapes before it runs, and what it appends, counts or keeps then is put back.
``self.outputs.append(loss)`` after the model's call runs on the last stage only: what changed there
in the LightningModule's own attributes and buffers takes the place of what the others have.
"""

from __future__ import annotations

import io
import operator
import pickle
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..checkpoint.plain import bytes_of
from ..pipeline.absent import is_absent
from ..sharding.modes import suspended

_LARGEST = 1 << 20  # bytes of an attribute that goes to other stages after a step
_DEEPEST = 2000  # values that are looked into, of one attribute
_FEW = 1024  # bytes of an array that is compared in every step
_GONE = object()

# Module -> attributes that its steps change, as planning them showed: the same on all ranks.
_changing: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@cache
def _foreign(lightning: bool) -> frozenset[str]:
    """Return the attributes of a module that are not the user's."""
    made = vars(LightningModule()) if lightning else vars(nn.Module())
    return frozenset({*made, "log", "print", "forward"})


def _own(holder: Any) -> Iterator[str]:
    """Yield the names of the user's attributes of a module or callback."""
    foreign = _foreign(isinstance(holder, LightningModule))
    yield from [name for name in vars(holder) if name not in foreign]


# --- what a value holds


class Snapshot:
    """What a value holds, through containers and plain objects, to be compared and put back."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._held: list[tuple[Any, Any]] = []
        waiting, seen = [value], set[int]()
        while waiting and len(seen) < _DEEPEST:
            x = waiting.pop()
            if id(x) in seen or isinstance(x, _SIMPLE):
                continue
            seen.add(id(x))
            content = _content(x)
            if content is not None:
                self._held.append((x, content))
                waiting += _inside(content)[:_DEEPEST]
            elif isinstance(x, tuple):
                waiting += x[:_DEEPEST]

    @property
    def holds(self) -> bool:
        """Whether it may change without being another value."""
        return bool(self._held)

    def changed(self, now: Any) -> bool:
        return now is not self.value or any(_differs(x, content) for x, content in self._held)

    def appended_to(self, now: Any) -> int:
        """Return how long a list was that has since been appended to, and nothing else; or 0."""
        if now is not self.value or type(now) is not list or not self._held:
            return 0
        (_, before), *inner = self._held  # the value itself comes first
        if any(_differs(x, content) for x, content in inner) or len(before) > len(now):
            return 0
        return len(before) if all(map(operator.is_, before, now)) else 0

    def put_back(self) -> None:
        for x, content in self._held:
            if _differs(x, content):
                _fill(x, content)


_SIMPLE = (bool, int, float, complex, str, bytes, type(None), type, nn.Module, nn.Parameter)


def _content(x: Any) -> Any:
    """Return a copy of what ``x`` holds by itself; None of what is not looked into."""
    if isinstance(x, (list, dict, set, deque)):
        return (list if isinstance(x, (list, deque)) else dict if isinstance(x, dict) else set)(x)
    if isinstance(x, Tensor):
        if is_absent(x) or type(x) is not Tensor or x.is_meta or x.nbytes > _LARGEST:
            return None
        return x._version, x.detach().clone()
    if isinstance(x, np.ndarray):
        return x.copy() if x.nbytes <= _LARGEST else None
    return _Attributes(vars(x)) if _is_plain(x) else None


def _is_plain(x: Any) -> bool:
    """Say whether ``x`` is an object of a class of the user that is looked into.

    Not one that other threads may write to meanwhile.
    """
    if isinstance(x, _SIMPLE) or not isinstance(getattr(x, "__dict__", None), dict):
        return False
    threaded = any(type(v).__module__ in _THREADS for v in vars(x).values())
    kind: Any = type(x)
    return not threaded and _is_own(kind)


_THREADS = ("threading", "_thread", "queue", "_queue", "multiprocessing.queues", "asyncio.events")


@cache
def _is_own(kind: Any) -> bool:
    """Say whether a class was written by the user, and not for a library."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None:
        return bool(kind.__module__ == "__main__")
    paths = sysconfig.get_paths()
    return not str(file).startswith((paths["stdlib"], paths["purelib"], paths["platlib"]))


class _Attributes(dict[str, Any]):
    """Those of a plain object."""


def _inside(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return list(content.values())
    return list(content) if isinstance(content, (list, set)) else []


def _differs(x: Any, content: Any) -> bool:
    if isinstance(content, tuple):
        return bool(x._version != content[0])
    if isinstance(content, np.ndarray):
        return bool(x.tobytes() != content.tobytes())
    if isinstance(content, _Attributes):
        x = vars(x)
    if isinstance(content, set):
        return bool(x != content)
    if len(x) != len(content):
        return True
    if isinstance(content, dict):
        return not all(k in x and x[k] is v for k, v in content.items())
    return not all(map(operator.is_, x, content))


def _fill(x: Any, content: Any) -> None:
    """Let ``x`` hold ``content``, in place."""
    if isinstance(content, tuple):
        with torch.no_grad():
            x.copy_(content[1])
    elif isinstance(content, np.ndarray):
        x[...] = content
    elif isinstance(content, _Attributes):
        vars(x).clear()
        vars(x).update(content)
    elif isinstance(content, dict):
        dict.clear(x)
        dict.update(x, content)
    elif isinstance(content, set):
        x.clear()
        x.update(content)
    else:
        x.clear()
        x.extend(content)


# --- planning


class Undo:
    """The attributes of a module, of all modules in it and of callbacks, before a planning run.

    Attributes:
        complete: whether the run came to the step's end, and has shown all that it changes.
    """

    def __init__(self, module: LightningModule, callbacks: Iterable[Callback]) -> None:
        self.module, self.complete = module, True
        with suspended():
            self._before = [
                (holder, {name: Snapshot(vars(holder)[name]) for name in _own(holder)})
                for holder in (*module.modules(), *callbacks)
            ]

    def put_back(self) -> None:
        """Undo the run; note which attributes of the module it has changed."""
        with suspended():
            changing = _changing.setdefault(self.module, set())
            changing |= {n for n in _own(self.module) if n not in self._before[0][1]}
            for name, snapshot in self._before[0][1].items():
                now = vars(self.module).get(name, _GONE)
                if snapshot.changed(now) or (not self.complete and snapshot.holds):
                    changing.add(name)
            for holder, before in self._before:
                attributes = vars(holder)
                for name in [n for n in _own(holder) if n not in before]:
                    del attributes[name]
                for name, snapshot in before.items():
                    attributes[name] = snapshot.value
                    snapshot.put_back()


# --- on all stages


class Left:
    """What a step leaves in the attributes and buffers of its module, on the last stage.

    What planning has seen to change is looked into; of the rest it is seen that it is another
    object, holds others, or is a tensor that was written to.
    """

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        with suspended():
            own = _all(module)
            changing = _changing.get(module, set())
            self._deep = {n: Snapshot(own[n]) for n in changing if n in own}
            self._shallow = {n: (x, _mark(x)) for n, x in own.items() if n not in self._deep}

    def put_back(self) -> None:
        """Undo what a part of the step did that runs again."""
        with suspended():
            attributes = vars(self.module)
            for name in [n for n in _own(self.module) if n not in (*self._deep, *self._shallow)]:
                del attributes[name]
            for name, snapshot in self._deep.items():
                if name in attributes:
                    attributes[name] = snapshot.value
                snapshot.put_back()

    def changes(self) -> dict[str, tuple[Any, ...]]:
        """Return name -> what to do, for ``apply`` on the other stages."""
        with suspended():
            own, found = _all(self.module), {}
            for name in (*self._deep, *self._shallow):
                if name not in own:
                    found[name] = ("gone",)
            for name, x in own.items():
                if name in self._deep:
                    before = self._deep[name]
                    if before.changed(x):
                        found[name] = _message(x, before.value, before.appended_to(x))
                elif name not in self._shallow:
                    found[name] = _message(x, _GONE)
                elif self._shallow[name][0] is not x or self._shallow[name][1] != _mark(x):
                    found[name] = _message(x, self._shallow[name][0])
        return found


def _all(module: LightningModule) -> dict[str, Any]:
    """Return the user's attributes and the buffers of the module itself."""
    buffers = {name: x for name, x in module._buffers.items() if x is not None}
    return {name: vars(module)[name] for name in _own(module)} | buffers


def _mark(x: Any) -> Any:
    """Return what differs, at first sight, when a value has changed."""
    if isinstance(x, Tensor):
        return x._version
    if isinstance(x, np.ndarray):
        return x.tobytes() if x.nbytes <= _FEW else None
    if isinstance(x, (list, dict, set, deque)):
        few = len(x) <= _FEW // 8
        return tuple(map(id, x.values() if isinstance(x, dict) else x)) if few else len(x)
    return tuple(map(id, vars(x).values())) if _is_plain(x) else None


def _message(now: Any, was: Any, kept: int = 0) -> tuple[Any, ...]:
    """Say how another stage comes from its ``was`` to ``now``, a list whose first ``kept`` stay."""
    try:
        sent = _packed(now[kept:] if kept else now)
    except Exception:  # pickle raises what it likes
        return ("left", type(now).__name__)
    if len(sent) > _LARGEST:
        return ("large", len(sent))
    return ("grown", kept, sent) if kept else ("same" if now is was else "new", sent)


def apply(module: LightningModule, found: Mapping[str, tuple[Any, ...]], device: Any) -> None:
    """Make the changes of the last stage to this stage's attributes."""
    attributes = vars(module)
    for name, (how, *more) in found.items():
        old = module._buffers.get(name, attributes.get(name, _GONE))
        if how in ("left", "large"):
            _warn(module, name, how, more[0])
        elif how == "gone":
            attributes.pop(name, None)
        elif how == "grown" and isinstance(old, list):
            old[more[0] :] = _unpacked(more[1], device)
        else:
            new = _unpacked(more[-1], device)
            if how == "same" and type(old) is type(new) and _takes(old, new):
                continue
            (module._buffers if name in module._buffers else attributes)[name] = new


def _takes(old: Any, new: Any) -> bool:
    """Let an object hold what another of its type holds, if it can."""
    if isinstance(old, Tensor):
        if old.shape != new.shape or old.dtype != new.dtype:
            return False
        with torch.no_grad():
            old.copy_(new)
        return True
    content = new if isinstance(new, np.ndarray) else _content(new)
    if content is None or (isinstance(new, np.ndarray) and old.shape != new.shape):
        return False
    _fill(old, content)
    return True


_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _warn(module: nn.Module, name: str, how: str, what: Any) -> None:
    """Say once of each attribute that it stays where it is."""
    warned = _warned.setdefault(module, set())
    if name in warned:
        return
    warned.add(name)
    why = f"has {what} bytes" if how == "large" else f"is a {what} that cannot be sent"
    rank_zero_warn(
        f"self.{name} was changed by a step and {why}: it stays on the last stage, and the other"
        " stages have it as it was\n"
        "  options: keep what the epoch needs of it: losses, counts, metrics (1 MiB at most)"
    )


class _Pickler(pickle.Pickler):
    """Takes tensors apart into what any device can read."""

    def persistent_id(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        if isinstance(x, (DTensor, nn.Parameter)) or is_absent(x) or x.is_meta:
            raise pickle.PicklingError("a tensor of the model")
        if x.nbytes > _LARGEST:
            return (x.dtype, tuple(x.shape), b" " * (_LARGEST + 1), x.is_cpu)  # too large to go
        return (x.dtype, tuple(x.shape), bytes(bytes_of(x.detach().cpu())), x.is_cpu)


class _Unpickler(pickle.Unpickler):
    device: Any = None

    def persistent_load(self, pid: Any) -> Tensor:
        dtype, shape, data, host = pid
        held = (
            torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        )
        return held.reshape(shape) if host else held.reshape(shape).to(self.device)


def _packed(x: Any) -> bytes:
    made = io.BytesIO()
    _Pickler(made).dump(x)
    return made.getvalue()


def _unpacked(data: bytes, device: Any) -> Any:
    reader = _Unpickler(io.BytesIO(data))
    reader.device = device
    return reader.load()

"""The generators of Python and NumPy, which a step may draw from outside of torch."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def host_state() -> Any:
    """Return the states of ``random`` and, where it is in use, ``numpy.random``."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy.random.get_state() if numpy is not None else None


def set_host_state(state: Any) -> None:
    """Let both go on from a state that ``host_state`` returned."""
    own, of_numpy = state
    random.setstate(own)
    if of_numpy is not None:
        sys.modules["numpy"].random.set_state(of_numpy)


@contextmanager
def host_state_kept() -> Iterator[None]:
    """Undo what is drawn inside."""
    state = host_state()
    try:
        yield
    finally:
        set_host_state(state)

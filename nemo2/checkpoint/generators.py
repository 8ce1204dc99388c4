"""The random generators of a process, as plain data."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators of torch, of ``device`` on CUDA, Python and numpy."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state(legacy=False)
    return states


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators to ``states``; those of other devices stay as they are."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if "numpy" in states:
        import numpy as np

        np.random.set_state(states["numpy"])

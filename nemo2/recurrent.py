"""torch's recurrent layers, whose list of weights always has those that are in place.

``nn.RNNBase`` keeps a list of its weights, and makes it anew in the first forward after they have
changed. So two forwards would make different torch calls, where a plan wants the same; and on
CUDA making it anew moves the weights to other memory, away from what an optimizer updates.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import Any

from torch import nn


def follow_weights(model: nn.Module) -> ExitStack:
    """Let the recurrent layers of ``model`` use what is in place; closing the result undoes it.

    Not flattened into one chunk of memory: cuDNN copies the weights at each call, and says so once.
    """
    undo = ExitStack()
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            undo.callback(module.register_forward_pre_hook(_follow).remove)
    return undo


def _follow(module: Any, args: Any) -> None:
    weights = [getattr(module, name, None) for name in module._flat_weights_names]
    module.__dict__["_flat_weights"] = weights
    module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]

"""The planning run: absent tensors in a module's places, and a recorder around its calls."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Nemo2Error, PipelineError
from .pipeline.absent import Absent, NeedsValueError, to_meta
from .places import Place, in_order
from .record import Recorder
from .recurrent import follow_weights
from .sharding.functions import watched_functions
from .trace import Trace


@contextmanager
def planning(
    model: nn.Module,
    where: Sequence[Place],
    absent: Callable[[str], Absent],
    recorder: Recorder,
) -> Iterator[None]:
    """Put absent tensors in all places of parameters and watch all module calls; undo on exit."""
    with ExitStack() as undo:
        undo.enter_context(watched_functions(recorder.functions))
        undo.enter_context(unfused_layers())
        undo.enter_context(follow_weights(model))
        made: dict[str, Absent] = {}
        for place in where:
            if place.param not in made:
                made[place.param] = absent(place.param)
            _put(place, made[place.param], undo)
        in_order([place.module for place in where], where)
        for module in model.modules():
            for leaf, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[leaf] = _planning_buffer(buffer)
                    undo.callback(module._buffers.__setitem__, leaf, buffer)
        for name, module in model.named_modules():
            if name:
                _watch(name, module, recorder, undo)
        yield


@contextmanager
def unfused_layers() -> Iterator[None]:
    """Switch off the fused inference path of nn.TransformerEncoderLayer.

    It reads weights directly, so the parts of such a layer would be neither seen nor split.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave Python's collector off: a plan makes many objects that stay, and it walks them all."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _put(place: Place, absent: Absent, undo: ExitStack) -> None:
    attributes: dict[str, Any] = place.module.__dict__
    parameters: dict[str, Any] = place.module._parameters
    if place.leaf in attributes:
        undo.callback(attributes.__setitem__, place.leaf, attributes.pop(place.leaf))
        undo.callback(parameters.pop, place.leaf)
    else:
        undo.callback(parameters.__setitem__, place.leaf, parameters[place.leaf])
    parameters[place.leaf] = absent


def _planning_buffer(buffer: Tensor) -> Tensor:
    if buffer.is_meta:
        return Absent(to_meta(buffer), torch.device("cpu"))
    return buffer.clone()


def _watch(name: str, module: nn.Module, recorder: Recorder, undo: ExitStack) -> None:
    own = module.__dict__.get("forward")
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return recorder.call_module(name, module, original, args, kwargs)

    forward.__dict__["nemo2_watches"] = name, own
    module.__dict__["forward"] = forward
    if own is None:
        undo.callback(module.__dict__.pop, "forward")
    else:
        undo.callback(module.__dict__.__setitem__, "forward", own)


def run_step(step: Callable[[], Any], recorder: Recorder) -> Trace:
    """Run the user's step under ``recorder``; what it draws or prints is the user's."""
    cuda: Any = torch.cuda  # some of it is untyped upstream
    devices = [cuda.current_device()] if cuda.is_available() and cuda.is_initialized() else []
    complete, output = True, None
    with torch.random.fork_rng(devices=devices):
        try:
            with recorder:
                output = step()
        except NeedsValueError:
            if recorder.axes or not recorder.after_blocks() or not recorder.block_index:
                raise
            complete = False
        except Exception as error:
            if recorder.notes.closed and not isinstance(error, Nemo2Error):
                raise _assumed_wrongly(recorder.notes.closed, error) from error
            raise
    if recorder.block_index and recorder.position != len(recorder.block_index) - 1:
        if recorder.position == -1:
            raise PipelineError(
                f"the step calls none of the {len(recorder.block_index)} pipeline blocks\n"
                "  options: a loss that calls the module it is given: loss_fn(module, batch)"
            )
        missing = [n for n, i in recorder.block_index.items() if i > recorder.position]
        raise PipelineError(
            f"the step calls {recorder.position + 1} of {len(recorder.block_index)}"
            f" pipeline blocks; never called: {', '.join(missing[:4])}\n"
            "  options: call every block once a step (no random skipping)"
        )
    return recorder.trace(output, complete)


def _assumed_wrongly(closed: Sequence[str], error: Exception) -> PipelineError:
    names = ", ".join(f"'{name}'" for name in dict.fromkeys(closed))
    return PipelineError(
        f"the code of {names} reads values, is not planned, and was taken to return"
        f" one tensor like its first input; then: {type(error).__name__}: {error}\n"
        "  options: put the part that reads values into a module of its own that returns one"
        " tensor like its input | write it without reading values"
    )

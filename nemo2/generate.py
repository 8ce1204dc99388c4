"""``generate``: continue prompts with a model on any mesh, or on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .inference.cache import KVCache


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | Tensor] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Iterable[int] = (),
    seed: int = 0,
    use_cache: bool | None = None,
    step: Callable[[nn.Module, Tensor, KVCache | None], Any] | None = None,
    stream: Callable[[int, int], Any] | None = None,
    microbatches: int | None = None,
) -> list[Tensor]:
    """Return each prompt with its continuation, the same tokens on every mesh; called on all ranks.

    Runs on the live weights, in eval mode and without gradients; train mode, gradients and
    random generators are as before when it returns. All ranks pass the same prompts, which are
    dealt out over ``dp`` and ``cp`` and fill the pipeline in microbatches.

    Args:
        model: a ``ParallelModel``; a module inside of its ``module``, such as the model that a
            LightningModule holds; or a module on one device. A causal model of transformers; one
            whose ``forward(ids, cache=None)`` keeps keys and values in a ``KVCache``; or, without
            a cache, any causal ``forward(ids)``. It returns logits (batch, tokens, vocabulary).
        prompts: ids of each, of any lengths: lists, 1-d tensors, or a tensor (prompts, tokens).
        temperature: 0 takes the likeliest token; else logits are divided by it and tokens drawn.
        top_k: draw among the ``top_k`` likeliest tokens. top_p: among the likeliest that together
            have this probability. Both as in transformers, in this order.
        stop: tokens that end a sequence; they are its last.
        seed: of the draws, which depend on it and on the prompt's number, not on the mesh.
        use_cache: None keeps keys and values where the model takes a cache; False computes all
            tokens again for each one.
        step: ``step(model, ids, cache)`` calls a model of another signature and returns its
            logits; ``cache`` is None with ``use_cache=False``.
        stream: ``stream(prompt, token)`` is called for each new token when it is known, in order,
            on each rank that gives one.
        microbatches: into how many the prompts of a coordinate are cut; None: as many as the
            model was made for, at least one for each stage.

    Returns:
        a 1-d tensor of ids for each prompt, on its device, without padding.

    Communication: that of a forward for each token, without the gather of ``fsdp`` after the
        first (unless ``reshard=True``); one all-reduce of a number for each prompt over the world.
    Raises: Nemo2Error on all ranks alike.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    >>> [len(x) for x in generate(model, [[1, 2, 3], [4]], max_new_tokens=2)]
    [5, 3]
    """
    from .inference.calls import Call
    from .inference.place import place_of
    from .inference.request import Request, checked
    from .inference.rounds import Rounds
    from .inference.sampling import Sampling

    place = place_of(model)
    sampling = Sampling(temperature, top_k, top_p, seed)

    def ask() -> tuple[Call, Request]:
        call = Call.of(place.inner, use_cache, step)
        how = f"{call.kind}, {call.cached}"
        return call, checked(prompts, max_new_tokens, stop, sampling, microbatches, how)

    (call, request), streaming = place.agreed(ask, lambda a: a[1].digest(), stream is not None)
    with place.inferring():
        new = Rounds(place, call, request, microbatches, stream, streaming).run()
    whole = [torch.tensor([*p, *n]) for p, n in zip(request.prompts, new, strict=True)]
    devices = [p.device if isinstance(p, Tensor) else torch.device("cpu") for p in prompts]
    return [x.to(device) for x, device in zip(whole, devices, strict=True)]

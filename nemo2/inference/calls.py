"""How a model is called: by its own signature, or by the user's step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import Nemo2Error
from .cache import KVCache
from .huggingface import as_transformers, check_attention

GenerateStep = Callable[[nn.Module, Tensor, KVCache | None], Any]


@dataclass(frozen=True)
class Call:
    """One way of calling a model.

    Attributes:
        kind: "transformers", "cache" (``forward(ids, cache=)``), "step" (the user's), or "plain".
        cached: whether keys and values are kept.
        takes: the arguments that the model's forward names.
        step: the user's function, for "step".
    """

    kind: str
    cached: bool
    takes: frozenset[str]
    step: GenerateStep | None = None

    @classmethod
    def of(cls, module: nn.Module, use_cache: bool | None, step: GenerateStep | None) -> Call:
        """Return how to call ``module``.

        Raises: Nemo2Error for a model without a cache when one is asked for, and for models that
            this way of generating does not fit.
        """
        takes = frozenset(inspect.signature(module.forward).parameters)
        if step is not None:
            return cls("step", use_cache is not False, takes, step)
        config = getattr(module, "config", None)
        if "past_key_values" in takes and config is not None:
            if getattr(config, "is_encoder_decoder", False):
                raise Nemo2Error(
                    f"generate: {type(module).__name__} is an encoder and a decoder; generate"
                    " continues the prompts of decoders\n  options: a causal language model"
                )
            if use_cache is not False:
                check_attention(config)
            return cls("transformers", use_cache is not False, takes)
        if type(module).__name__.endswith("ForMaskedLM"):
            raise Nemo2Error(
                f"generate: {type(module).__name__} sees the tokens on both sides of each; generate"
                " continues prompts\n  options: a causal language model"
            )
        if "cache" in takes:
            return cls("cache", use_cache is not False, takes)
        if use_cache:
            raise Nemo2Error(
                f"generate(use_cache=True): {type(module).__name__}.forward takes no cache; its"
                f" arguments are ({', '.join(inspect.signature(module.forward).parameters)})\n"
                "  options: forward(self, ids, cache=None), see nemo2.inference.KVCache |"
                " step=lambda model, ids, cache: ... | the model inside of it | use_cache=False"
            )
        try:
            inspect.signature(module.forward).bind(None)
        except TypeError as error:
            raise Nemo2Error(
                f"generate: {type(module).__name__}.forward cannot be called with ids alone:"
                f" {error}\n  options: step=lambda model, ids, cache: <logits> | the model inside"
                " of it"
            ) from None
        return cls("plain", False, takes)

    def logits(self, module: nn.Module, part: Mapping[str, Any], cache: KVCache | None) -> Tensor:
        """Return the logits (batch, tokens, vocabulary) of one microbatch.

        From some models only those of the last token, where no others are needed.
        """
        ids = part["ids"]
        if cache is not None:
            cache.positions, cache.mask = part["positions"], part["mask"]
        if self.kind == "transformers":
            return logits_of(module(**self._for_transformers(part, cache)))
        if self.kind == "step":
            assert self.step is not None
            return logits_of(self.step(module, ids, cache))
        if self.kind == "cache":
            return logits_of(module(ids, cache=cache))
        if not any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in module.modules()):
            try:
                output = module(ids)
            except RuntimeError as error:
                raise Nemo2Error(
                    f"generate: {type(module).__name__} does not take ids (batch, tokens), and has"
                    f" no embedding: {error}\n  options: a causal language model"
                ) from error
            return logits_of(output)
        return logits_of(module(ids))

    def _for_transformers(self, part: Mapping[str, Any], cache: KVCache | None) -> dict[str, Any]:
        if cache is None:
            return {"input_ids": part["ids"], "use_cache": False}
        own = {"position_ids": part["positions"], "logits_to_keep": 1}
        return {
            "input_ids": part["ids"],
            "attention_mask": part["real"],
            "past_key_values": as_transformers(cache),
            "use_cache": True,
            **{name: value for name, value in own.items() if name in self.takes},
        }


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model returned.

    Raises: Nemo2Error when there are none of shape (batch, tokens, vocabulary).
    """
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    elif found is None and isinstance(output, Mapping):
        found = output.get("logits")
    elif found is None:
        found = output
    if not isinstance(found, Tensor) or found.ndim != 3:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise Nemo2Error(
            f"generate: the model returned {got}, not logits (batch, tokens, vocabulary)\n"
            "  options: step=lambda model, ids, cache: <logits> | the model inside of it"
        )
    return found

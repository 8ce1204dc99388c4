"""Models and prompts for the tests of ``generate``, and what one device makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import nemo2
from examples.gpt import GPT, GPTConfig
from tests.zoo import causal

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2, 1], [30, 31], [2, 40, 3, 41, 4]]


def gpt2() -> nn.Module:
    import transformers

    sizes = {"vocab_size": 96, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 4}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "gpt": lambda: GPT(GPTConfig(vocab=96, width=32, heads=4, layers=4, length=80)),
    "Llama": lambda: causal("Llama", tie_word_embeddings=True),
    "Qwen2": lambda: causal("Qwen2"),
    "GPT-2": gpt2,
    "Gemma-2": lambda: causal("Gemma2", sliding_window=6),
    "Mistral": lambda: causal("Mistral", sliding_window=6),
    "Qwen3": lambda: causal("Qwen3"),
    "Phi-3": lambda: causal("Phi3"),
    "GPT-NeoX": lambda: causal("GPTNeoX"),
}


def build(name: str) -> nn.Module:
    """Return a model in float64 whose likeliest tokens are far from the next ones."""
    torch.manual_seed(3)
    model = MODELS[name]().double()
    for param in model.parameters():
        if param.ndim > 1:
            nn.init.normal_(param, std=0.3)
    return model if name == "gpt" else nemo2.annotate(model)


def continued(model: nn.Module, prompt: list[int], new: int) -> list[int]:
    """Return the greedy continuation of one prompt alone, by the plainest loop."""
    model.eval()
    ids = torch.tensor([prompt])
    if hasattr(model, "generate"):  # transformers' own
        own: Any = model
        nothing = {"eos_token_id": None, "pad_token_id": 0}
        return own.generate(ids, do_sample=False, max_new_tokens=new, **nothing)[0].tolist()
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0].tolist()


def lists(found: list[Tensor]) -> list[list[int]]:
    return [x.tolist() for x in found]

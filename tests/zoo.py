"""Unmodified Hugging Face models in tiny random configurations, and other models as found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB, WIDTH, LENGTH = 96, 32, 8
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GROUPED = TINY | {"num_key_value_heads": 2}


def causal(kind: str, **changes: Any) -> nn.Module:
    """Return a causal language model of transformers with a tiny configuration."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(GROUPED | changes))
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def gpt2() -> nn.Module:
    import transformers

    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    import transformers

    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**TINY, **drops))


def vit() -> nn.Module:
    import transformers

    sizes = {k: TINY[k] for k in TINY if k.startswith(("hidden", "inter", "num_"))}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.ViTConfig(**sizes, **drops, image_size=16, patch_size=4, num_labels=6)
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def token_ids(batch: int = 4, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that the model itself computes from ``labels``."""
    return model(**batch).loss


def lm_batch(batch: int = 4) -> dict[str, Tensor]:
    ids = token_ids(batch)
    return {"input_ids": ids, "labels": ids}


def image_batch(batch: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "pixel_values": torch.rand(batch, 3, 16, 16, generator=generator),
        "labels": torch.arange(batch) % 6,
    }

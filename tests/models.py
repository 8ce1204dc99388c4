"""The models of the parity tests: ours, torch's own layers, and unmodified Hugging Face ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nemo2 import shard

VOCAB, WIDTH, LENGTH = 64, 32, 9


class Attention(nn.Module):
    """Causal attention as nanoGPT writes it: global head counts and widths in every view."""

    def __init__(self, heads: int, kv_heads: int, *, einops: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.einops = heads, kv_heads, einops
        size = WIDTH // heads
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, kv_heads * size)
        self.value, self.out = nn.Linear(WIDTH, kv_heads * size), nn.Linear(WIDTH, WIDTH)
        for layer in (self.query, self.key, self.value):
            shard(layer.weight, "tp", dim=0)
            shard(layer.bias, "tp", dim=0)
        shard(self.out.weight, "tp", dim=1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.einops:
            q = rearrange(q, "b t (h d) -> b h t d", h=self.heads)
            k, v = (rearrange(y, "b t (h d) -> b h t d", h=self.kv_heads) for y in (k, v))
        else:
            q = q.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            k = k.view(b, t, self.kv_heads, c // self.heads).transpose(1, 2)
            v = v.view(b, t, self.kv_heads, c // self.heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    def __init__(self, heads: int = 4, kv_heads: int = 4, *, bias: bool = True, **how: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(heads, kv_heads, **how)
        self.up = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=bias)
        shard(self.up.weight, "tp", dim=0)
        if bias:
            shard(self.up.bias, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, layers: int = 3, *, tied: bool = False, **block: Any) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList([Block(**block) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        shard(self.embed.weight, "tp", dim=0)
        shard(self.head.weight, "tp", dim=0)
        shard(self.layers, "pp")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class SkipBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.RMSNorm(WIDTH),
            nn.Linear(WIDTH, 64),
            nn.Linear(64, WIDTH),
        )
        shard(self.up.weight, "tp", dim=0)
        shard(self.up.bias, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        y = self.norm(x if first is None else x + first)
        return x + self.down(F.silu(self.up(y)))


class Skip(nn.Module):
    """A skip from the first hidden state to each block, as an argument or in the glue.

    The head is registered before the blocks, and a zero-dimensional scale is used at both
    ends: both are lent to the stage that does not hold them.
    """

    def __init__(self, layers: int = 5, *, glue: bool) -> None:
        super().__init__()
        self.glue = glue
        self.head, self.embed = nn.Linear(WIDTH, VOCAB), nn.Embedding(VOCAB, WIDTH)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.layers = nn.ModuleList([SkipBlock() for _ in range(layers)])
        shard(self.layers, "pp")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale
        first = x.tanh()
        for layer in self.layers:
            x = layer(x) + first * self.scale if self.glue else layer(x, first)
        return self.head(x)


class Encoder(nn.Module):
    """torch's own encoder with a head; its masks and shapes are torch's business."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        shard(self.encoder.layers, "pp")
        for block in self.encoder.layers:
            shard(block.linear1.weight, "tp", dim=0)
            shard(block.linear1.bias, "tp", dim=0)
            shard(block.linear2.weight, "tp", dim=1)
        shard(self.head.weight, "tp", dim=0)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(
            ids.shape[1], ids.device, self.embed.weight.dtype
        )
        return self.head(self.encoder(self.embed(ids), mask=mask, is_causal=True))


class FusedAttention(nn.Module):
    """Query, key and value in one projection of unequal parts, taken apart by ``split``."""

    def __init__(self, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, WIDTH // heads
        self.sizes = (WIDTH, kv_heads * self.size, kv_heads * self.size)
        self.qkv, self.out = nn.Linear(WIDTH, sum(self.sizes)), nn.Linear(WIDTH, WIDTH)
        shard(self.qkv.weight, "tp", dim=0, parts=self.sizes)
        shard(self.qkv.bias, "tp", dim=0, parts=self.sizes)
        shard(self.out.weight, "tp", dim=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        q = rearrange(q, "b t (h d) -> b h t d", h=self.heads)
        k, v = (rearrange(y, "b t (h d) -> b h t d", h=self.kv_heads) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(rearrange(y, "b h t d -> b t (h d)"))


class FusedBlock(nn.Module):
    """Fused attention and a gated MLP whose gate and up projections are one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = FusedAttention()
        self.gate_up, self.down = nn.Linear(WIDTH, 128, bias=False), nn.Linear(64, WIDTH)
        shard(self.gate_up.weight, "tp", dim=0, parts=(64, 64))
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Fused(GPT):
    """A GPT of fused blocks."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__(layers=0)
        self.layers.extend(FusedBlock() for _ in range(layers))


class DropoutBlock(Block):
    """Dropout as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        y = self.down(F.gelu(self.up(self.norm2(x))))
        return x + F.dropout(y, 0.1, self.training)


class Dropout(GPT):
    """A tied GPT of blocks with dropout: on any mesh it equals nemo2 on one device."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__(0, tied=True)
        self.layers.extend(DropoutBlock() for _ in range(layers))


def next_token(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean loss, written for one device, with the shift inside."""
    logits = model(ids[:, :-1])
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), ids[:, 1:].reshape(-1))


def counted(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum, count)`` with padding, so that counts differ between parts."""
    logits = model(ids[:, :-1])
    logits = getattr(logits, "logits", logits)
    target = ids[:, 1:].masked_fill(ids[:, 1:] < VOCAB // 3, -100)
    total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
    return total, (target != -100).sum()


LLAMA = {
    "model.layers.*.self_attn.[qkv]_proj.weight": ("tp", 0),
    "model.layers.*.self_attn.o_proj.weight": ("tp", 1),
    "model.layers.*.mlp.gate_proj.weight": ("tp", 0),
    "model.layers.*.mlp.up_proj.weight": ("tp", 0),
    "model.layers.*.mlp.down_proj.weight": ("tp", 1),
    "model.embed_tokens.weight": ("tp", 0),
    "model.layers": "pp",
}


GPT2 = {
    "transformer.h.*.attn.c_attn.weight": ("tp", 1, (WIDTH,) * 3),
    "transformer.h.*.attn.c_attn.bias": ("tp", 0, (WIDTH,) * 3),
    "transformer.h.*.attn.c_proj.weight": ("tp", 0),
    "transformer.h.*.mlp.c_fc.weight": ("tp", 1),
    "transformer.h.*.mlp.c_fc.bias": ("tp", 0),
    "transformer.h.*.mlp.c_proj.weight": ("tp", 0),
    "transformer.wte.weight": ("tp", 0),
    "transformer.h": "pp",
}


def llama(layers: int = 3, *, tied: bool = False, heads: int = 4, kv_heads: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def gpt2(layers: int = 3) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    nothing = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=WIDTH, n_layer=layers, n_head=4, **nothing, **ends
    )
    return GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Case:
    """A model to compare, with the annotation rules of those that carry none."""

    build: Callable[..., nn.Module]
    how: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[[nn.Module, Any], Any] = next_token
    rules: Mapping[str, Any] | None = None
    max_tp: int = 8

    def __call__(self) -> nn.Module:
        return self.build(**self.how)

    def with_layers(self, layers: int) -> Case:
        return replace(self, how={**self.how, "layers": layers})


def example_gpt(layers: int = 3) -> nn.Module:
    from examples import gpt

    return gpt.GPT(gpt.GPTConfig(vocab=VOCAB, width=WIDTH, heads=4, layers=layers, length=16))


ZOO: dict[str, Case] = {
    "gpt": Case(GPT),
    "gpt tied": Case(GPT, {"tied": True}, counted),
    "gpt no bias, einops": Case(GPT, {"bias": False, "einops": True}),
    "gpt grouped": Case(GPT, {"kv_heads": 2}, counted),
    "skip argument": Case(Skip, {"glue": False}),
    "skip glue": Case(Skip, {"glue": True}),
    "encoder": Case(Encoder, {}, counted),
    "llama": Case(llama, {}, next_token, LLAMA | {"lm_head.weight": ("tp", 0)}),
    "llama tied": Case(llama, {"tied": True}, next_token, LLAMA),
    "gpt2": Case(gpt2, {}, next_token, GPT2),
    "fused": Case(Fused),
    "dropout": Case(Dropout),
    "example gpt": Case(example_gpt),
}


def token_ids(batch: int, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)

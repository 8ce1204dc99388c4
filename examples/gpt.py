"""A small GPT, written for one device. The annotations say what may be split; nothing else does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo2 import shard
from nemo2.inference import KVCache


@dataclass(frozen=True)
class GPTConfig:
    vocab: int = 256
    width: int = 192
    heads: int = 4
    layers: int = 2
    length: int = 128


class Attention(nn.Module):
    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.size = cfg.width // cfg.heads
        self.query, self.key, self.value = (nn.Linear(cfg.width, cfg.width) for _ in range(3))
        self.out = nn.Linear(cfg.width, cfg.width)
        for layer in (self.query, self.key, self.value):
            shard(layer.weight, "tp", dim=0)
            shard(layer.bias, "tp", dim=0)
        shard(self.out.weight, "tp", dim=1)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # x is new tokens only: keys and values of those before are in the cache
            k, v = cache.update(k, v, self)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.attention = Attention(cfg)
        self.up, self.down = (
            nn.Linear(cfg.width, 4 * cfg.width),
            nn.Linear(4 * cfg.width, cfg.width),
        )
        shard(self.up.weight, "tp", dim=0)
        shard(self.up.bias, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.embed, self.place = (
            nn.Embedding(cfg.vocab, cfg.width),
            nn.Embedding(cfg.length, cfg.width),
        )
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm, self.head = nn.LayerNorm(cfg.width), nn.Linear(cfg.width, cfg.vocab, bias=False)
        for table in (self.embed, self.place, self.head):
            nn.init.normal_(table.weight, std=0.02)
        shard(self.embed.weight, "tp", dim=0)
        shard(self.head.weight, "tp", dim=0)
        shard(self.layers, "pp")

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        count = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed(ids) + self.place(count if cache is None else cache.positions)
        for layer in self.layers:
            x = layer(x, cache)
        return self.head(self.norm(x))

"""The model that is timed: a Llama as a user writes it, for one device."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import Shape


class RMSNorm(nn.RMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)


def rotary(sequence: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (sequence, size / 2) of the angles of rotary positions."""
    rates = 500000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    angles = torch.outer(torch.arange(sequence, device=device), rates)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of ``x`` (b, heads, s, size) by their position's angle."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.size = shape.head
        inner, kv = shape.heads * self.size, shape.kv_heads * self.size
        self.wq = nn.Linear(shape.width, inner, bias=False)
        self.wk = nn.Linear(shape.width, kv, bias=False)
        self.wv = nn.Linear(shape.width, kv, bias=False)
        self.wo = nn.Linear(inner, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            w(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        return self.wo(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return causal attention of q (b, heads, s, size) to k and v of fewer heads."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.width, shape.ffn, bias=False)
        self.w3 = nn.Linear(shape.width, shape.ffn, bias=False)
        self.w2 = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(shape.width), Attention(shape)
        self.mlp_norm, self.mlp = RMSNorm(shape.width), MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """A decoder of ``shape``; ids (b, s) to logits (b, s, vocab)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin = rotary(ids.shape[1], self.shape.head, ids.device)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def fill(module: nn.Module) -> None:
    """Fill parameters with numbers that only their names decide, the same for all peers."""
    for name, p in module.named_parameters():
        fill_one(name, p)


def fill_one(name: str, p: Tensor) -> None:
    """Fill one parameter (whole): norms with ones, all others from a normal distribution."""
    with torch.no_grad():
        if p.ndim < 2:
            p.fill_(1.0)
            return
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "little")
        generator = torch.Generator(p.device).manual_seed(seed)
        p.normal_(0.0, 0.02, generator=generator)


def tokens(shape: Shape, step: int, device: torch.device) -> Tensor:
    """Return the global batch of a step, (batch, sequence + 1) ids; it repeats after 4 steps."""
    generator = torch.Generator().manual_seed(step % 4)
    ids = torch.randint(0, shape.vocab, (shape.batch, shape.sequence + 1), generator=generator)
    return ids.to(device)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss of predicting ``ids`` (b, s) from logits (b, s, vocab)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())

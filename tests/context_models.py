"""Blocks that make their positions and masks in every way that users write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo2 import shard

VOCAB, WIDTH, HEADS = 64, 32, 4
SIZE = WIDTH // HEADS


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def angles_of(positions: Tensor, dtype: torch.dtype) -> Tensor:
    speeds = 10.0 ** -torch.arange(SIZE // 2, device=positions.device, dtype=dtype)
    return positions.to(dtype).unsqueeze(-1) * speeds


class Block(nn.Module):
    """One block; ``kind`` says what it makes inside, from ``x.shape[1]``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64)
        self.down = nn.Linear(64, WIDTH)
        self.place = nn.Parameter(torch.randn(16, WIDTH))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1).float())
        shard(self.qkv.weight, "tp", dim=0, parts=(WIDTH,) * 3)
        shard(self.qkv.bias, "tp", dim=0, parts=(WIDTH,) * 3)
        shard(self.out.weight, "tp", dim=1)
        shard(self.up.weight, "tp", dim=0)
        shard(self.up.bias, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.norm(x), mask)
        return x + self.down(F.gelu(self.up(x)))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, t, _ = x.shape
        if self.kind == "learned":
            x = x + self.place[:t]
        q, k, v = (y.view(b, t, HEADS, SIZE).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        positions = torch.arange(t, device=x.device)
        if self.kind == "rotary":
            angles = angles_of(positions, x.dtype)
            q, k = rotate(q, angles), rotate(k, angles)
        causal = mask is None
        if self.kind == "alibi":
            distance = (positions - positions[:, None]).to(x.dtype)
            mask = self.slopes.to(x.dtype)[:, None, None] * distance
            mask = mask.masked_fill(distance > 0, float("-inf"))
            causal = False
        if self.kind == "window":
            distance = positions[:, None] - positions
            mask, causal = (distance >= 0) & (distance < 3), False
        if self.kind == "both ways":
            causal = False
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))


class Model(nn.Module):
    """``outside`` says what the model's own forward makes: a mask from the ids."""

    def __init__(self, kind: str = "", outside: str = "") -> None:
        super().__init__()
        self.outside = outside
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block(kind) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        shard(self.embed.weight, "tp", dim=0)
        shard(self.head.weight, "tp", dim=0)
        shard(self.layers, "pp")

    def forward(self, ids: Tensor) -> Tensor:
        x, mask = self.embed(ids), self.mask(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x))

    def mask(self, ids: Tensor) -> Tensor | None:
        t = ids.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()
        if self.outside == "documents":  # a new document begins where an id is small
            document = (ids < VOCAB // 4).cumsum(1)
            return (document[:, None, :, None] == document[:, None, None, :]) & causal
        if self.outside == "padding":  # what is padded is looked at by itself alone
            kept = ids >= VOCAB // 4
            eye = torch.eye(t, dtype=torch.bool, device=ids.device)
            return (kept[:, None, None, :] & causal) | eye
        return None


def shift_inside(model: nn.Module, ids: Tensor) -> Tensor:
    """Labels shifted against the logits of the whole sequence."""
    logits = model(ids)
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))


def shift_of_inputs(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def transposed(model: nn.Module, ids: Tensor) -> Tensor:
    """Classes as the second dim, as torch's own documentation has it."""
    return F.cross_entropy(model(ids).transpose(1, 2)[..., :-1], ids[:, 1:])


def each_token(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of single tokens, weighted by the user; ``(sum, count)``."""
    logits = model(ids)[:, :-1]
    losses = F.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1), reduction="none")
    weight = (ids[:, 1:] > VOCAB // 3).to(losses.dtype).reshape(-1)
    return (losses * weight).sum(), weight.sum()


def ignored(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    target = ids[:, 1:].masked_fill(ids[:, 1:] < VOCAB // 4, -100)
    logits = model(ids)[:, :-1]
    total = F.cross_entropy(logits.reshape(-1, VOCAB), target.reshape(-1), reduction="sum")
    return total, (target != -100).sum()


def own_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Nothing that a rule knows: the hidden states are gathered before the head."""
    logits = model(ids)
    order = logits.sort(dim=1).values
    return order[:, 0].logsumexp(-1).mean() + logits[:, -1].square().mean()


def mean_square(model: nn.Module, ids: Tensor) -> Tensor:
    return (model(ids) - 0.5).square().mean()

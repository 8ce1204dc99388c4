"""The models people have: unmodified Hugging Face ones in tiny configurations, and others.

None is annotated: ``nemo2.annotate(model)`` derives what is sharded. ``python -m tests.zoo`` writes
``docs/models.md``: which model equals one device on which mesh.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemo2

VOCAB, WIDTH, LENGTH = 96, 32, 8
_TINY = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MIXTRAL = {"kind": "Mixtral", "num_local_experts": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}


# --- Hugging Face


def causal(kind: str, experts: str | None = None, **changes: Any) -> nn.Module:
    """Return a causal language model of transformers with a tiny configuration."""
    import transformers

    grouped = {"num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**(_TINY | grouped | changes))
    extra = {} if experts is None else {"experts_implementation": experts}
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, **extra)
    return model


def gpt2() -> nn.Module:
    import transformers

    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    import transformers

    return transformers.BertForMaskedLM(transformers.BertConfig(**_TINY, **_QUIET))


def vit() -> nn.Module:
    import transformers

    sizes = {k: _TINY[k] for k in _TINY if k.startswith(("hidden", "inter", "num_"))}
    config = transformers.ViTConfig(
        **sizes, **_QUIET, image_size=16, patch_size=4, num_labels=6, num_channels=3
    )
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    import transformers

    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=VOCAB, **sizes, **ids, dropout_rate=0.0)
    return transformers.T5ForConditionalGeneration(config)


# --- other people's


class TimmAttention(nn.Module):
    """As timm writes it: one projection, taken apart by a reshape of (3, heads, size)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class TimmMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TimmBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), TimmAttention(dim, 4)
        self.norm2, self.mlp = nn.LayerNorm(dim), TimmMlp(dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(TimmBlock(WIDTH) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class ConvNextBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.stage = nn.Sequential(*(ConvNextBlock(WIDTH) for _ in range(3)))
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(images)).mean((-2, -1)))


class UNetBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm = nn.GroupNorm(4, dim)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else x + skip
        return x + F.silu(self.norm(self.conv(x)))


class UNet(nn.Module):
    """Long skips: what the first half returns meets the second half in reverse order."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.first, self.depth = nn.Conv2d(3, WIDTH, 3, padding=1), depth
        self.blocks = nn.ModuleList(UNetBlock(WIDTH) for _ in range(2 * depth))
        self.last = nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x, skips = self.first(images), []
        for block in self.blocks[: self.depth]:
            x = block(x)
            skips.append(x)
        for block in self.blocks[self.depth :]:
            x = block(x, skips.pop())
        return self.last(x)


class TorchTransformer(nn.Module):
    """torch's own encoder and decoder layers, taught to copy."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], x.device, x.dtype)
        return self.head(self.transformer(x, x, tgt_mask=mask, tgt_is_causal=True))


def mlp() -> nn.Module:
    """A plain sequence, no list of alike blocks in it."""
    return nn.Sequential(
        nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 6)
    )


# --- losses and batches


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that the model itself computes from ``labels``."""
    return model(**batch).loss


def hidden_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """A loss that also looks at the hidden states in between, as distillation does."""
    out = model(**batch, output_hidden_states=True)
    return out.loss + sum(h.square().mean() for h in out.hidden_states)


def class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def copy_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def image_loss(model: nn.Module, images: Tensor) -> Tensor:
    return F.mse_loss(model(images), images)


def token_ids(batch: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))


def images(batch: int) -> Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def lm(batch: int) -> dict[str, Tensor]:
    ids = token_ids(batch)
    return {"input_ids": ids, "labels": ids}


def padded(batch: int) -> dict[str, Tensor]:
    """Inputs by keyword with a padding mask of one length for each row; labels everywhere."""
    ids = token_ids(batch)
    ends = LENGTH - torch.arange(batch) % 3
    mask = (torch.arange(LENGTH) < ends[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def pixels(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": images(batch), "labels": torch.arange(batch) % 6}


def labelled(batch: int) -> tuple[Tensor, Tensor]:
    return images(batch), torch.arange(batch) % 6


def rows(batch: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(7))
    return x, torch.arange(batch) % 6


@dataclass(frozen=True)
class Model:
    """A model of the zoo, with what it is trained on.

    Attributes:
        refused: mesh -> a part of the message with which the plan refuses it.
        dtype: float64 where the model's own operations know it.
    """

    build: Callable[..., nn.Module]
    how: Mapping[str, Any] = field(default_factory=dict)
    batch: Callable[[int], Any] = lm
    loss: Callable[[nn.Module, Any], Any] = own_loss
    refused: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    def __call__(self) -> nn.Module:
        return nemo2.annotate(self.build(**self.how))


_NO_SEQUENCE = {"cp=2": "to find which dims are the sequence"}
_MIXES = {"cp=2": "needs the whole sequence"}
MESHES = ("tp=2", "pp=2", "dp=2", "cp=2", "tp=2,pp=2", "dp=2,tp=2")
ZOO: dict[str, Model] = {
    "Llama": Model(causal, {"kind": "Llama"}),
    "Llama, tied": Model(causal, {"kind": "Llama", "tie_word_embeddings": True}),
    "Llama, padded": Model(causal, {"kind": "Llama"}, padded),
    "Llama, hidden states": Model(causal, {"kind": "Llama"}, lm, hidden_loss),
    "Qwen2": Model(causal, {"kind": "Qwen2"}),
    "Qwen3": Model(causal, {"kind": "Qwen3", "head_dim": 8}),
    "Mistral": Model(causal, {"kind": "Mistral", "sliding_window": 4}),
    "Gemma-2": Model(
        causal,
        # what transformers 5.23 chooses by itself, and 5.17 did not
        {"kind": "Gemma2", "head_dim": 8, "sliding_window": 4, "attn_implementation": "eager"},
        refused=_MIXES,
    ),
    "Phi-3": Model(causal, {"kind": "Phi3"}),
    "GPT-2": Model(gpt2),
    "GPT-NeoX": Model(causal, {"kind": "GPTNeoX"}),
    "BERT, masked-LM": Model(bert),
    "ViT": Model(vit, {}, pixels, refused=_NO_SEQUENCE),
    "T5": Model(t5, refused={"cp=2": "a mask that needs a gradient"}),
    "Mixtral": Model(causal, _MIXTRAL, refused=_MIXES, dtype=torch.float32),
    "Mixtral, batched_mm": Model(causal, {**_MIXTRAL, "experts": "batched_mm"}, refused=_MIXES),
    "Mixtral, eager": Model(causal, {**_MIXTRAL, "experts": "eager"}, refused=_MIXES),
    "Qwen3-MoE": Model(
        causal, {"kind": "Qwen3Moe", **_EXPERTS}, refused=_MIXES, dtype=torch.float32
    ),
    "timm-like ViT": Model(TimmViT, {}, labelled, class_loss, _NO_SEQUENCE),
    "ConvNeXt-like": Model(ConvNext, {}, labelled, class_loss, _NO_SEQUENCE),
    "U-Net-like": Model(UNet, {}, images, image_loss, _NO_SEQUENCE),
    "nn.Transformer": Model(TorchTransformer, {}, token_ids, copy_loss),
    "MLP, nn.Sequential": Model(mlp, {}, rows, class_loss, _NO_SEQUENCE),
}


def check(name: str, mesh: str, device: str) -> str:
    """Return ``"equal"``, or why not; the same on every rank of the running process group."""
    model = ZOO[name]
    sizes = nemo2.mesh.MeshSizes.of(mesh)
    try:
        report = nemo2.verify(
            model,
            model.batch(4 * sizes.dp),
            model.loss,
            mesh,
            device=device,
            dtype=model.dtype,
            pipeline=nemo2.Pipeline(microbatches=2),
        )
    except nemo2.Nemo2Error as error:
        return f"refused: {error}"
    return "equal" if report.ok else str(report)


# --- the table


def main() -> int:
    """Run every model on every mesh and write ``docs/models.md``."""
    import transformers

    from tests.pool import Pool

    pool, found = Pool(), {}
    for mesh, name in ((m, n) for m in MESHES for n in ZOO):
        world = nemo2.mesh.MeshSizes.of(mesh).world
        try:
            found[name, mesh] = pool.run(world, check, name, mesh, "cpu", timeout=200)[0]
        except RuntimeError as error:
            found[name, mesh] = str(error)
        print(f"{name}, {mesh}: {found[name, mesh]}", flush=True)
    pool.close()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    rows = [_table_row(name, found) for name in ZOO]
    Path(__file__).parents[1].joinpath("docs", "models.md").write_text(
        _PAGE.format(
            versions=f"{versions}, Python {sys.version.split()[0]}",
            header=" | ".join(MESHES),
            rules="---|" * len(MESHES),
            rows="\n".join(rows),
        )
    )
    wrong = [k for k, text in found.items() if not _as_stated(*k, text)]
    print(f"{len(found)} cells, {len(wrong)} not as stated: {wrong}")
    return 1 if wrong else 0


def _as_stated(name: str, mesh: str, text: str) -> bool:
    refusal = ZOO[name].refused.get(mesh)
    return text == "equal" if refusal is None else text.startswith("refused") and refusal in text


def _table_row(name: str, found: Mapping[tuple[str, str], str]) -> str:
    cells = []
    for mesh in MESHES:
        text = found[name, mesh]
        short = " ".join(text.removeprefix("refused: ").split("\n")[0].split())
        cells.append("equal" if text == "equal" else f"refused: {short.replace('|', '/')}")
    kind = "float64" if ZOO[name].dtype is torch.float64 else "float32"
    return f"| {name} | {kind} | " + " | ".join(cells) + " |"


_PAGE = """# Models

`python -m tests.zoo` wrote this page: unmodified models in tiny random configurations
(`tests/zoo.py`), annotated by `nemo2.annotate(model)` without rules, each compared by
`nemo2.verify` with the same model on one device: loss, every gradient, gradient norm, and weights
after one AdamW step; 2 microbatches, gloo processes. float64 at 1e-9; float32 at 1e-5 where the
model calls `grouped_mm`, which knows no float64.

{versions}.

| model | dtype | {header} |
|---|---|{rules}
{rows}

Caches stay at their default (`use_cache` is not touched), batches go in by keyword, outputs are
dataclasses. A mixture of experts runs its experts split inside each expert (`grouped_mm`), or
whole on each rank of `tp` where its code reads which expert a token takes (`eager`); there is no
axis for experts. Its auxiliary loss is right on `tp` alone with one microbatch, and refused
elsewhere. Context parallelism needs `F.scaled_dot_product_attention`: Gemma-2's attention with
capped scores is written by hand, T5's has a learned bias, and expert routing sorts tokens.
"""


if __name__ == "__main__":
    sys.exit(main())

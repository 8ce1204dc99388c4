"""Models as a new user writes them: a translator, an audio tagger, a language model.

One is annotated by hand, one by rules, one by structure.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

import nemo2
from nemo2 import PipelineError, ShardingError, shard

PAD, BOS = 0, 1


def sinusoids(length, dim):
    position = torch.arange(length)[:, None]
    rate = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    table = torch.zeros(length, dim)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return table


class CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = (
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )
        for p in self.q.parameters():
            shard(p, "tp", dim=0)
        for p in self.kv.parameters():
            shard(p, "tp", dim=0, parts=(dim, dim))
        shard(self.out.weight, "tp", dim=1)

    def forward(self, x, memory, mask):
        b, n, d = x.shape
        q = self.q(x).view(b, n, self.heads, d // self.heads)
        k, v = self.kv(memory).chunk(2, dim=-1)
        k = k.reshape(b, -1, self.heads, d // self.heads)
        v = v.reshape(b, -1, self.heads, d // self.heads)
        scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(d // self.heads)
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        mixed = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v)
        return self.out(mixed.flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self, dim):
        super().__init__(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        shard(self[0].weight, "tp", dim=0)
        shard(self[0].bias, "tp", dim=0)
        shard(self[2].weight, "tp", dim=1)


class EncoderLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention, self.ff = CrossAttention(dim, heads), FeedForward(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, pad):
        y = self.norm1(x)
        x = x + self.attention(y, y, pad)
        return x + self.ff(self.norm2(x))


class DecoderLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.self_attention, self.cross = CrossAttention(dim, heads), CrossAttention(dim, heads)
        self.ff = FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, y, memory, causal, pad):
        z = self.norm1(y)
        y = y + self.self_attention(z, z, causal)
        y = y + self.cross(self.norm2(y), memory, pad)
        return y + self.ff(self.norm3(y))


class Translator(nn.Module):
    def __init__(self, vocab=31, dim=16, heads=4, depth=2, longest=32, pp=("decoder",)):
        super().__init__()
        self.source, self.target = nn.Embedding(vocab, dim, PAD), nn.Embedding(vocab, dim, PAD)
        self.register_buffer("positions", sinusoids(longest, dim), persistent=False)
        self.encoder = nn.ModuleList([EncoderLayer(dim, heads) for _ in range(depth)])
        self.decoder = nn.ModuleList([DecoderLayer(dim, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        for name in pp:
            shard(getattr(self, name), "pp")

    def forward(self, source, target):
        pad = (source == PAD)[:, None, None, :]
        x = self.source(source) * 4 + self.positions[: source.shape[1]]
        for layer in self.encoder:
            x = layer(x, pad)
        n = target.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=target.device).triu(1)
        y = self.target(target) * 4 + self.positions[:n]
        for layer in self.decoder:
            y = layer(y, x, causal, pad)
        return self.head(self.norm(y))


def sentences(n=8, source=12, target=10):
    g = torch.Generator().manual_seed(0)
    src = torch.randint(2, 31, (n, source), generator=g)
    tgt = torch.randint(2, 31, (n, target + 1), generator=g)
    tgt[:, 0] = BOS
    for i in range(n):  # sentences of several lengths
        src[i, source - i % 5 :] = PAD
        tgt[i, target + 1 - i % 4 :] = PAD
    return {"source": src, "target": tgt}


def translation_loss(model, batch):
    logits = model(batch["source"], batch["target"][:, :-1])
    labels = batch["target"][:, 1:]
    total = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=PAD, reduction="sum")
    return total, (labels != PAD).sum()


class BiasedAttention(nn.Module):
    def __init__(self, dim, heads, reach):
        super().__init__()
        self.heads, self.reach = heads, reach
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(heads, 2 * reach + 1) * 0.02)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        place = torch.arange(n, device=x.device)
        apart = (place[None] - place[:, None]).clamp(-self.reach, self.reach) + self.reach
        scores = q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5 + self.bias[:, apart]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d))


class AudioBlock(nn.Module):
    def __init__(self, dim, heads, reach):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), BiasedAttention(dim, heads, reach)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))
        self.scale1 = nn.Parameter(torch.full((dim,), 0.1))
        self.scale2 = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x):
        x = x + self.scale1 * self.attn(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class Tagger(nn.Module):
    def __init__(self, bins=6, dim=16, heads=4, depth=4, tags=7, reach=5):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(bins, dim, 3, stride=2, padding=1),
            nn.GroupNorm(4, dim),
            nn.GELU(),
            nn.Conv1d(dim, dim, 3, stride=2, padding=1),
        )
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.blocks = nn.ModuleList([AudioBlock(dim, heads, reach) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, tags)

    def forward(self, sound):
        x = self.stem(sound).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


RULES = {
    "blocks": "pp",
    "blocks.*.attn.qkv.*": ("tp", 0, (16, 16, 16)),
    "blocks.*.attn.bias": ("tp", 0),
    "blocks.*.attn.proj.weight": ("tp", 1),
    "blocks.*.mlp.0.*": ("tp", 0),
    "blocks.*.mlp.2.weight": ("tp", 1),
}


def tagger():
    return nemo2.annotate(Tagger(), RULES)


def recordings(n=8, frames=28):
    g = torch.Generator().manual_seed(0)
    sound = torch.randn(n, 6, frames, generator=g)
    return sound, torch.rand(n, 7, generator=g).round()


def tag_loss(model, batch):
    sound, tags = batch
    return F.binary_cross_entropy_with_logits(model(sound), tags)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.gain


def rotate(x, freqs):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs[:, None]).flatten(-2).type_as(x)


class RotaryAttention(nn.Module):
    def __init__(self, dim, heads, groups):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, dim // heads
        self.wq = nn.Linear(dim, heads * self.size, bias=False)
        self.wk = nn.Linear(dim, groups * self.size, bias=False)
        self.wv = nn.Linear(dim, groups * self.size, bias=False)
        self.wo = nn.Linear(heads * self.size, dim, bias=False)

    def forward(self, x, freqs):
        b, n, _ = x.shape
        q = rotate(self.wq(x).view(b, n, self.heads, self.size), freqs)
        k = rotate(self.wk(x).view(b, n, self.groups, self.size), freqs)
        v = self.wv(x).view(b, n, self.groups, self.size)
        k = k.repeat_interleave(self.heads // self.groups, dim=2)
        v = v.repeat_interleave(self.heads // self.groups, dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(b, n, -1))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LMBlock(nn.Module):
    def __init__(self, dim, heads, groups):
        super().__init__()
        self.norm1, self.attention = RMSNorm(dim), RotaryAttention(dim, heads, groups)
        self.norm2, self.ff = RMSNorm(dim), SwiGLU(dim, 40)

    def forward(self, x, freqs):
        x = x + self.attention(self.norm1(x), freqs)
        return x + self.ff(self.norm2(x))


class LM(nn.Module):
    def __init__(self, vocab=32, dim=16, heads=4, groups=2, depth=4, longest=64):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList([LMBlock(dim, heads, groups) for _ in range(depth)])
        self.norm, self.head = RMSNorm(dim), nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.embed.weight
        size = dim // heads
        rate = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(longest), rate)
        self.register_buffer(
            "freqs", torch.polar(torch.ones_like(angles), angles), persistent=False
        )

    def forward(self, tokens):
        x, freqs = self.embed(tokens), self.freqs[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, freqs)
        return self.head(self.norm(x))


def language_model():
    return nemo2.annotate(LM())


def texts(n=8, length=16):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 32, (n, length + 1), generator=g)
    for i in range(n):
        tokens[i, length + 1 - i :] = 0
    return tokens


def masked_loss(model, tokens):
    logits, labels = model(tokens[:, :-1]), tokens[:, 1:]
    mask = labels != 0
    nll = -logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    return (nll * mask).sum(), mask.sum()


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Any]


CASES = {
    "translator": Case(Translator, sentences, translation_loss),
    "tagger": Case(tagger, recordings, tag_loss),
    "language model": Case(language_model, texts, masked_loss),
}


def verified(name, mesh, device):
    case = CASES[name]
    cut = nemo2.Pipeline(microbatches=2 if "pp" in mesh else 1)
    report = nemo2.verify(case.build, case.batch(), case.loss, mesh, device=device, pipeline=cut)
    return str(report)


def trained(name, sizes, device):
    """Train on the mesh and on one device; return the losses of both and how far weights differ."""
    case = CASES[name]
    mesh = nemo2.make_mesh(**sizes, device=device)
    torch.manual_seed(0)
    alone = case.build().to(mesh.device_type)
    cut = nemo2.Pipeline(microbatches=2 if "pp" in sizes else 1)
    model = nemo2.parallelize(alone, mesh, pipeline=cut)
    sgd, reference = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, alone))
    batch = tree_map(lambda x: x.to(mesh.device_type), case.batch())
    dp, part = mesh["dp"].get_local_rank(), 8 // mesh["dp"].size()
    own = tree_map(lambda x: x[dp * part : (dp + 1) * part], batch)
    losses = []
    for _ in range(3):
        loss = model.backward(case.loss, own)
        model.clip_grad_norm_(1.0)
        sgd.step()
        sgd.zero_grad()
        expected = case.loss(alone, batch)
        expected = expected[0] / expected[1] if isinstance(expected, tuple) else expected
        expected.backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
        losses.append((loss.item(), expected.item()))
    full, whole = model.full_state_dict(), alone.state_dict()
    assert set(full) == set(whole)
    return losses, max((full[k].cpu() - whole[k].cpu()).abs().max().item() for k in whole)


@pytest.mark.parametrize("name", ["translator", "tagger"])
@pytest.mark.parametrize("mesh", ["tp=2", "pp=2", "dp=2", "tp=2,pp=2", "dp=2,tp=2"])
def test_equals_one_device(pool, mesh, name):
    world = 4 if "," in mesh else 2
    for report in pool.run(world, verified, name, mesh, pool.device):
        assert "equal to one device" in report, report


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("translator", {"dp": 2, "tp": 2}),
        ("tagger", {"pp": 2, "tp": 2}),
        ("language model", {"tp": 2}),
        ("language model", {"pp": 2}),
        ("language model", {"dp": 2}),
        ("language model", {"cp": 2}),
        ("language model", {"pp": 2, "tp": 2}),
        ("language model", {"dp": 2, "tp": 2}),
        ("language model", {"cp": 2, "tp": 2}),
    ],
    ids=str,
)
def test_trains_as_on_one_device(pool, name, sizes):
    for losses, difference in pool.run(2 ** len(sizes), trained, name, sizes, pool.device):
        for found, expected in losses:
            assert found == pytest.approx(expected, rel=1e-5)
        assert losses[-1][0] < losses[0][0]
        assert difference < 1e-5


def test_two_lists_of_blocks_are_refused():
    both = Translator(pp=("encoder", "decoder"))
    with pytest.raises(PipelineError, match=r"several lists.*encoder, decoder") as error:
        nemo2.plan(both, "pp=2")
    assert "annotate one of them" in str(error.value)


def test_attention_by_hand_is_refused_over_the_sequence():
    with pytest.raises(ShardingError, match="'softmax' inside a block needs the whole") as error:
        nemo2.plan(Translator(), "cp=2", step=translation_loss, batch=sentences())
    assert "F.scaled_dot_product_attention" in str(error.value)
    assert "test_new_user.py" in str(error.value)


def test_audio_with_channels_first_is_refused_over_the_sequence():
    with pytest.raises(ShardingError, match="which dims are the sequence") as error:
        nemo2.plan(tagger(), "cp=2", step=tag_loss, batch=recordings())
    assert "(batch, sequence, ...)" in str(error.value)


def penalised(model, batch):
    return model(batch).pow(2).mean() + sum(p.pow(2).sum() for p in model.parameters())


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        nemo2.shard(self.up.weight, "tp", dim=0)
        nemo2.shard(self.up.bias, "tp", dim=0)
        nemo2.shard(self.down.weight, "tp", dim=1)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def bottlenecks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), *(Bottleneck() for _ in range(2)), nn.Linear(4, 4))
    return nemo2.annotate(model.double())


def penalty(sizes, device):
    x = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = penalised(bottlenecks(), x).item()
    model = nemo2.parallelize(bottlenecks(), nemo2.make_mesh(**sizes, device=device))
    return expected, float(model.backward(penalised, x))


@pytest.mark.parametrize("sizes", [{"pp": 2, "tp": 2}, {"pp": 2}, {"tp": 2}], ids=str)
def test_a_loop_over_parameters_meets_them_in_the_users_order(pool, sizes):
    """Borrowed parameters came in another order than planned: biases were taken for weights."""
    for expected, found in pool.run(2 ** len(sizes), penalty, sizes, pool.device):
        assert found == pytest.approx(expected, rel=1e-12)


def mistakes(sizes, device):
    mesh = nemo2.make_mesh(**sizes, device=device)
    model = nemo2.parallelize(bottlenecks(), mesh)
    x = torch.ones(4, 4, dtype=torch.float64)

    def mean(module, batch):
        return module(batch).mean()

    tries = {
        "returned float": lambda: model.backward(lambda m, b: float(mean(m, b)), x),
        "count is a dict": lambda: model.backward(lambda m, b: (mean(m, b), {"mse": 1}), x),
        "loss_fn is a Tensor": lambda: model.backward(x, mean),
        "without a gradient": lambda: model.backward(lambda m, b: mean(m, b).detach(), x),
        "depends on no trainable": lambda: model.backward(lambda m, b: (m(b).sum().detach(), 1), x),
        "inside of torch.inference_mode": lambda: torch.inference_mode()(model.backward)(mean, x),
        "parallel already": lambda: nemo2.parallelize(model, mesh),
        "plan: the model": lambda: nemo2.plan("model", sizes),
        "plan: this model is": lambda: nemo2.plan(model, sizes),
        "value_and_grad: the model": lambda: nemo2.value_and_grad(mean, bottlenecks()),
        "is the class": lambda: nemo2.parallelize(Bottleneck, mesh),
        "it is str": lambda: nemo2.parallelize(bottlenecks(), "tp=2"),
        "by torch.compile": lambda: nemo2.parallelize(torch.compile(bottlenecks()), mesh),
        "forward only": lambda: model(x, broadcast_output=True).sum().backward(),
        "be copied": lambda: copy.deepcopy(model),
        "be pickled": lambda: pickle.dumps(model),
        "missing": lambda: model.load_state_dict({"other": x}),
    }
    wrong = []
    for text, attempt in tries.items():
        try:
            attempt()
            wrong.append(f"{text}: nothing was raised")
        except nemo2.Nemo2Error as error:
            if text not in str(error) or "options:" not in str(error):
                wrong.append(f"{text}: {error}")
    out = model(x, broadcast_output=True)
    with torch.no_grad():
        assert torch.equal(model(x, broadcast_output=True), out)
        assert not model(x, broadcast_output=True).requires_grad
    return wrong, model.backward(mean, x).item()


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=str)
def test_mistakes_are_named_on_every_rank(pool, sizes):
    for wrong, _ in pool.run(2, mistakes, sizes, pool.device):
        assert not wrong, wrong


def loaded(sizes, kind, device):
    mesh = nemo2.make_mesh(**sizes, device=device)
    model = nemo2.parallelize(bottlenecks(), mesh, data_parallel=kind)
    other = bottlenecks()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2.0)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model.load_state_dict(other.state_dict())
    whole = model.full_state_dict()
    same = all(torch.equal(whole[n].cpu(), v) for n, v in other.state_dict().items())
    model.load_state_dict(before)
    whole = model.full_state_dict()
    return same, all(torch.equal(whole[n].cpu(), v) for n, v in bottlenecks().state_dict().items())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("sizes", [{"dp": 2, "tp": 2}, {"pp": 2, "tp": 2}], ids=str)
def test_load_state_dict_takes_its_own_and_that_of_one_device(pool, sizes, kind):
    assert set(pool.run(4, loaded, sizes, kind, pool.device)) == {(True, True)}


class Averages(nn.Module):
    """Blocks and a last module whose buffers the forward writes."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)
        )
        self.last = nn.BatchNorm1d(4, affine=False)
        nemo2.shard(self.blocks, "pp")

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def averaged(sizes, device):
    torch.manual_seed(0)
    alone = Averages().double()
    model = nemo2.parallelize(alone, nemo2.make_mesh(**sizes, device=device))
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = x.chunk(model.plan.sizes.dp)[model.groups.dp_rank]
    model.backward(lambda m, b: m(b).square().mean(), own)
    alone(x.chunk(model.plan.sizes.dp)[0])  # as in checkpoints, the first rank's count
    whole = {n: t.cpu() for n, t in model.full_state_dict().items()}
    assert whole.keys() == alone.state_dict().keys()
    return [n for n, t in alone.state_dict().items() if not torch.allclose(t, whole[n], rtol=1e-12)]


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"dp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_buffers_of_the_whole_state_are_their_owners(pool, sizes):
    assert pool.run(2 ** len(sizes), averaged, sizes, pool.device) == [[]] * 2 ** len(sizes)

"""Parity of small random models on random meshes, drawn by hypothesis."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nemo2
from nemo2 import ContextParallel, Nemo2Error, Pipeline, shard
from tests.models import counted, next_token, token_ids

VOCAB = 64
EXAMPLES = int(os.environ.get("NEMO2_TEST_EXAMPLES", "12"))


@dataclass(frozen=True)
class Shape:
    """What is drawn of a model."""

    heads: int
    kv_heads: int
    size: int
    layers: int
    hidden: int
    bias: bool
    norm: str
    activation: str
    tied: bool
    fused: bool
    parallel: bool
    whole: str = ""  # what is not annotated

    @property
    def width(self) -> int:
        return self.heads * self.size


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[s.norm]
        kv = s.kv_heads * s.size
        self.norm1, self.norm2 = norm(s.width), norm(s.width)
        self.sizes = (s.width, kv, kv)
        if s.fused:
            self.qkv = nn.Linear(s.width, sum(self.sizes), bias=s.bias)
            columns = {self.qkv: self.sizes}
        else:
            self.q, self.k, self.v = (nn.Linear(s.width, n, bias=s.bias) for n in self.sizes)
            columns = dict.fromkeys((self.q, self.k, self.v))
        gates = 2 if s.activation == "gated" else 1
        self.out = nn.Linear(s.width, s.width, bias=s.bias)
        self.up = nn.Linear(s.width, gates * s.hidden, bias=s.bias)
        self.down = nn.Linear(s.hidden, s.width, bias=s.bias)
        columns[self.up] = (s.hidden,) * gates if gates > 1 else None
        attention, mlp = s.whole != "attention", s.whole != "mlp"
        for layer, parts in columns.items():
            for p in layer.parameters() if (mlp if layer is self.up else attention) else ():
                shard(p, "tp", dim=0, parts=parts)
        for layer, split in ((self.out, attention), (self.down, mlp)):
            if split:
                shard(layer.weight, "tp", dim=1)

    def attention(self, x: Tensor) -> Tensor:
        s = self.shape
        if s.fused:
            q, k, v = self.qkv(x).split(self.sizes, -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q = q.unflatten(-1, (s.heads, s.size)).transpose(1, 2)
        k, v = (y.unflatten(-1, (s.kv_heads, s.size)).transpose(1, 2) for y in (k, v))
        grouped = s.heads != s.kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.shape.activation == "gated":
            gate, y = y.chunk(2, -1)
            return self.down(F.silu(gate) * y)
        return self.down(F.gelu(y) if self.shape.activation == "gelu" else F.relu(y).square())

    def forward(self, x: Tensor) -> Tensor:
        if self.shape.parallel:
            y = self.norm1(x)
            return x + self.attention(y) + self.mlp(y)
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, s.width)
        self.blocks = nn.ModuleList([Block(s) for _ in range(s.layers)])
        self.head = nn.Linear(s.width, VOCAB, bias=False)
        if s.tied:
            self.head.weight = self.embed.weight
        if s.whole not in ("table", "vocabulary"):
            shard(self.embed.weight, "tp", dim=0)
        if s.whole not in ("head", "vocabulary"):
            shard(self.head.weight, "tp", dim=0)
        shard(self.blocks, "pp")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@st.composite
def shapes(draw):
    kv = draw(st.sampled_from((1, 2, 3, 4)))
    heads = kv * draw(st.sampled_from((1, 2, 3)))
    return Shape(
        heads,
        kv,
        draw(st.sampled_from((4, 6))),
        draw(st.integers(1, 4)),
        draw(st.sampled_from((12, 20, 32))),
        draw(st.booleans()),
        draw(st.sampled_from(("layer", "rms"))),
        draw(st.sampled_from(("gelu", "squared", "gated"))),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(("", "table", "head", "vocabulary", "attention", "mlp"))),
    )


@st.composite
def meshes(draw):
    sizes = {axis: draw(st.sampled_from((1, 2, 1, 2, 4))) for axis in ("tp", "cp", "pp", "dp")}
    world = sizes["tp"] * sizes["cp"] * sizes["pp"] * sizes["dp"]
    assume(1 < world <= 8)
    return sizes


OPTIONS = st.fixed_dictionaries(
    {
        "data_parallel": st.sampled_from(("ddp", "fsdp")),
        "pipeline": st.builds(Pipeline, microbatches=st.sampled_from((1, 2, 3))),
        "context_parallel": st.builds(
            ContextParallel, st.sampled_from(("ring", "all_gather", "ulysses")), st.booleans()
        ),
        "sequence_parallel": st.sampled_from((None, False)),
    }
)


def checked(shape, sizes, loss, options):
    """Return None for parity, the report that differs, or the refusal of the plan."""
    batch = token_ids(sizes["dp"] * options["pipeline"].microbatches * 2, 9)
    try:
        report = nemo2.verify(functools.partial(Net, shape), batch, loss, sizes, **options)
    except Nemo2Error as error:
        return error
    return None if report.ok else report


# A tied weight that is whole on each rank, used on tokens that are split.
WHOLE = Shape(4, 2, 4, 2, 20, True, "layer", "gelu", True, False, False, "vocabulary")
ODD = Shape(6, 3, 4, 3, 20, True, "layer", "gated", True, True, True)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(shapes(), meshes(), st.sampled_from((next_token, counted)), OPTIONS)
@example(WHOLE, {"tp": 2, "cp": 1, "pp": 1, "dp": 1}, counted, {"pipeline": Pipeline(2)})
@example(ODD, {"tp": 2, "cp": 2, "pp": 2, "dp": 1}, counted, {"pipeline": Pipeline(3)})
def test_random_models_equal_one_device(pool, shape, sizes, loss, options):
    world = sizes["tp"] * sizes["cp"] * sizes["pp"] * sizes["dp"]
    results = pool.run(world, checked, shape, sizes, loss, options)
    assert len({str(r) for r in results}) == 1, results  # all ranks say the same
    refused = isinstance(results[0], Nemo2Error)
    if refused:
        assert why(shape, sizes, options), results[0]
        return
    assert results[0] is None, results[0]


def why(shape, sizes, options):
    """Say whether a refusal is due: a size that does not divide, or too few blocks."""
    tp, cp = sizes["tp"], sizes["cp"]
    kv = shape.kv_heads * shape.size
    split = [shape.width, kv, shape.hidden]
    heads = shape.heads // tp if shape.heads % tp == 0 else shape.heads
    ulysses = options.get("context_parallel", ContextParallel()).method == "ulysses"
    return (
        any(n % tp for n in split)
        or shape.layers < sizes["pp"]
        or (ulysses and cp > 1 and heads % cp != 0)
    )

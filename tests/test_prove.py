"""Which modules are proved to run their own code on local shapes, and which are emulated."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo2.plan import Plan, plan
from nemo2.sharding.annotate import annotate, shard
from tests.pool import Pool
from tests.tensor_parallel import check_build

B, T, D, HEADS = 2, 3, 16, 4
HD = D // HEADS


class Attention(nn.Module):
    """Attention whose head split is written in one of several ways."""

    def __init__(self, split: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.o = nn.Linear(D, D)
        self.split = split
        for linear in (self.q, self.k, self.v):
            shard(linear.weight, "tp", dim=0)
            shard(linear.bias, "tp", dim=0)
        shard(self.o.weight, "tp", dim=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(linear(x)) for linear in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


def nanogpt(x: Tensor) -> Tensor:
    b, t, c = x.shape
    return x.view(b, t, HEADS, c // HEADS).transpose(1, 2)


def by_head_size(x: Tensor) -> Tensor:
    return x.view(B, T, -1, HD).transpose(1, 2)


def by_einops(x: Tensor) -> Tensor:
    return einops.rearrange(x, "b t (h d) -> b h t d", h=HEADS)


def by_einops_size(x: Tensor) -> Tensor:
    return einops.rearrange(x, "b t (h d) -> b h t d", d=HD)


def scaled(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HD)).transpose(1, 2) * x.shape[-1] ** -0.5


def scaled_by_tensor(x: Tensor) -> Tensor:
    return by_head_size(x) * torch.tensor(float(x.shape[-1])).rsqrt()


def scaled_by_flow(x: Tensor) -> Tensor:
    return by_head_size(x) * 2 if x.shape[-1] > D // 2 else by_head_size(x).mul(3)


SPLITS: dict[Callable[[Tensor], Tensor], bool] = {
    nanogpt: False,
    by_head_size: True,
    by_einops: False,
    by_einops_size: True,
    scaled: False,
    scaled_by_tensor: False,
    scaled_by_flow: False,
}


class Model(nn.Module):
    def __init__(self, split: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D), Attention(split)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.norm(x))


def make_plan(model: nn.Module, *batch: Any, sizes: str = "tp=2") -> Plan:
    return plan(model, sizes, step=lambda m, b: m(*b), batch=batch)


@pytest.mark.parametrize("split", SPLITS)
def test_proved_or_emulated(split: Callable[[Tensor], Tensor]) -> None:
    step = make_plan(Model(split), torch.randn(B, T, D)).step
    assert step is not None
    proved = "attention" in step.programs.proved
    assert proved is SPLITS[split]
    assert proved is ("attention" not in step.programs.scripts)
    assert set(step.programs.installed) >= {f"attention.{n}" for n in "qkvo"}


def run_splits() -> None:
    for split in SPLITS:
        check_build(lambda split=split: Model(split), [torch.randn(B, T, D).double()])


def test_all_are_right(pool: Pool) -> None:
    pool.run(2, run_splits)


class Sizes(nn.Module):
    """A size read by one module is used by another."""

    def __init__(self, use: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(D, D), nn.Linear(D, D), Scale(use)
        shard(self.up.weight, "tp", dim=0)
        shard(self.up.bias, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(self.scale(y, y.shape[-1]))


class Scale(nn.Module):
    def __init__(self, use: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.use, self.shift = use, nn.Parameter(torch.randn(1))

    def forward(self, y: Tensor, size: int) -> Tensor:
        return self.use(y * self.shift, size)


USES: list[Callable[[Tensor, int], Tensor]] = [
    lambda y, size: y / size,
    lambda y, size: torch.where(y > 0, y, torch.full((1,), float(size), dtype=y.dtype)),
    lambda y, size: y * torch.arange(size).sum(),
    lambda y, size: y.view(B, T, 2, -1).reshape(B, T, size).clamp(max=size / 100),
]


def run_sizes() -> None:
    for use in USES:
        x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
        check_build(lambda use=use: Sizes(use), [x])


def test_sizes_that_travel(pool: Pool) -> None:
    for use in USES:
        step = make_plan(Sizes(use), torch.randn(B, T, D)).step
        assert step is not None
        assert "" in step.programs.scripts  # the module that reads the size sees the global one
    pool.run(2, run_sizes)


def test_another_path_each_time_is_emulated() -> None:
    class Counter(Model):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    step = make_plan(Counter(by_head_size), torch.randn(B, T, D)).step
    assert step is not None
    assert "attention" in step.programs.scripts


# --- unmodified models of Hugging Face ---

LLAMA_RULES: dict[str, Any] = {
    "model.layers.*.self_attn.[qkv]_proj.weight": ("tp", 0),
    "model.layers.*.self_attn.o_proj.weight": ("tp", 1),
    "model.layers.*.mlp.gate_proj.weight": ("tp", 0),
    "model.layers.*.mlp.up_proj.weight": ("tp", 0),
    "model.layers.*.mlp.down_proj.weight": ("tp", 1),
    "model.embed_tokens.weight": ("tp", 0),
    "lm_head.weight": ("tp", 0),
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2))
    return annotate(model, LLAMA_RULES)


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2))
    biases = {"model.layers.*.self_attn.[qkv]_proj.bias": ("tp", 0)}
    return annotate(model, LLAMA_RULES | biases)


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, hidden_dropout=0.0, attention_dropout=0.0))
    return annotate(
        model,
        {
            "gpt_neox.layers.*.attention.query_key_value.*": ("tp", 0),
            "gpt_neox.layers.*.attention.dense.weight": ("tp", 1),
            "gpt_neox.layers.*.mlp.dense_h_to_4h.*": ("tp", 0),
            "gpt_neox.layers.*.mlp.dense_4h_to_h.weight": ("tp", 1),
            "lm_head.weight": ("tp", 0),
        },
    )


def hf_step(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch[0], labels=batch[0], use_cache=False).loss


class Loss(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return hf_step(self.inner, [ids])


@pytest.mark.parametrize("build", [llama, qwen2, neox])
def test_hugging_face_layers_are_proved(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    start = time.perf_counter()
    made = plan(model, "tp=2", step=hf_step, batch=[torch.randint(0, 64, (2, 5))])
    print(f"{build.__name__}: planned in {time.perf_counter() - start:.2f} s")
    assert made.step is not None
    inside = [n for n in made.step.programs.scripts if ".layers." in n]
    assert not inside
    attentions = [n for n in made.step.programs.proved if n.endswith(("self_attn", "attention"))]
    assert len(attentions) == 3


def run_hugging_face() -> None:
    ids = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(3))
    for build in (llama, qwen2, neox):
        check_build(lambda build=build: Loss(build()), [ids], rtol=1e-6)


def test_hugging_face_models_are_right(pool: Pool) -> None:
    pool.run(2, run_hugging_face)

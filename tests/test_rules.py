"""Every layout rule, run for real: sharded outputs and gradients against unsharded ones.

A case is a small function of annotated parameters and inputs. Each runs on a pool of ranks
under its own plan, once with the modules that were proved running their own code, and once
with everything emulated.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemo2.errors import Nemo2Error
from nemo2.plan import plan
from nemo2.sharding.annotate import shard
from tests.pool import Pool
from tests.rule_cases import CASES, IDS, LABELS, B, Case, D, Function, H, T, col, make_input
from tests.tensor_parallel import check_build

# --- modules ---


class Mlp(nn.Module):
    """The textbook pair, around which the other modules are built."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H, bias=bias), nn.Linear(H, D, bias=bias)
        shard(self.up.weight, "tp", dim=0)
        shard(self.down.weight, "tp", dim=1)
        if bias:
            shard(self.up.bias, "tp", dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Twice(nn.Module):
    """One module called twice: on the input, which may carry no gradient, and on its result."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.mlp(x.detach())) + x


class Shared(nn.Module):
    """A weight shared by two modules, one of them called with a transposed meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(H, D, padding_idx=3)
        self.mlp, self.norm = Mlp(False), nn.LayerNorm(D)
        self.head = nn.Linear(D, H, bias=False)
        self.head.weight = self.embed.weight
        shard(self.head.weight, "tp", dim=0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embed(IDS)
        return F.cross_entropy(self.head(self.norm(self.mlp(x))).flatten(0, 1), LABELS.flatten())


class Checkpointed(nn.Module):
    """Whole modules run again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.mlp, self.second, self.reentrant = Mlp(), Mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.mlp, x, use_reentrant=self.reentrant)
        return checkpoint(self.second, x, use_reentrant=self.reentrant) + x


class Weighted(nn.Module):
    """A plain module whose weight is computed: its forward is more than one call."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        nn.utils.parametrizations.weight_norm(self.mlp.up, dim=0)
        shard(self.mlp.up.parametrizations.weight.original1, "tp", dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class Custom(nn.Module):
    """An elementwise autograd function on a split tensor; its gradient must still be summed."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.scale = Mlp(), nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        x = Square.apply(x * self.scale)
        return self.mlp.down(Square.apply(self.mlp.up(x)))


def multihead() -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 4, H, dropout=0.0, batch_first=True)
    shard(layer.linear1.weight, "tp", dim=0)
    shard(layer.linear2.weight, "tp", dim=1)
    shard(layer.self_attn.out_proj.weight, "tp", dim=1)
    return layer


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "mlp_without_bias": lambda: Mlp(False),
    "sequential": lambda: nn.Sequential(Mlp(), nn.LayerNorm(D), Mlp(), nn.Dropout(0.0)),
    "twice": Twice,
    "shared": Shared,
    "checkpoint": lambda: Checkpointed(False),
    "reentrant_checkpoint": lambda: Checkpointed(True),
    "weight_norm": Weighted,
    "autograd_function": Custom,
    "encoder_layer": multihead,
}


def run_cases(names: list[str]) -> dict[str, str]:
    """Run cases on this rank; return what failed. All ranks fail alike or the job hangs."""
    failed: dict[str, str] = {}
    for name in names:
        torch.manual_seed(0)
        try:
            if name in CASES:
                one = CASES[name]
                check_build(lambda one=one: Function(one), [make_input(x) for x in one.inputs])
            else:
                for train in (True, False):
                    check_build(MODULES[name], [make_input((B, T, D))], train=train)
        except Exception:
            failed[name] = traceback.format_exc()
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, failed.get(name))
        if any(errors):
            failed[name] = next(e for e in errors if e)
    return failed


# --- what is refused ---


def view_of_a_copy(p, x):
    y = x @ p.a
    y[..., :2].mul_(2)
    return y


def copy_before_the_write(p, x):
    y = x @ p.a
    first = y[..., :2]
    y += 1
    return first


def item_assignment(p, x):
    y = x @ p.a
    y[:, 0] = 0
    return y


def out_argument(p, x):
    y = x @ p.a
    return torch.add(y, y, out=torch.empty_like(x @ p.a))


def part_of_a_checkpoint(p, x):
    return checkpoint(lambda z: (z @ p.a) * 2, x, use_reentrant=False)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


def autograd_function(p, x):
    return Product.apply(x, p.a)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (view_of_a_copy, "'mul_' writes in place into memory shared with"),
        (copy_before_the_write, "writes in place into memory shared with"),
        (item_assignment, "'__setitem__' writes in place"),
        (out_argument, "'add' writes"),
        (part_of_a_checkpoint, "checkpoints a part of its own forward"),
        (autograd_function, "'matmul' in the autograd function Product"),
    ],
)
def test_refused(fn: Callable[..., Any], message: str) -> None:
    model = Function(Case(fn, {"a": col()}, (), ()))
    batch = [torch.randn(B, T, D, requires_grad=True)]
    with pytest.raises(Nemo2Error, match=message):
        plan(model, "tp=2", step=lambda m, b: m(*b), batch=batch)


# What is fast: no operand of these calls may be gathered.
FREE = [
    *(
        [
            "gelu",
            "broadcast_parameters",
            "in_place",
            "clamp_and_masks",
            "min_and_max_of_two",
            "conversions",
        ]
    ),
    *(
        [
            "split_heads",
            "heads_of_one",
            "merge_heads",
            "einops_patterns",
            "real_rotary",
            "complex_rotary",
        ]
    ),
    *(["custom_rms_norm", "norm_of_each_head", "tied_head", "embeddings", "masks"]),
]


@pytest.mark.parametrize("name", FREE)
def test_nothing_is_gathered(name: str) -> None:
    one = CASES[name]
    batch = [make_input(x) for x in one.inputs]
    step = plan(Function(one).double(), "tp=2", step=lambda m, b: m(*b), batch=batch).step
    assert step is not None
    events = [e for a in step.trace.root.walk() for e in a.events() if e.action]
    steps = [(e.name, step[0]) for e in events for f in e.action.fixes for step in f.steps]
    gathered = [name for name, step in steps if step.startswith("gather")]
    assert not gathered


def test_a_plan_leaves_nothing_behind():
    """What one plan decides of a call, here to leave its sum split, is nothing to the next."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(8, 16))
            self.down = nn.Parameter(torch.randn(16, 8))
            shard(self.up, "tp", dim=1)
            shard(self.down, "tp", dim=0)

        def forward(self, x):
            return ((x @ self.up).relu() @ self.down).relu()

    def scatters(length):
        step = plan(Net(), "tp=2", step=lambda m, b: m(b).sum(), batch=torch.randn(2, length, 8))
        events = [e for a in step.step.trace.root.walk() for e in a.events() if e.action]
        return [e.action.scatter for e in events if e.action.scatter is not None]

    assert not scatters(5)
    assert scatters(4)
    assert not scatters(5)


@pytest.mark.parametrize("degree", [2, 4])
def test_cases(pool: Pool, degree: int) -> None:
    names = [*MODULES, *(n for n, c in CASES.items() if degree in c.degrees)]
    failed = pool.run(degree, run_cases, names)[0]
    if failed:
        pytest.fail("\n".join(f"--- {n}\n{text}" for n, text in failed.items()), pytrace=False)

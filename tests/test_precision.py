"""bf16 compute with float32 masters: parity, dtypes on the way, sums in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nemo2
from nemo2 import DataParallel, Pipeline
from nemo2.communication import data_parallel
from tests.models import GPT, ZOO, Skip, counted, next_token, token_ids

RESHARDING = DataParallel("fsdp", reshard=True)
MESHES = [
    ("gpt tied", {}, {"pipeline": Pipeline(2)}),
    ("gpt tied", {"dp": 2}, {"pipeline": Pipeline(4)}),
    ("gpt tied", {"dp": 2}, {"data_parallel": "ddp", "pipeline": Pipeline(2)}),
    ("skip glue", {"dp": 2}, {"data_parallel": "zero1", "pipeline": Pipeline(4)}),
    ("skip glue", {"dp": 2}, {"data_parallel": RESHARDING, "remat": "full"}),
    ("gpt tied", {"tp": 2}, {"remat": "selective"}),
    ("gpt tied", {"pp": 2}, {"pipeline": Pipeline(2)}),
    ("skip glue", {"pp": 2}, {"pipeline": Pipeline(2)}),
    ("example gpt", {"cp": 2}, {}),
    ("example gpt", {"cp": 2}, {"context_parallel": "all_gather", "data_parallel": "ddp"}),
    ("example gpt", {"cp": 2}, {"context_parallel": "ulysses"}),
]


def verified(cells, device):
    bad = []
    for model, mesh, options in cells:
        case = ZOO[model]
        report = nemo2.verify(
            case,
            token_ids(8),
            case.loss,
            mesh,
            device=device,
            dtype=torch.float32,
            precision="bf16",
            **options,
        )
        if not report.ok:
            bad.append(f"{model} {mesh} {options}\n{report}")
    return bad


def test_parity(pool):
    """With one device that computes in bf16, too: both round, in another order."""
    assert pool.run(1, verified, MESHES[:1], pool.device)[0] == []
    assert pool.run(2, verified, MESHES[1:], pool.device)[0] == []


def test_parity_on_all_axes(pool):
    eight = [("gpt tied", {"dp": 2, "pp": 2, "tp": 2}, {"pipeline": Pipeline(2)})]
    assert pool.run(8, verified, eight, pool.device)[0] == []


# --- what is summed in float32


def build(model, mesh, device, **options):
    return nemo2.parallelize(
        model, nemo2.make_mesh(**mesh, device=device), precision="bf16", **options
    )


def summed_by_hand(model, parts, loss_fn):
    """Return the mean of the parts' gradients: each in bf16, added in float32."""
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for part in parts:
        low = copy.deepcopy(model).bfloat16()
        loss_fn(low, part).backward()
        for n, p in low.named_parameters():
            sums[n] += p.grad.float()
    return {n: s / len(parts) for n, s in sums.items()}


def accumulated(mesh, kind, device):
    """Return the largest relative error of a gradient against sums by hand, and all dtypes."""
    torch.manual_seed(0)
    model = GPT(layers=2)
    parallel = build(model, mesh, device, data_parallel=kind, pipeline=Pipeline(8))
    ids = token_ids(16 * mesh.get("dp", 1))
    wanted = summed_by_hand(model, ids.chunk(8 * mesh.get("dp", 1)), next_token)
    own = ids.chunk(mesh.get("dp", 1))[parallel.groups.dp_rank]
    _, grads = nemo2.value_and_grad(next_token, parallel)(parallel.params, own)
    errors = [
        ((g.full_tensor().cpu() - wanted[n]).norm() / wanted[n].norm()).item()
        for n, g in grads.items()
        if "key.bias" not in n  # its true gradient is zero
    ]
    return max(errors), {g.dtype for g in grads.values()}


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [({}, "ddp"), ({"dp": 2}, "ddp"), ({"dp": 2}, "fsdp"), ({"dp": 2}, RESHARDING)],
    ids=str,
)
def test_sums_over_microbatches_and_ranks_are_float32(pool, mesh, kind):
    """Sums of 8 microbatches in bf16 would be off by 1e-3 and more."""
    if pool.device == "cuda":
        pytest.skip("matrix products of other sizes round otherwise there")
    for error, dtypes in pool.run(mesh.get("dp", 1), accumulated, mesh, kind, pool.device):
        assert error < 1e-6
        assert dtypes == {torch.float32}


# --- dtypes on the way


class Seen(nn.Module):
    """A block that notes the dtypes that its code sees."""

    dtypes: dict[str, set[torch.dtype]]

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.register_buffer("table", torch.ones(8))
        self.dtypes = {"x": set(), "weight": set(), "buffer": set(), "out": set()}

    def forward(self, x):
        out = self.norm(self.linear(x))
        seen = {"x": x, "weight": self.linear.weight, "buffer": self.table, "out": out}
        for name, tensor in seen.items():
            self.dtypes[name].add(tensor.dtype)
        return out


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Seen() for _ in range(2))
        self.scale, self.frozen = nn.Parameter(torch.tensor(2.0)), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        nemo2.shard(self.layers, "pp")

    def forward(self, batch):
        x = self.frozen(batch["x"]) * self.scale
        for layer in self.layers:
            x = layer(x)
        return x


def square(model, batch):
    assert batch["n"].dtype == torch.int64
    return model(batch).float().square().mean()


def dtypes(mesh, kind, device):
    parallel = build(Net(), mesh, device, data_parallel=kind, pipeline=Pipeline(2))
    batch = {"x": torch.randn(4, 8), "n": torch.arange(4)}
    before = {n: p.to_local().clone() for n, p in parallel.params.items()}
    loss = parallel.backward(square, batch)
    frozen = [n for n in parallel.params if n.startswith("frozen")]
    grads = {p.grad.dtype for p in parallel.params.values() if p.grad is not None}
    same = all(torch.equal(p.to_local(), before[n]) for n, p in parallel.params.items())
    norm = parallel.clip_grad_norm_(1.0).dtype
    optimizer = torch.optim.AdamW(parallel.parameters())
    optimizer.step()
    out = parallel(batch, broadcast_output=True).dtype
    step_plan = parallel.runner.step_plan
    crossings = step_plan.boundaries if step_plan is not None else ()
    blocks = [b for b in parallel.module.layers if b.dtypes["out"]]
    return {
        "user": {t.dtype for t in parallel.params.values()},
        "state": {s["exp_avg"].dtype for s in optimizer.state.values()},
        "checkpoint": {t.dtype for t in parallel.full_state_dict().values()},
        "grads": grads,
        "frozen": all(parallel.params[n].grad is None for n in frozen),
        "same": same,
        "scalars": {loss.dtype, norm},
        "out": out,
        "run": {d for b in blocks for n in ("x", "weight", "out") for d in b.dtypes[n]},
        "buffer": {d for b in blocks for d in b.dtypes["buffer"]},
        "crossing": {c.dtype for b in crossings for c in b},
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero1"])
@pytest.mark.parametrize("mesh", [{"dp": 2}, {"pp": 2}], ids=str)
def test_dtypes(pool, mesh, kind):
    for seen in pool.run(2, dtypes, mesh, kind, pool.device):
        for name in ("user", "state", "checkpoint", "grads", "buffer"):
            assert seen[name] == {torch.float32}, name
        assert seen["run"] == {seen["out"]} == {torch.bfloat16}
        assert seen["crossing"] == ({torch.bfloat16} if "pp" in mesh else set())
        assert seen["scalars"] == {torch.float32, torch.float64}
        assert seen["frozen"]
        assert seen["same"]


def unused(kind, device):
    """Leave a parameter out in all microbatches but the last, on one rank."""
    parallel = build(Sometimes(), {"dp": 2}, device, data_parallel=kind, pipeline=Pipeline(2))
    x = torch.ones(4, 8)
    x[:2] *= -1 if parallel.groups.dp_rank == 0 else 1
    loss = parallel.backward(lambda m, x: m(x).square().mean(), x)
    return loss.isfinite().item(), {n: p.grad is not None for n, p in parallel.params.items()}


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.always(x)
        return self.sometimes(y) if x[0, 0] > 0 else y


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero1", RESHARDING], ids=str)
def test_parameters_that_some_microbatches_do_not_use(pool, kind):
    for finite, grads in pool.run(2, unused, kind, pool.device):
        assert finite
        assert all(grads.values())


def test_plan():
    how = {"step": counted, "batch": token_ids(4), "precision": "bf16"}
    plan = nemo2.plan(Skip(glue=True), "dp=2,pp=2", **how)
    assert "precision=bf16" in str(plan)
    assert {p.dtype for p in plan.params} == {torch.float32}
    found = {(c.kind, c.dtype) for c in data_parallel(plan, 0) if not c.unit.startswith("bucket")}
    assert found == {("all-gather", torch.bfloat16), ("reduce-scatter", torch.float32)}

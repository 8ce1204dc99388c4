"""Interleaved 1F1B on whole models: parity with one device, what is shared, frozen, recomputed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nemo2
from tests.models import GPT, ZOO, counted, next_token, token_ids

ONE = nemo2.Pipeline(4)
TWO = nemo2.Pipeline(4, "interleaved", 2)


def differing(cells: list[Any], device: str) -> list[str]:
    """Verify (model, blocks, mesh, data-parallel kind, microbatches, virtual stages) one by one."""
    bad = []
    for model, layers, mesh, kind, count, virtual in cells:
        case = ZOO[model].with_layers(layers)
        report = nemo2.verify(
            case,
            token_ids(mesh.get("dp", 1) * count),
            case.loss,
            mesh,
            device=device,
            rules=case.rules,
            data_parallel=kind,
            pipeline=nemo2.Pipeline(count, "interleaved", virtual),
        )
        if not report.ok:
            bad.append(f"{model} {mesh} {kind} x{count} v{virtual}\n{report}")
    return bad


# Rounds of microbatches, blocks that do not divide, three virtual stages, values that skip blocks.
ON_TWO = [
    ("example gpt", 4, {"pp": 2}, "ddp", 2, 2),
    ("gpt tied", 5, {"pp": 2}, "ddp", 4, 2),
    ("skip argument", 5, {"pp": 2}, "ddp", 8, 2),
    ("skip glue", 7, {"pp": 2}, "ddp", 4, 3),
    ("llama", 6, {"pp": 2}, "ddp", 2, 3),
]
ON_FOUR = [
    ("gpt tied", 6, {"dp": 2, "pp": 2}, "fsdp", 4, 3),
    ("skip glue", 4, {"dp": 2, "pp": 2}, "fsdp", 4, 2),
    ("llama tied", 5, {"pp": 2, "tp": 2}, "ddp", 2, 2),
    ("gpt", 5, {"pp": 2, "cp": 2}, "zero1", 2, 2),
    ("skip argument", 9, {"pp": 4}, "ddp", 8, 2),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "cells"), [(2, ON_TWO), (4, ON_FOUR)])
def test_equal_to_one_device(pool, world, cells):
    assert not pool.run(world, differing, cells, pool.device, timeout=280)[0]


class Shared(GPT):
    """Blocks that share: a weight (0 and 1), a whole module (1 and 2), a weight with the head."""

    def __init__(self, layers: int, *pairs: tuple[int, int], module: bool = False) -> None:
        super().__init__(layers, tied=True)
        for a, b in pairs:
            if module:
                self.layers[b].attention = self.layers[a].attention
            else:
                self.layers[b].up.weight = self.layers[a].up.weight


class Checkpointed(GPT):
    """The user's own activation checkpoint around each block, with dropout inside."""

    def __init__(self, layers: int = 5, p: float = 0.0) -> None:
        super().__init__(layers, tied=True)
        self.drop = nn.Dropout(p)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: self.drop(layer(y)), x, use_reentrant=False)
        return self.head(self.norm(x))


class Auxiliary(GPT):
    """A second loss in the middle, through the tied head: its weight is used on a third stage."""

    def __init__(self) -> None:
        super().__init__(4, tied=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        early = 0
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 1:
                early = torch.nn.functional.linear(x, self.embed.weight)
        return self.head(self.norm(x)) + early


class Frozen(GPT):
    """Fine-tuning: some blocks are frozen, and with the first ones the embeddings."""

    def __init__(self, *frozen: int, layers: int = 4) -> None:
        super().__init__(layers)
        for i in frozen:
            self.layers[i].requires_grad_(False)
        if 0 in frozen:
            self.embed.requires_grad_(False)
            self.place.requires_grad_(False)


def verified(jobs: list[tuple[Any, dict[str, int], str, Any]], device: str) -> list[str]:
    """Return what differs from one device."""
    bad = []
    for (build, args, how), mesh, kind, pipeline in jobs:
        report = nemo2.verify(
            lambda build=build, args=args, how=how: build(*args, **how),
            token_ids(8 * mesh.get("dp", 1)),
            counted,
            mesh,
            device=device,
            data_parallel=kind,
            pipeline=pipeline,
        )
        if not report.ok:
            bad.append(f"{build.__name__}{args} {mesh} {kind} {pipeline}\n{report}")
    return bad


SHARED = [
    (Shared, ((0, 1),), {"layers": 6}),  # in one stage of 1F1B
    (Shared, ((0, 2), (3, 5)), {"layers": 6}),
    (Shared, ((1, 3),), {"layers": 6, "module": True}),
]
FROZEN = [
    (Frozen, frozen, {}) for frozen in ((0,), (0, 1), (1,), (2,), (1, 2), (0, 1, 2), (0, 2), (3,))
]


def of_shared(case: Any) -> Any:
    build, pairs, how = case
    return build, (how["layers"], *pairs), {k: v for k, v in how.items() if k != "layers"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_shared_parameters(pool, kind):
    cases = [of_shared(c) for c in SHARED]
    jobs = [(c, {"pp": 2, "dp": 2}, kind, how) for c in cases for how in (ONE, TWO)]
    jobs += [(c, {"dp": 4}, kind, ONE) for c in cases]
    assert pool.run(4, verified, jobs, pool.device) == [[]] * 4


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_tied_weight_that_a_third_stage_uses(pool, kind):
    case = (Auxiliary, (), {})
    jobs = [(case, {"pp": 2, "dp": 2}, kind, how) for how in (ONE, TWO)]
    jobs += [(case, {"pp": 4}, kind, ONE)]
    assert pool.run(4, verified, jobs, pool.device) == [[]] * 4


@pytest.mark.parametrize("how", [ONE, TWO], ids=["1f1b", "interleaved"])
def test_frozen_stages(pool, how):
    jobs = [(c, {"pp": 2}, "ddp", how) for c in FROZEN]
    assert pool.run(2, verified, jobs, pool.device) == [[]] * 2
    jobs = [(c, {"pp": 2, "dp": 2}, "fsdp", how) for c in FROZEN]
    assert pool.run(4, verified, jobs, pool.device) == [[]] * 4


def test_the_users_activation_checkpoints(pool):
    case = (Checkpointed, (), {})
    jobs = [(case, {"pp": 2, "dp": 2}, kind, TWO) for kind in ("ddp", "fsdp")]
    assert pool.run(4, verified, jobs, pool.device) == [[]] * 4


def whole(device: str, kind: str, pipeline: nemo2.Pipeline, dp: int) -> dict[str, Any]:
    """Compare forward passes, states and the norm with the unsplit model."""
    torch.manual_seed(0)
    model = GPT(5, tied=True).double()
    mesh = nemo2.make_mesh(pp=2, dp=dp, device=device)
    parallel = nemo2.parallelize(model, mesh, data_parallel=kind, pipeline=pipeline)
    ids = token_ids(3).to(parallel.groups.device)
    state = parallel.full_state_dict()
    outputs = [parallel(ids, broadcast_output=True).cpu() for _ in range(2)]
    parallel.backward(next_token, token_ids(8 * dp).chunk(dp)[parallel.groups.dp_rank])
    norm = parallel.clip_grad_norm_(1e9)
    loss = next_token(model, token_ids(8 * dp))
    loss.backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    own = parallel.module
    return {
        "state": all(torch.equal(state[n].cpu(), v) for n, v in model.state_dict().items()),
        "names": state.keys() == model.state_dict().keys(),
        "forward": all(torch.allclose(o, model(token_ids(3)), atol=1e-12) for o in outputs),
        "norm": abs(norm.item() - expected.item()) < 1e-10,
        "held": len(list(own.parameters())) == len(parallel.params),
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_forward_of_any_batch_state_and_norm(pool, kind):
    for result in pool.run(4, whole, pool.device, kind, TWO, 2):
        assert all(result.values()), result


def dropped(device: str, build: Any, steps: int) -> tuple[list[float], list[Tensor]]:
    """Return the losses and the last gradients of a model with dropout."""
    torch.manual_seed(0)
    mesh = nemo2.make_mesh(pp=2, device=device)
    parallel = nemo2.parallelize(build(p=0.3).double(), mesh, pipeline=TWO)
    run = nemo2.value_and_grad(next_token, parallel)
    results = [run(parallel.params, token_ids(8), step=s) for s in range(steps)]
    again = run(parallel.params, token_ids(8), step=steps - 1)
    assert again[0].item() == results[-1][0].item()
    return [r[0].item() for r in results], [g.to_local().cpu() for g in results[-1][1].values()]


class Dropped(Checkpointed):
    """The same without the checkpoints."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = self.drop(layer(x))
        return self.head(self.norm(x))


def test_recomputation_sees_its_microbatch_and_its_random_numbers(pool):
    saved = pool.run(2, dropped, pool.device, Dropped, 2)
    recomputed = pool.run(2, dropped, pool.device, Checkpointed, 2)
    for (losses, grads), (again, same) in zip(saved, recomputed, strict=True):
        assert losses == again
        assert losses[0] != losses[1]
        assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(grads, same, strict=True))


def seeds(device: str) -> list[int]:
    mesh = nemo2.make_mesh(pp=2, device=device)
    parallel = nemo2.parallelize(GPT(4), mesh, pipeline=TWO)
    return [parallel.draws.seed_for(s.index, m) for s in parallel.runner.stages for m in range(4)]


def test_each_stage_and_microbatch_draws_its_own_numbers(pool):
    first, second = pool.run(2, seeds, pool.device)
    assert len({*first, *second}) == 2 * 2 * 4


def reductions(device: str, frozen: tuple[int, ...]) -> int:
    """Return how many reduce-scatters FSDP runs in one step on this rank."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    mesh = nemo2.make_mesh(pp=2, dp=2, device=device)
    parallel = nemo2.parallelize(Frozen(*frozen), mesh, pipeline=TWO)
    counted, original = [], groups.foreach_reduce

    def count(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return original(*args, **kwargs)

    groups.foreach_reduce = count
    try:
        parallel.backward(next_token, token_ids(8))
    finally:
        groups.foreach_reduce = original
    return len(counted)


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        # Each rank: two blocks and, as they end in the head or begin with the embedding, the rest.
        ((), {0: 3, 1: 3}),
        ((0,), {0: 1, 1: 3}),
        ((0, 1), {0: 1, 1: 2}),
    ],
)
def test_fsdp_reduces_each_gradient_once(pool, frozen, expected):
    got = pool.run(4, reductions, pool.device, frozen)
    assert got == [expected[rank // 2] for rank in range(4)]

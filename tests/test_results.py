"""What travels beside the schedule: the last stage's results, and the calls of ``self.log``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nemo2
from nemo2.lightning.combine import Call, combine, gather_calls
from nemo2.mesh.groups import MeshGroups
from nemo2.pipeline.results import from_last_stage
from nemo2.pytree import tree_map
from tests.pool import Pool


@dataclass
class Output:
    logits: Tensor
    more: dict[str, Any]


def groups_of(device: str, **sizes: int) -> MeshGroups:
    return MeshGroups.of(nemo2.make_mesh(**sizes, device=device))


def results(device: str) -> Output:
    x = torch.arange(12.0, device=device).view(3, 4)
    return Output(
        logits=(x * nn.Parameter(torch.ones(4, device=device))).mT,
        more={
            "half": (x[0].bfloat16(), x[0, 1].half()),
            "complex": torch.complex(x, x).conj(),
            "whole": [x.long(), x > 3, x.to(torch.uint8)],
            "empty": x[:0],
            "scalar": x.sum().double(),
            "host": torch.ones(2, dtype=torch.int16),
            "meta": torch.ones(2, device="meta"),
            "plain": ("text", 3, None),
        },
    )


def received(device: str) -> Any:
    groups = groups_of(device, pp=2)
    own = results(device) if groups.pp_rank == 1 else None
    got = from_last_stage(own, groups)
    nothing = from_last_stage("nothing" if own else None, groups)
    assert nothing == "nothing"
    assert (got is own) == (groups.pp_rank == 1)
    assert got.logits.device == groups.device
    return got.logits.detach().cpu(), tree_map(on_host, got.more)


def on_host(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) and not x.is_meta else x


def test_results_are_those_of_the_last_stage(pool: Pool) -> None:
    want = results("cpu")
    for logits, more in pool.run(2, received, pool.device):
        assert torch.equal(logits, want.logits)
        assert more["meta"].shape == (2,)
        assert more["plain"] == want.more["plain"]
        for name in ("half", "complex", "whole", "empty", "scalar", "host"):
            torch.testing.assert_close(more[name], want.more[name], rtol=0, atol=0)


# --- the calls of self.log

# Of each dp rank, for each of its microbatches: (name, value, batch size, how).
RUNS = [
    [
        [("loss", 1.0, 2, "mean"), ("loss", 8.0, None, "mean"), ("n", 2, None, "sum")],
        [("loss", 3.0, 2, "mean"), ("n", torch.tensor(3), None, "sum")],
    ],
    [
        [("loss", 5.0, 4, "mean"), ("only here", 1, None, "mean"), ("n", 4, None, "sum")],
        [("loss", torch.tensor(8.0), 4, "mean"), ("least", float("inf"), None, "min")],
    ],
]
WANT = {
    ("loss", 12): (2 * 1 + 2 * 3 + 4 * 5 + 4 * 8) / 12,
    ("loss", None): 8.0,
    ("n", None): 9.0,
    ("only here", None): 1.0,
    ("least", None): float("inf"),
}


def logged(device: str, on_device: bool) -> dict[Any, tuple[float, Any]]:
    groups = groups_of(device, dp=2)

    def call(name: str, value: Any, size: int | None, how: str) -> Call:
        value = torch.as_tensor(value, device=device) if on_device else value
        value = value.to(groups.device) if isinstance(value, Tensor) else value
        dtype = value.dtype if isinstance(value, Tensor) else None
        return Call(name, value, dtype, {"batch_size": size, "reduce_fx": how})

    runs = [[call(*given) for given in run] for run in RUNS[groups.dp_rank]]
    made = combine(*gather_calls(runs, groups))
    assert not on_device or all(isinstance(c.value, Tensor) for c in made)
    return {(c.name, c.options["batch_size"]): (float(c.value), c.dtype) for c in made}


def test_ways_to_say_how() -> None:
    def of(values: list[float], sizes: list[int | None], how: Any) -> float:
        calls = [
            Call("x", v, None, {"batch_size": s, "reduce_fx": how})
            for v, s in zip(values, sizes, strict=True)
        ]
        (call,) = combine([[c] for c in calls], torch.empty(0))
        return float(call.value)

    for how, want in (
        ("MAX", 4),
        (max, 4),
        (torch.min, 1),
        (sum, 5),
        ("mean", 2.5),
        (torch.mean, 2.5),
    ):
        assert of([4, 1], [None, None], how) == want
    assert of([5, float("nan")], [3, 0], "mean") == 5  # nothing was counted there
    assert of([5, 1], [0, 0], "mean") == 3


@pytest.mark.parametrize("on_device", [True, False], ids=["tensors", "mostly numbers"])
def test_calls_are_combined_over_microbatches_and_ranks(pool: Pool, on_device: bool) -> None:
    for got in pool.run(2, logged, pool.device, on_device):
        assert {key: value for key, (value, _) in got.items()} == WANT
        assert {dtype for _, dtype in got.values()} == {torch.float32}

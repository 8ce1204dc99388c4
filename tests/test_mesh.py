"""Sizes, make_mesh and groups."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from nemo2.errors import MeshError
from nemo2.mesh import AXES, MeshGroups, MeshSizes, fit_sizes, make_mesh, new_group, parse_sizes
from tests.pool import Pool


def test_sizes_of_mapping_text_and_sizes() -> None:
    sizes = MeshSizes(pp=2, tp=3)
    assert MeshSizes.of({"tp": 3, "pp": 2}) == sizes
    assert MeshSizes.of(" tp = 3 , pp=2") == sizes
    assert MeshSizes.of(sizes) is sizes
    assert MeshSizes.of({}) == MeshSizes.of("") == MeshSizes()
    assert sizes.world == 6
    assert dict(sizes.items()) == {"pp": 2, "dp": 1, "cp": 1, "tp": 3}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"ep": 2}, r"unknown mesh axis 'ep'; the axes are pp, dp, cp, tp"),
        ({"a": 2, "b": 2}, r"unknown mesh axes 'a', 'b'"),
        ("dp=2,xx=2", r"unknown mesh axis 'xx'"),
        ("dp=two, pp", r"'dp=two' is not <axis>=<integer>; 'pp' is not"),
        ("dp=2,dp=2", r"'dp' is given twice"),
        ({"dp": 0, "tp": -2}, r"(?s)dp=0 is not a positive.*tp=-2 is not"),
        ({"dp": 2.0}, r"dp=2.0 is not a positive integer"),
        ({"dp": True}, r"dp=True is not a positive integer"),
    ],
)
def test_sizes_that_are_refused(mesh: Any, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        MeshSizes.of(mesh)


def test_fit_fills_in_the_one_free_size() -> None:
    assert fit_sizes({"dp": -1, "tp": 2}, 8) == MeshSizes(dp=4, tp=2)
    assert fit_sizes(parse_sizes("dp=-1"), 1) == MeshSizes()


@pytest.mark.parametrize(
    ("asked", "world", "message"),
    [
        ({"dp": -1, "tp": -1}, 8, r"only one mesh size may be -1, got dp=-1 and tp=-1"),
        ({"dp": 0}, 8, r"positive integers, or -1 for one of them: dp=0"),
        ({"tp": "2"}, 8, r"tp='2'"),
        ({"tp": 2, "pp": 2}, 8, r"(?s)need exactly 4 ranks, there are 8.*fit: pp=2 dp=2 cp=1 tp=2"),
        ({"tp": 3, "dp": -1}, 8, r"(?s)a multiple of 3 .*fit: pp=1 dp=2 cp=1 tp=4"),
        ({"tp": 2, "pp": 2}, 1, r"torchrun --nproc-per-node 4"),
    ],
)
def test_sizes_that_do_not_fit(asked: Any, world: int, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        fit_sizes(asked, world)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries({axis: st.integers(1, 12) for axis in AXES}),
    st.integers(1, 96),
)
def test_every_size_that_is_proposed_fits(asked: dict[str, int], world: int) -> None:
    try:
        assert fit_sizes(asked, world).world == world
    except MeshError as error:
        proposed = str(error).split("sizes that fit: ")[1].splitlines()[0].split(" | ")
        assert proposed
        for text in proposed:
            assert fit_sizes(parse_sizes(text.replace(" ", ",")), world).world == world


def build(**sizes: int) -> dict[str, Any]:
    kind = "cuda" if torch.cuda.is_initialized() else "cpu"
    mesh = make_mesh(**sizes, device=kind)
    groups = MeshGroups.of(mesh)
    assert groups.mesh is mesh
    return _described(groups)


def _described(groups: MeshGroups) -> dict[str, Any]:
    sums = {}
    for axis in (*AXES, "dp_cp", "world"):
        value = torch.tensor([1 << dist.get_rank()], device=groups.device)
        dist.all_reduce(value, group=getattr(groups, axis))
        sums[axis] = int(value)  # the set of ranks in the group, as bits
    coordinates = {axis: getattr(groups, f"{axis}_rank") for axis in AXES}
    assert groups.rank == dist.get_rank() in groups.ranks_of(**coordinates)
    assert groups.sizes.world == len(groups.ranks_of())
    for axis in AXES:
        others = {a: c for a, c in coordinates.items() if a != axis}
        assert _bits(groups.ranks_of(**others)) == sums[axis]
    return {
        "shape": tuple(groups.mesh.shape),
        "names": groups.mesh.mesh_dim_names,
        "data": groups.data_mesh.size(),
        "at": tuple(coordinates.values()),
        "sums": sums,
    }


def _bits(ranks: list[int]) -> int:
    return sum(1 << rank for rank in ranks)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"tp": 2}, {"pp": 2, "tp": 2}, {"dp": 2, "cp": 2}, {"pp": 2, "dp": -1, "tp": 2}],
    ids=str,
)
def test_make_mesh_and_groups(pool: Pool, sizes: dict[str, int]) -> None:
    world = 8 if -1 in sizes.values() else MeshSizes.of(sizes).world
    full = fit_sizes(sizes, world)
    grid = torch.arange(world).reshape(full.pp, full.dp, full.cp, full.tp)
    for rank, got in enumerate(pool.run(world, build, **sizes)):
        assert got["shape"] == tuple(size for _, size in full.items())
        assert got["names"] == AXES
        at = got["at"]
        assert int(grid[at]) == rank
        assert got["data"] == full.dp * full.cp
        pp, dp, cp, tp = at
        expected = {
            "pp": grid[:, dp, cp, tp],
            "dp": grid[pp, :, cp, tp],
            "cp": grid[pp, dp, :, tp],
            "tp": grid[pp, dp, cp, :],
            "dp_cp": grid[pp, :, :, tp],
            "world": grid,
        }
        assert got["sums"] == {k: _bits(v.reshape(-1).tolist()) for k, v in expected.items()}


def build_of_user_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Any]:
    kind = "cuda" if torch.cuda.is_initialized() else "cpu"
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    assert MeshSizes.of(mesh) == MeshSizes(**dict(zip(names, shape, strict=True)))
    return _described(MeshGroups.of(mesh))


@pytest.mark.parametrize(
    ("shape", "names"), [((4,), ("tp",)), ((2, 2), ("tp", "dp")), ((2, 2), ("dp", "cp"))]
)
def test_a_mesh_that_lacks_axes(pool: Pool, shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    got = pool.run(4, build_of_user_mesh, shape, names)
    sizes = MeshSizes(**dict(zip(names, shape, strict=True)))
    for rank, one in enumerate(got):
        assert one["shape"] == tuple(size for _, size in sizes.items())
        for axis, size in sizes.items():
            assert size > 1 or one["sums"][axis] == 1 << rank
        assert one["data"] == sizes.dp * sizes.cp
    assert got[1]["at"] == {"tp": (0, 0, 0, 1), "dp": (0, 1, 0, 0), "cp": (0, 0, 1, 0)}[names[-1]]


def refuse_user_meshes() -> None:
    with pytest.raises(MeshError, match="unknown mesh axis 'model'"):
        MeshGroups.of(init_device_mesh("cpu", (2,), mesh_dim_names=("model",)))
    with pytest.raises(MeshError, match="without axis names"):
        MeshSizes.of(init_device_mesh("cpu", (2,)))
    with pytest.raises(MeshError, match=r"(?s)need exactly 4 ranks, there are 2"):
        make_mesh(dp=2, tp=2, device="cpu")
    with pytest.raises(MeshError, match="'cpu' or 'cuda', got device='tpu'"):
        make_mesh(dp=2, device="tpu")


def test_user_meshes_that_are_refused(pool: Pool) -> None:
    pool.run(2, refuse_user_meshes)


def tie(ranks: list[int]) -> int | None:
    group = new_group(ranks)
    again = new_group(ranks)
    if group is None or again is None:
        return None
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    value = torch.tensor([dist.get_rank() + 1], device=device)
    dist.all_reduce(value, group=group)
    dist.all_reduce(value, group=again)
    return int(value)


def test_new_group_needs_its_members_only(pool: Pool) -> None:
    assert pool.run(4, tie, [3, 0]) == [10, None, None, 10]


def test_one_process_needs_no_launcher() -> None:
    code = (
        "import nemo2.mesh as m; g = m.MeshGroups.of(m.make_mesh(dp=-1, device='cpu'));"
        "assert g.sizes == m.MeshSizes(); print(g.sizes)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "pp=1 dp=1 cp=1 tp=1"


def test_a_launcher_that_says_half(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MeshError, match=r"not RANK, MASTER_ADDR, MASTER_PORT; start with torchrun"):
        make_mesh(dp=2, device="cpu")


ENDS = """
import atexit, ctypes
atexit.register(ctypes.PyDLL(None).usleep, 500_000)  # runs last, and holds the GIL
import torch, torch.distributed as dist
import nemo2
nemo2.make_mesh(device="cpu")
def last():
    size = 2**24
    dist.all_gather([torch.empty(size)], torch.ones(size), async_op=True)
atexit.register(last)
"""


def test_exit_waits_until_gloo_has_dropped_its_tensors() -> None:
    command = [sys.executable, "-c", ENDS]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr

"""The worker pool itself: results, failures, hangs, and the job after each."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool


def total(offset: int) -> tuple[int, float, str]:
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    value = torch.tensor([float(dist.get_rank() + offset)], device=device)
    dist.all_reduce(value)
    return dist.get_world_size(), float(value), os.environ["RANK"]


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("planted")
    dist.barrier()


def hang_on(rank: int) -> None:
    while dist.get_rank() == rank:
        time.sleep(0.1)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def warn() -> None:
    warnings.warn("planted", stacklevel=1)


def settings() -> tuple[object, ...]:
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        os.environ.get("PLANTED"),
        os.getcwd(),
    )


def change_settings(folder: str) -> None:
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    os.environ["PLANTED"] = "1"
    os.chdir(folder)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_job_has_its_own_world(pool: Pool, world_size: int) -> None:
    got = pool.run(world_size, total, 1)
    expected = world_size * (world_size + 1) / 2
    assert got == [(world_size, expected, str(rank)) for rank in range(world_size)]


def test_a_job_on_a_warm_pool_is_quick(pool: Pool) -> None:
    pool.run(2, total, 0)
    start = time.monotonic()
    for _ in range(5):
        pool.run(2, total, 0)
    assert (time.monotonic() - start) / 5 < 3.0  # 0.05 s on an idle machine; a cold pool takes 8


def test_a_job_leaves_no_setting_behind(pool: Pool, tmp_path: Path) -> None:
    before = pool.run(2, settings)
    pool.run(1, change_settings, str(tmp_path))
    assert pool.run(2, settings) == before


def test_the_first_failure_is_shown_and_the_next_job_works(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)failed, first to last: \[1.*planted"):
        pool.run(2, fail_on, 1)
    assert pool.run(2, total, 0)[0][1] == 1.0


def test_a_rank_that_hangs_is_shown_and_replaced(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)still running after 3 s.*\[1\].*hang_on"):
        pool.run(2, hang_on, 1, timeout=3)
    assert pool.run(2, total, 0)[0][1] == 1.0


def test_a_rank_that_is_killed_is_named_and_replaced(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match=r"ranks that failed, first to last"):
        pool.run(2, die_on, 1)
    assert pool.run(2, total, 0)[0][1] == 1.0


def test_warnings_are_errors_in_workers(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="UserWarning: planted"):
        pool.run(1, warn)

"""Fixtures shared by all tests."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator

import pytest

from tests.pool import Pool

if os.environ.get("NEMO2_TEST_DEVICE", "cpu") == "cpu":
    # The gloo suite means the CPU also on a machine with GPUs, in all processes it starts.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tests start many processes: only the first of them compiles what all import.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session")
def pool(pytestconfig: pytest.Config) -> Iterator[Pool]:
    """Worker processes for distributed tests; NEMO2_TEST_DEVICE=cuda runs them on GPUs."""
    workers = Pool(
        device=os.environ.get("NEMO2_TEST_DEVICE", "cpu"),
        filters=tuple(pytestconfig.getini("filterwarnings")),
    )
    atexit.register(workers.close)  # an interrupted session leaves no process behind
    yield workers
    workers.close()

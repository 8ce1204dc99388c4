"""Parity with one device, by ``verify``, over a covering design of models, meshes and options."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from tests.matrix import check, covering, plain, product
from tests.models import ZOO
from tests.pool import HOSTS

ON_GPUS = os.environ.get("NEMO2_TEST_DEVICE") == "cuda"
LARGEST = HOSTS * torch.cuda.device_count() if ON_GPUS else 8
CELLS = product(largest=LARGEST)
DESIGN = covering(CELLS)
WORLDS = sorted({c.world for c in DESIGN})


def test_design_covers_every_pair():
    wanted = {p for c in CELLS for p in itertools.combinations(c.options, 2)}
    found = {p for c in DESIGN for p in itertools.combinations(c.options, 2)}
    assert found == wanted
    assert len(DESIGN) < len(CELLS) / 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", WORLDS)
def test_equal_to_one_device(pool, world):
    cells = [c for c in DESIGN if c.world == world]
    results = pool.run(world, check, cells, torch.float64, pool.device, timeout=580)[0]
    bad = [f"{c}\n{text}" for c, (ok, text) in zip(cells, results, strict=True) if not ok]
    assert not bad, "\n".join(bad)


@pytest.mark.timeout(300)
def test_equal_to_one_device_in_float32(pool):
    cells = [plain(m, 2, dp=2, tp=2) for m in ("gpt tied", "encoder", "llama")]
    cells += [plain(m, 5, pp=2, tp=2) for m in ("gpt", "skip glue", "llama tied")]
    cells += [plain(m, 2, cp=2, tp=2) for m in ("fused", "gpt2")]
    results = pool.run(4, check, cells, torch.float32, pool.device, timeout=280)[0]
    bad = [f"{c}\n{text}" for c, (ok, text) in zip(cells, results, strict=True) if not ok]
    assert not bad, "\n".join(bad)


@pytest.mark.timeout(300)
def test_fewer_kv_heads_than_ranks(pool):
    cases = ("gpt grouped", "llama")
    cells = [plain(m, 2, tp=4) for m in cases]
    results = pool.run(4, check, cells, torch.float64, pool.device, timeout=280)[0]
    wide = [plain(m, 2, pp=2, tp=4) for m in cases]
    results += pool.run(8, check, wide, torch.float64, pool.device, timeout=280)[0]
    assert all(ok for ok, _ in results), [text for ok, text in results if not ok]
    assert all(ZOO[m].how.get("kv_heads", 2) < 4 for m in cases)


@pytest.mark.timeout(300)
def test_more_stages(pool):
    """Middle stages, counts that do not divide, fewer microbatches than stages."""
    three = [plain(m, mb, pp=3) for m in ("gpt", "skip argument", "skip glue") for mb in (1, 2)]
    results = pool.run(3, check, three, torch.float64, pool.device, timeout=280)[0]
    four = [plain("skip glue", 2, dp=2, pp=4), plain("skip argument", 5, pp=4, tp=2)]
    results += pool.run(8, check, four, torch.float64, pool.device, timeout=280)[0]
    assert all(ok for ok, _ in results), [text for ok, text in results if not ok]

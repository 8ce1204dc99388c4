"""The pictures of the documentation show what plans and runs say now."""

from __future__ import annotations

import json
from typing import Any

import pytest

from docs.pictures import record
from docs.pictures.data import FOLDER, PICTURES, problems
from docs.pictures.draw import draw, shown
from tests.pool import Pool

PLANNED = [name for name in PICTURES if not name.startswith("schedule")]
RECORDED = [name for name in PICTURES if name.startswith("schedule")]


def made() -> dict[str, Any]:
    return {name: json.loads(json.dumps(PICTURES[name]())) for name in PLANNED}


def test_pictures_of_plans_are_up_to_date(pool: Pool) -> None:
    """Draw them again with ``python -m docs.pictures`` where this fails."""
    (now,) = pool.run(1, made)
    assert [name for name in PLANNED if shown(FOLDER / f"{name}.svg") != now[name]] == []


@pytest.mark.parametrize("name", RECORDED)
def test_pictures_of_schedules_are_those_recorded(name: str) -> None:
    data = PICTURES[name]()
    assert shown(FOLDER / f"{name}.svg") == data
    assert problems(**data) == []


def test_pictures_are_small() -> None:
    sizes = {name: (FOLDER / f"{name}.svg").stat().st_size for name in PICTURES}
    assert max(sizes.values()) < 100_000, sizes


@pytest.mark.parametrize("name", ["context_parallel", "schedule_1f1b"])
def test_the_script_draws(tmp_path, name: str) -> None:
    data = PICTURES[name]()
    first = draw(name, data, tmp_path).read_bytes()
    assert shown(tmp_path / f"{name}.svg") == data
    assert draw(name, data, tmp_path).read_bytes() == first  # drawn again it is the same file


@pytest.mark.parametrize("name", record.SCHEDULES)
def test_a_schedule_is_recorded(pool: Pool, name: str) -> None:
    if pool.device != "cpu":
        pytest.skip("recorded on the CPU")
    pipeline = record.SCHEDULES[name]
    ranks = pool.run(record.RANKS, record.trials, pipeline, 1, 0.002, 0.004)
    rows = record.joined(rank[0] for rank in ranks)
    stages = record.RANKS * pipeline.virtual_stages
    assert len(rows) == 2 * stages * record.MICROBATCHES
    assert problems(rows, record.RANKS, stages, record.MICROBATCHES) == []


def test_impossible_recordings_are_seen() -> None:
    data = PICTURES["schedule_1f1b"]()
    rows, rest = data["rows"], {k: v for k, v in data.items() if k != "rows"}
    early = [[*row[:4], 0, 1] if row[1:4] == [3, "backward", 7] else row for row in rows]
    assert problems(rows[1:], **rest) == [f"stage 0 has no backward of microbatch {rows[0][3]}"]
    assert "microbatch 7 is out of order" in problems(early, **rest)
    long = [[*row[:5], row[5] + 50] if row[1:4] == [3, "forward", 0] else row for row in rows]
    assert "rank 3 does two at once" in problems(long, **rest)

"""Features of the Trainer on a mesh (docs/lightning.md): as on one device, or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.utils._pytree import tree_flatten

from tests.pool import Pool
from tests.trainer_features import FEATURES, FEATURES_REFUSED, feature, on_meta, refusal

LOOSE = {"precision_32": 1e-4, "precision_bf16": 2e-2}


@pytest.mark.parametrize("name", FEATURES)
def test_works(pool: Pool, tmp_path: Path, name: str) -> None:
    (tmp_path / "one").mkdir()
    want = feature(name, str(tmp_path / "one"), False)
    got = pool.run(4, feature, name, str(tmp_path / "mesh"), True)
    leaves, spec = tree_flatten(want)
    assert leaves
    for rank in got:
        others, same = tree_flatten(rank)
        assert same == spec
        tolerance = LOOSE.get(name, 1e-6)
        for a, b in zip(others, leaves, strict=True):
            assert a == (pytest.approx(b, rel=tolerance) if isinstance(b, float) else b)
        assert rank == got[0]


@pytest.mark.parametrize("name", FEATURES_REFUSED)
def test_refused(pool: Pool, tmp_path: Path, name: str) -> None:
    says = FEATURES_REFUSED[name][1]
    for message in pool.run(4, refusal, name, str(tmp_path)):
        assert re.search(says, message), message


def test_configure_model_on_meta(pool: Pool, tmp_path: Path) -> None:
    """Weights are drawn by module name, the same on any mesh."""
    (one,) = pool.run(1, on_meta, str(tmp_path), 1)
    assert len(one) == 3
    for rank in pool.run(4, on_meta, str(tmp_path), 4):
        assert rank == pytest.approx(one)


def test_each_row_of_the_table_names_a_test() -> None:
    root = Path(__file__).parent
    text = (root.parent / "docs" / "lightning.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    shown = set()
    for row in rows:
        named = re.search(r"\| `(test_\w+\.py)::(test_\w+)(?:\[(\w+)\])?` \|$", row)
        assert named is not None, row
        file, function, case = named.groups()
        assert f"\ndef {function}(" in (root / file).read_text(), row
        if case is not None:
            cases = {"test_works": FEATURES, "test_refused": FEATURES_REFUSED}[function]
            assert case in cases, row
            assert ("refused" in row or "ends all" in row) == (function == "test_refused"), row
            shown.add(case)
    assert shown == {*FEATURES, *FEATURES_REFUSED}

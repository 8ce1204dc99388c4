"""Features of the Trainer on a mesh (docs/lightning.md): as on one device, or refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._pytree import tree_flatten

import nemo2
from nemo2.lightning.alike import fingerprint
from tests.lightning_programs import Lit, data, trainer
from tests.pool import Pool
from tests.trainer_features import (
    FEATURES,
    FEATURES_REFUSED,
    NoNumber,
    Run,
    feature,
    interleaved,
    on_meta,
    refusal,
    too_much,
)

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


def told(folder: str) -> list[str]:
    """Validate samples that dp does not divide, and save amid accumulated gradients."""
    run = Run(folder, True)
    made = run.trainer(accumulate_grad_batches=2, max_steps=2)
    torch.manual_seed(1)
    module = Lit()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(module, run.data(), run.data(16))
        made.validate(module, run.data(17), verbose=False)
    return [str(w.message) for w in caught]


def saves_amid(folder: str) -> list[str]:
    keep = ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1)
    run, options = Run(folder, True), {"accumulate_grad_batches": 2, "val_check_interval": 3}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(callbacks=[keep], max_steps=2, enable_checkpointing=True, **options)
    return [str(w.message) for w in caught]


def test_what_cannot_come_to_other_stages_is_told(pool: Pool, tmp_path: Path) -> None:
    ranks = pool.run(4, too_much, str(tmp_path))
    said = ranks[0][0]
    assert any("self.large was changed by a step and has 1048" in text for text in said)
    assert any("self.function was changed" in text and "cannot be sent" in text for text in said)
    assert len(said) == 2
    assert [small for _, small, _ in ranks] == [True] * 4
    assert [large for _, _, large in ranks] == [False, False, True, True]


def test_chunks_of_one_rank_keep_once(pool: Pool, tmp_path: Path) -> None:
    one, other = pool.run(2, interleaved, str(tmp_path))
    assert one == other
    assert one[0] == 8  # 4 steps of 2 microbatches


def anomaly(folder: str) -> str:
    strategy = nemo2.MegatronStrategy(tp=2)
    options = {"detect_anomaly": True, "val_check_interval": 1.0}
    made = trainer(folder, strategy=strategy, devices=2, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Error detected in|Anomaly Detection)")
        with pytest.raises(RuntimeError) as caught:
            made.fit(NoNumber(), data(8, 16), data(8, 16))
    return str(caught.value)


def test_an_anomaly_ends_training_on_all_ranks(pool: Pool, tmp_path: Path) -> None:
    for said in pool.run(2, anomaly, str(tmp_path)):
        assert "returned nan values" in said


def test_samples_read_twice_are_told(pool: Pool, tmp_path: Path) -> None:
    said = pool.run(4, told, str(tmp_path))[0]
    (one,) = [text for text in said if "read twice" in text]
    assert "the first 1 are read twice" in one


def test_a_save_amid_accumulated_gradients_is_told(pool: Pool, tmp_path: Path) -> None:
    said = pool.run(4, saves_amid, str(tmp_path))[0]
    assert [t for t in said if "saved after 1 of 2 batches whose gradients are" in t]


def test_fingerprints_of_all_kinds_of_batches() -> None:
    """What is equal has one, what differs another one, and none fails."""

    def batches() -> list[Any]:
        x = torch.arange(20000.0).reshape(4, -1)
        kinds = [x, x.int(), x.bfloat16(), x.to_sparse(), x[:, ::2], x.T, x[:0], x > 3]
        odd = [torch.complex(x, x).conj(), torch.complex(x, x).conj().imag]
        parts = [torch.ones(2), torch.ones(3)]
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
        plain = [["a", 1, None, 2.5], {"x": x, "y": (x, "b")}, np.arange(5), object(), nested]
        return [*kinds, *odd, *plain]

    made = [fingerprint(batch) for batch in batches()]
    assert made == [fingerprint(batch) for batch in batches()]
    assert len(set(made)) == len(made)
    x = torch.arange(20000.0)
    assert fingerprint(x) != fingerprint(x + 1)
    assert fingerprint(x) != fingerprint(x.reshape(2, -1))


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

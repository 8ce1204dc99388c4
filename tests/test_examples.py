"""The example trains, prints its plan, saves its curve and generates, on the meshes it is given."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def train(tmp_path: Path, *arguments: str) -> str:
    text = tmp_path / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 300)
    command = [sys.executable, str(ROOT / "examples" / "train_gpt.py"), "--data", str(text)]
    options = ["--out", str(tmp_path), "--batch", "4", *arguments]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mesh", ["pp=2,tp=2", "dp=2"])
def test_train_gpt(tmp_path, mesh):
    out = train(tmp_path, "--mesh", mesh, "--steps", "8", "--generate", "4")
    world = 4 if "," in mesh else 2
    assert out.count(f"({world} ranks)") == 1
    assert "tokens/s" in out
    found = re.search(r"held-out: ([\d.]+) nats per byte", out)
    assert found is not None
    assert float(found[1]) < 5.0
    assert "generated on the same mesh:\ndef " in out
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_model_file_knows_no_mesh():
    text = (ROOT / "examples" / "gpt.py").read_text()
    assert not re.search(r"rank|group|distributed|reduce|gather|mesh", text)
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < 130, path

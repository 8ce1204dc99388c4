"""LightningCLI: the mesh and the other options of the strategy from YAML, with their help."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

import nemo2
from tests.lightning_programs import ignore_upstream_warnings
from tests.pool import Pool

EXAMPLES = Path(__file__).parent.parent / "examples"
WRONG = {
    "axis": ({"pip": 2}, "Option 'pip' is not accepted"),
    "kind": ({"data_parallel": "fsdpp"}, "data_parallel='fsdpp' is unknown; kinds: ddp, zero1"),
    "key": ({"data_parallel": {"kinds": "ddp"}}, "Option 'kinds' is not accepted"),
    "count": ({"pipeline": {"microbatches": 0}}, r"Pipeline\(microbatches=0\): give an integer"),
    "type": ({"pipeline": {"microbatches": "two"}}, "Expected a <class 'int'>"),
    "schedule": ({"pipeline": {"schedule": "gpipe"}}, "schedules: 1f1b, interleaved"),
}


def config(folder: Path, strategy: dict[str, Any]) -> Path:
    """Write examples/mesh.yaml, made tiny: two devices and eight steps, with this strategy."""
    text = folder / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 50)
    tree = yaml.safe_load((EXAMPLES / "mesh.yaml").read_text())
    tree["trainer"] |= {"devices": 2, "accelerator": "cpu", "log_every_n_steps": 1}
    tree["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    tree["trainer"]["strategy"]["init_args"] = strategy
    tree["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    tree["model"] = {"cfg": {"layers": 2, "width": 16, "length": 8}, "steps": 8}
    tree["data"] = {"batch": 8, "held_out": 16, "files": [str(text)]}
    path = folder / "mesh.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "train_gpt.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


def test_print_config_shows_the_options_with_their_help() -> None:
    done = run("fit", "--config", str(EXAMPLES / "mesh.yaml"), "--print_config")
    assert done.returncode == 0, done.stderr
    shown = done.stdout[done.stdout.index("\n  strategy:") : done.stdout.index("\n  devices:")]
    helped = [
        ("pipeline degree.", "pp: 2"),
        ("tensor-parallel degree.", "tp: 1"),
        ("parts of each dp coordinate's batch", "microbatches: 2"),
        ('``"interleaved"``: each rank runs several stages', "schedule: 1f1b"),
        ("keeps all on every rank and all-reduces gradients in buckets", "kind: zero1"),
        ("number of replicas of the shards", "replicate: 1"),
        ("a ``ContextParallel``", "context_parallel: ring"),
        ("sequence; None: where a sequence is found", "sequence_parallel:"),
        ("to save memory; None: keep all", "remat:"),
        ("compiles each block", "compile: false"),
    ]
    for help, line in helped:
        before, found, _ = shown.partition(f" {line}\n")
        assert found, line
        comment = before.rstrip().rsplit("\n\n", 1)[-1]
        assert help in comment, (line, comment)
        assert comment.lstrip().startswith("#")


def in_python(text: str) -> float:
    """Return the held-out loss of the same training with the options as Python objects."""
    ignore_upstream_warnings()
    sys.path.insert(0, str(EXAMPLES))
    from gpt import GPTConfig
    from lit_gpt import LitGPT, TextData

    L.seed_everything(0, verbose=False)
    strategy = nemo2.MegatronStrategy(pp=2, pipeline=nemo2.Pipeline(2, "interleaved", 2))
    trainer = L.Trainer(
        strategy=strategy,
        devices=2,
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TextData([Path(text)], length=8, steps=8, batch=8, held_out=16)
    module = LitGPT(GPTConfig(layers=4, width=16, length=8), steps=8)
    trainer.fit(module, data)
    return float(trainer.callback_metrics["held-out"])


@pytest.mark.timeout(200)
def test_training_from_yaml_is_that_in_python(pool: Pool, tmp_path: Path) -> None:
    pipeline = {"microbatches": 2, "schedule": "interleaved", "virtual_stages": 2}
    path = config(tmp_path, {"pp": 2, "pipeline": pipeline})
    done = run("fit", "--config", str(path), "--model.cfg.layers", "4")
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("lightning_logs/*/metrics.csv")
    with log.open() as file:
        rows = list(csv.DictReader(file))
    (reached,) = (float(row["held-out"]) for row in rows if row["held-out"])
    assert pool.run(2, in_python, str(tmp_path / "text.txt")) == pytest.approx([reached] * 2)
    assert any(float(row["tokens/s"] or 0) > 0 for row in rows)
    saved = yaml.safe_load(log.with_name("config.yaml").read_text())
    assert saved["trainer"]["strategy"]["init_args"]["pipeline"]["virtual_stages"] == 2


@pytest.mark.parametrize("name", WRONG)
def test_a_typo_is_a_clear_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    strategy, says = WRONG[name]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
    # lightning 2.6 calls what jsonargparse 4.53 deprecates.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from train_gpt_cli import main

    # jsonargparse ends the process for what the types rule out, and passes on what nemo2 says.
    with pytest.raises((SystemExit, ValueError)) as caught:
        main(["fit", "--config", str(config(tmp_path, strategy))])
    written = capsys.readouterr().err + str(caught.value)
    assert re.search(says, written), written
    assert not torch.distributed.is_initialized()

"""``examples/finetune_hf.py``: the same fine-tune on a mesh and on one process."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import nemo2
from nemo2.verify import _Wide
from tests.lightning_programs import Record, ignore_upstream_warnings
from tests.zoo import VOCAB, causal, token_ids

transformers = pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parent.parent / "examples" / "finetune_hf.py"
STEPS = 20
HOW = ("--steps", str(STEPS), "--batch", "8", "--length", "16", "--lr", "1e-3")
MESH = ("--mesh", "pp=2,tp=2", "--microbatches", "2", "--precision", "64-true")
ALONE = ("--precision", "64-true")


def example() -> ModuleType:
    ignore_upstream_warnings()
    sys.path.insert(0, str(EXAMPLE.parent))
    try:
        return importlib.import_module(EXAMPLE.stem)
    finally:
        sys.path.remove(str(EXAMPLE.parent))


def arguments(start: Path, save: Path, *options: str) -> list[str]:
    where = ("--model", start, "--text", start / "text.txt", "--save", save)
    return [*map(str, where), *HOW, *options]


def run(start: Path, save: Path, *options: str, wide: bool = False) -> dict[str, torch.Tensor]:
    """Run the example in this process; return what the Trainer's model holds at the end."""
    step = nemo2.MegatronStrategy.training_step

    def widened(*args: Any) -> torch.Tensor:
        """Compute in float64 throughout: transformers takes norms and losses to float32."""
        with _Wide():
            return step(*args)

    with mock.patch.object(nemo2.MegatronStrategy, "training_step", widened if wide else step):
        trainer = example().main(arguments(start, save, *options))
    state = trainer.strategy.parallel_model.full_state_dict()
    return {n.removeprefix("model."): t.cpu() for n, t in state.items()}


def losses_of(save: Path) -> list[float]:
    with (save / "log" / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def opened(save: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(save)


def logits_of(save: Path) -> torch.Tensor:
    with torch.no_grad():
        return opened(save).double()(token_ids(2)).logits


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as transformers saves it, without a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(1)
    causal("Llama").save_pretrained(folder)
    (folder / "text.txt").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 40)
    return folder


@pytest.fixture(scope="module")
def alone(pool, start: Path) -> Path:
    """The fine-tune on one process."""
    save = start / "alone"
    pool.run(1, run, start, save, *ALONE)
    return save


def test_the_command_on_a_mesh_is_the_fine_tune_of_one_process(start, alone, tmp_path):
    command = [sys.executable, str(EXAMPLE), *arguments(start, tmp_path, *MESH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"saved: {tmp_path}" in done.stdout
    losses = losses_of(tmp_path)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5
    # transformers computes the loss in float32, the log keeps float32
    assert losses == pytest.approx(losses_of(alone), rel=1e-6)
    torch.testing.assert_close(logits_of(tmp_path), logits_of(alone), rtol=0, atol=1e-6)
    assert (logits_of(tmp_path) - logits_of(start)).abs().max() > 0.1


def test_equal_in_float64_and_saved_as_it_is(pool, start, tmp_path):
    """The differences above are of float32: without its casts there are none but of order."""
    (whole,) = pool.run(1, run, start, tmp_path / "one", *ALONE, wide=True)
    states = pool.run(4, run, start, tmp_path / "four", *MESH, wide=True)
    assert losses_of(tmp_path / "four") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-7)
    for save, state in ((tmp_path / "one", whole), *((tmp_path / "four", s) for s in states)):
        saved = opened(save).state_dict()
        assert set(saved) == set(state)
        assert all(torch.equal(saved[n], state[n]) for n in saved)
    one, four = logits_of(tmp_path / "one"), logits_of(tmp_path / "four")
    torch.testing.assert_close(four, one, rtol=1e-9, atol=1e-9)


def test_the_module_runs_under_a_plain_trainer(start, alone):
    """It knows nothing of nemo2's strategy: load and annotate are the same without it."""
    script, record = example(), Record()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision="64-true",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record],
    )
    L.seed_everything(0, verbose=False)
    tokens = script.tokens_of(start / "text.txt", None, start)
    assert int(tokens.max()) < VOCAB
    windows = script.Windows(tokens, 15, STEPS * 8)
    trainer.fit(script.FineTune(start, 1e-3, warmup=1), DataLoader(windows, 8))
    assert record.losses == pytest.approx(losses_of(alone), rel=1e-6)


def test_a_folder_with_a_tokenizer(pool, start, tmp_path):
    """Its tokens are trained on, and it is saved beside the model, in bf16 with float32 masters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder, save = tmp_path / "in", tmp_path / "out"
    opened(start).save_pretrained(folder)
    text = (start / "text.txt").read_text()
    (folder / "text.txt").write_text(text)
    words = {word: i + 10 for i, word in enumerate(dict.fromkeys(text.split()))} | {"?": 3}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    pool.run(1, run, folder, save, "--remat", "full")
    tokenizer = transformers.AutoTokenizer.from_pretrained(save)
    assert tokenizer("the lazy dog")["input_ids"] == [words[w] for w in ("the", "lazy", "dog")]
    losses = losses_of(save)
    assert losses[-1] < losses[0] - 0.5
    assert opened(save).dtype == torch.float32

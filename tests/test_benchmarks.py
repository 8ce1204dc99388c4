"""The benchmarks run, and their peers train the same model."""

from __future__ import annotations

import pytest

from benchmarks import performance
from benchmarks.shapes import SHAPES
from benchmarks.train import PEERS, arguments, measure


def rows(mesh, options):
    """Measure all peers, as torchrun's ranks would."""
    from megatron.core import parallel_state

    given = ["--shape", "tiny", "--mesh", mesh, "--steps", "1", "--losses", "4", *options]
    try:
        return [measure(arguments([*given, "--peer", peer])) for peer in PEERS]
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(
    ("mesh", "options"),
    [("dp=2,tp=2", ["--reshard"]), ("pp=4", [])],
)
def test_peers_have_the_same_losses(pool, mesh, options):
    results = pool.run(4, rows, mesh, ["--eager", *options])
    ours, *others = results[0]
    for theirs in others:
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-5)
    assert ours["losses"][0] != ours["losses"][3]
    assert ours["mfu"] > 0
    assert ours["peak_gib"] > 0


def test_the_shapes_are_those_of_the_table():
    assert SHAPES["8b16l"].parameters / 1e9 == pytest.approx(4.54, abs=0.005)
    assert SHAPES["8b16l"].flops / 1e9 == pytest.approx(27.31, abs=0.005)
    assert SHAPES["1b"].flops / 1e9 == pytest.approx(8.22, abs=0.005)


def test_a_table_compares_within_one_row_and_keeps_failures(tmp_path):
    def made(row, peer, speed):
        return {
            "row": row,
            "peer": peer,
            "ms": 1.0,
            "tokens_per_second_per_device": speed,
            "mfu": 0.5,
            "peak_gib": 1.0,
            "first_step_s": 1.0,
            "losses": [1.0],
            "device": "cpu",
            "torch": "2",
        }

    results = [made("a", "nemo2", 120.0), made("a", "torch", 100.0), made("b", "nemo2", 1.0)]
    results.append({"row": "b", "peer": "torch", "error": "out of memory"})
    assert performance.ratios(results) == ["- a: nemo2 runs at 1.20 x the speed of torch."]
    assert "| b | torch | out of memory |" in performance.report(results)
    performance.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000

"""The benchmarks run, and their peers train the same model."""

from __future__ import annotations

import pytest

from benchmarks import performance, resume
from benchmarks.attribution import Kernel, attribute, kind, longest
from benchmarks.shapes import SHAPES
from benchmarks.train import PEERS, arguments, measure


def rows(mesh, options, peers=PEERS):
    """Measure peers, as torchrun's ranks would."""
    from megatron.core import parallel_state

    given = ["--shape", "tiny", "--mesh", mesh, "--steps", "1", "--losses", "20", *options]
    try:
        return [measure(arguments([*given, "--peer", peer])) for peer in peers]
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
    assert len(set(ours["losses"])) == 20
    assert ours["mfu"] > 0
    assert ours["peak_gib"] > 0


def test_context_parallelism_by_hand_has_the_same_losses(pool):
    with pytest.raises(RuntimeError, match="needs Transformer Engine"):
        pool.run(1, rows, "cp=2", ["--eager"], ["megatron"])
    ours, theirs = pool.run(4, rows, "dp=2,cp=2", ["--eager"], ["nemo2", "torch"])[0]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-5)
    assert len(set(ours["losses"])) == 20


def test_a_rank_runs_alone():
    row = performance.Row("tiny", "dp=2,tp=2", "any", eager=True, alone=True)
    made = performance.run_row(row, ["nemo2", "torch"], 1, 120)
    assert [(x["peer"], x["alone"], x["losses"]) for x in made] == [
        ("nemo2", True, []),
        ("torch", True, []),
    ]
    assert "rank 0 alone" in performance.report(made)


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
    first = performance.page(results, "", "plot.png")
    again = performance.page(results[:2], first + "\n## What was measured\nby hand\n", "plot.png")
    assert again.endswith("\nby hand\n")
    assert "out of memory" not in again
    performance.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_time_of_a_step_is_attributed_once():
    kernels = [
        Kernel("ncclDevKernel_AllGather", 0.0, 4000.0),
        Kernel("nvjet_hsh_128x256", 1000.0, 3000.0),  # hides half of it
        Kernel("triton_poi_fused_add", 2000.0, 5000.0),
        Kernel("flash_fwd_kernel", 6000.0, 7000.0),
    ]
    got = attribute(kernels, 8000.0)
    want = {"communication": 1.0, "matmul": 2.0, "compiled": 2.0, "attention": 1.0, "idle": 2.0}
    assert {name: ms for name, ms in got.items() if ms} == want
    assert kind("triton_poi_fused__scaled_dot_product_flash_attention_view_3") == "compiled"
    flash = (
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>"
    )
    assert kind(flash) == "attention"
    assert kind("triton_tem_fused_mm_0") == kind("void bmm_kernel") == "matmul"
    assert kind("void at::native::_scatter_gather_elementwise_kernel<128, 8>") == "other"
    assert next(longest(kernels)).split()[:4] == ["4.00", "ms", "1", "x"]
    rows = [{"row": "a", "peer": "torch", "milliseconds": [got, {**got, "idle": 3.0}]}]
    assert performance.attributions(rows)[-2].endswith("| 2 to 3 |")


def test_a_training_that_goes_on_says_what_both_lives_ran():
    first = [{"started": 1.0}, *({"step": n, "loss": 2.0, "seconds": 1.0} for n in range(1, 6))]
    then = [{"started": 2.0}, *({"step": n, "loss": 2.1, "seconds": 3.0} for n in range(4, 9))]
    then.append({"generated": 4, "known": 3, "seconds": 0.5})
    said = resume.table(resume.arguments(["--every", "3"]), [first, then])
    assert "dp=2,tp=2: steps 1 to 5, 1.0 s" in said[0]
    assert "pp=2,tp=2: steps 4 to 8, 2.0 s" in said[1]
    assert said[2] == "steps that both ran: [4, 5]; losses differ by 5.0e-02 at most"
    assert "generated 4 tokens in 0.5 s, of which 3" in said[-1]

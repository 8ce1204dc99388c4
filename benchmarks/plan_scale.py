"""Time and memory of planning large models for many ranks, on one machine without a GPU.

``python -m benchmarks.plan_scale`` plans Llamas on meta, each in a process of its own: annotations
are derived, and the step is one loss of a microbatch of one sequence of 4096 tokens.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import nemo2

WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES = {
    "8B": (4096, 14336, 32, 32),
    "70B": (8192, 28672, 80, 64),
    "405B": (16384, 53248, 126, 128),
}
CASES = (
    ("8B", "dp=16,pp=4,tp=8"),
    ("70B", "dp=8,pp=8,tp=8"),
    ("70B", "dp=8,pp=4,cp=2,tp=8"),
    ("405B", "dp=128,pp=16,tp=8"),
)
MICROBATCHES, LENGTH = 8, 4096


def build(shape: str) -> nn.Module:
    """Return a Llama on meta, annotated from its structure."""
    import transformers

    sizes: dict[str, Any] = dict(zip(WIDTHS, SHAPES[shape], strict=True))
    config = transformers.LlamaConfig(
        **sizes, vocab_size=128256, num_key_value_heads=8, use_cache=False
    )
    with torch.device("meta"):
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return nemo2.annotate(model)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    value: Tensor = model(**batch).loss
    return value


def peak() -> float:
    """Return the most resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(shape: str, mesh: str) -> str:
    """Return a row of the table."""
    start = time.perf_counter()
    model = build(shape)
    built = time.perf_counter()
    ids = torch.zeros(MICROBATCHES, LENGTH, dtype=torch.long)
    plan = nemo2.plan(
        model,
        mesh,
        pipeline=nemo2.Pipeline(microbatches=MICROBATCHES),
        step=loss,
        batch={"input_ids": ids, "labels": ids},
    )
    planned = time.perf_counter()
    lines = len(str(plan).splitlines())
    size = sum(p.numel() for p in model.parameters()) / 1e9
    return (
        f"| {size:.1f}B | {mesh} | {plan.sizes.world} | {built - start:.1f} |"
        f" {planned - built:.1f} | {time.perf_counter() - planned:.1f} | {lines} | {peak():.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=2, metavar=("SHAPE", "MESH"), help="one, in this process")
    args = parser.parse_args()
    if args.case:
        print(measure(*args.case), flush=True)
        return
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Python", end=" ")
    print(f"{platform.python_version()}, {os.cpu_count()} cores\n")
    print("| parameters | mesh | ranks | build, s | plan, s | print, s | lines | peak, GiB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        own = [sys.executable, "-m", "benchmarks.plan_scale", "--case", *case]
        subprocess.run(own, check=True)


if __name__ == "__main__":
    main()

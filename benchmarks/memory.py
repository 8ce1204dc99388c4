"""Peak host memory of ``parallelize`` for a Hugging Face model on meta, and of ``load``, per rank.

``python -m benchmarks.memory`` starts 4 gloo processes for each mesh. The model is shaped like
Llama, of 1.06 billion parameters. The peak is the growth of this process's resident memory
(VmHWM, reset before) over what it was after imports and one small model on the same mesh; the
ideal is the bytes of the rank's shards plus those of the largest module. With ``--load`` the
weights are saved and read again, and the peak is that of ``load`` beside the shards, which it
fills: of anonymous memory (the pages of the mapped file are the system's), sampled.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import nemo2

MESHES = ("dp=4", "dp=2,tp=2", "dp=2,pp=2", "tp=2,pp=2", "tp=4", "pp=4")
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LARGE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 21,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def build(sizes: dict[str, int]) -> nn.Module:
    """Return an annotated Llama on meta."""
    import transformers

    config = transformers.LlamaConfig(**sizes, use_cache=False)
    with torch.device("meta"):
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return nemo2.annotate(model)


def memory(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def settle() -> int:
    """Return free memory to the system, forget the peak, and return what is resident."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def measure(mesh: Any, **options: Any) -> dict[str, float]:
    """Return peak, kept and ideal growth in bytes, and seconds, of this rank."""
    warm = nemo2.parallelize(build(SMALL), mesh, **options)
    del warm
    model = build(LARGE)
    largest = max(
        sum(p.numel() * p.element_size() for p in m.parameters(recurse=False))
        for m in model.modules()
    )
    before = settle()
    start = time.perf_counter()
    parallel = nemo2.parallelize(model, mesh, **options)
    seconds = time.perf_counter() - start
    peak = memory("VmHWM") - before
    kept = settle() - before
    shards = sum(e.local.nbytes for e in parallel.storage)
    return {
        "peak": peak,
        "kept": kept,
        "shards": shards,
        "ideal": shards + largest,
        "largest": largest,
        "seconds": seconds,
    }


def measure_load(mesh: Any, folder: str) -> dict[str, float]:
    """Return the growth in bytes and the seconds of ``nemo2.load``, and what this rank holds."""
    parallel = nemo2.parallelize(build(LARGE), mesh)
    if not Path(folder).exists():  # the first mesh writes it
        dist.barrier()
        nemo2.save(folder, parallel, format="safetensors")
    settle()
    before, peak, done = memory("RssAnon"), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, memory("RssAnon") - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    nemo2.load(folder, parallel)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    settle()
    kept = memory("RssAnon") - before
    largest = max(p.local.nbytes for p in parallel.storage)
    shards = sum(p.local.nbytes for p in parallel.storage)
    sizes = {"shards": shards, "largest": largest, "ideal": shards + largest}
    return {**sizes, "peak": shards + peak, "kept": shards + kept, "seconds": seconds}


def rank(sizes: str, folder: str | None) -> None:
    """Measure one mesh on this rank; rank 0 prints the row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mesh = nemo2.make_mesh(**dict(nemo2_sizes(sizes)), device="cpu")
    own = measure(mesh) if folder is None else measure_load(mesh, folder)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    if dist.get_rank() == 0:
        print("\n".join(row(sizes, i, r) for i, r in enumerate(everyone)), flush=True)
    dist.destroy_process_group()


def nemo2_sizes(text: str) -> list[tuple[str, int]]:
    return [(axis, int(size)) for axis, size in (part.split("=") for part in text.split(","))]


def row(mesh: str, index: int, r: dict[str, float]) -> str:
    mib = {k: r[k] / 2**20 for k in ("shards", "largest", "ideal", "peak", "kept")}
    numbers = " | ".join(f"{x:.0f}" for x in mib.values())
    return f"| {mesh} | {index} | {numbers} | {r['peak'] / r['ideal']:.2f} | {r['seconds']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", action="append", help="measured alone; several are allowed")
    parser.add_argument("--load", action="store_true", help="measure reading the weights")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        rank(args.rank_of, args.folder)
        return
    import transformers

    count = sum(p.numel() for p in build(LARGE).parameters())
    print(f"{count / 1e9:.2f} billion parameters, float32, {4 * count / 2**20:.0f} MiB")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, Python", end=" ")
    print(f"{platform.python_version()}, 4 processes of one thread, {os.cpu_count()} cores\n")
    print("| mesh | rank | shards | largest module | ideal | peak | kept | peak / ideal | s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for mesh in args.mesh or MESHES:
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4"]
            launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--log-dir", folder]
            own = ["-m", "benchmarks.memory", "--rank-of", mesh]
            own += ["--folder", f"{folder}/weights"] if args.load else []
            quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            subprocess.run([*launch, *own], check=True, env=quiet)


if __name__ == "__main__":
    main()

"""Tokens per second of ``nemo2.generate``, with and without the cache, on meshes and one device.

``python -m benchmarks.generate`` starts the processes of each mesh: on GPUs if the machine has
enough, else CPU processes of one thread. The example GPT and a Llama, of random weights; greedy.
A first request plans and warms up, the second is measured; the last column is how much longer
the first one took (it imports megatron-core, too). ``plain`` is the module itself on one device,
without ``parallelize``.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import nemo2
from examples.gpt import GPT, GPTConfig

MESHES = ("plain", "tp=1", "tp=2", "pp=2", "dp=2", "pp=2,tp=2")
VOCABULARY = 4096
SIZES = {"small": (256, 4), "medium": (1024, 12), "large": (4096, 32)}  # width, layers


def build(name: str, size: str, length: int) -> nn.Module:
    """Return a model that can hold sequences of ``length`` tokens."""
    torch.manual_seed(0)
    width, layers = SIZES[size]
    if name == "gpt":
        return GPT(GPTConfig(VOCABULARY, width, width // 64, layers, length))
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=length,
    )
    return nemo2.annotate(transformers.LlamaForCausalLM(config))


def measure(model: nn.Module, prompts: list[list[int]], new: int, cached: bool) -> dict[str, float]:
    """Return tokens per second of all prompts together, and the seconds of the first request."""
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        found = nemo2.generate(model, prompts, max_new_tokens=new, use_cache=cached)
        taken.append(time.perf_counter() - start)
    assert all(len(x) == len(p) + new for x, p in zip(found, prompts, strict=True))
    return {"rate": len(prompts) * new / taken[1], "ms": 1e3 * taken[1] / new, "first": taken[0]}


def rank(mesh: str, args: argparse.Namespace) -> None:
    """Measure all models on one mesh; rank 0 prints the rows."""
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCABULARY, (args.prompts, args.length), generator=generator).tolist()
    prompts = [row[: args.length - i % 4] for i, row in enumerate(prompts)]  # of unequal lengths
    for name in ("gpt", "llama"):
        model = build(name, args.size, args.length + args.new).to(getattr(torch, args.dtype))
        if mesh == "plain":
            model = model.to(device)
        else:
            sizes = dict(nemo2.mesh.MeshSizes.of(mesh).items())
            model = nemo2.parallelize(model, nemo2.make_mesh(**sizes, device=device.type))
        cached = measure(model, prompts, args.new, True)
        whole = measure(model, prompts, args.new, False)
        if os.environ.get("RANK", "0") == "0":
            numbers = f"{cached['rate']:.0f} | {whole['rate']:.0f} | {cached['ms']:.1f}"
            late = max(cached["first"] - cached["ms"] * args.new / 1e3, 0.0)
            print(f"| {name} | {mesh} | {numbers} | {late:.1f} |", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", action="append", help="measured alone; several are allowed")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate for each")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", help="cpu or cuda; by default where enough GPUs are")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        rank(args.rank_of, args)
        return
    print(f"width {SIZES[args.size][0]}, {SIZES[args.size][1]} layers, {args.dtype},", end=" ")
    print(f"{args.prompts} prompts of up to {args.length} tokens, {args.new} new ones", end="; ")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    print("\n| model | mesh | tokens/s, cache | tokens/s, none | ms a token | first later by, s |")
    print("|---|---|---|---|---|---|", flush=True)
    for mesh in args.mesh or MESHES:
        start(mesh, args)


def start(mesh: str, args: argparse.Namespace) -> None:
    """Run the processes of one mesh."""
    world = 1 if mesh == "plain" else nemo2.mesh.MeshSizes.of(mesh).world
    device = args.device or ("cuda" if torch.cuda.device_count() >= world else "cpu")
    own: list[Any] = ["-m", "benchmarks.generate", "--rank-of", mesh, "--device", device]
    for option in ("size", "prompts", "length", "new", "dtype"):
        own += [f"--{option}", str(getattr(args, option))]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable]
        if world > 1:
            launch += ["-m", "torch.distributed.run", f"--nproc-per-node={world}"]
            launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--log-dir", folder]
        subprocess.run([*launch, *own], check=True, env=quiet)


if __name__ == "__main__":
    main()

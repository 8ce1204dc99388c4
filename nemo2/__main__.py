"""``python -m nemo2 verify module:build --batch module:batch --loss module:loss --mesh tp=2``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from .errors import Nemo2Error
from .options import Pipeline
from .verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 equal, 1 different, 2 for a user error."""
    parser = argparse.ArgumentParser(prog="python -m nemo2", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="compare a model on a mesh with one device")
    check.add_argument("build", help="module:function that returns the annotated model")
    check.add_argument(
        "--batch", required=True, help="module:function (or value) with the global batch"
    )
    check.add_argument("--loss", required=True, help="module:function loss(model, batch)")
    check.add_argument("--mesh", required=True, help="for example dp=2,tp=2")
    check.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    check.add_argument("--dtype", default="float64", choices=("float64", "float32", "bfloat16"))
    check.add_argument("--rtol", type=float)
    check.add_argument("--data-parallel", default="fsdp", choices=("ddp", "zero1", "fsdp"))
    check.add_argument("--microbatches", type=int, default=1)
    args = parser.parse_args(argv)
    sys.path.insert(0, "")
    try:
        batch = _load(args.batch)
        report = verify(
            _load(args.build),
            batch() if callable(batch) else batch,
            _load(args.loss),
            args.mesh,
            device=args.device,
            dtype=getattr(torch, args.dtype),
            rtol=args.rtol,
            data_parallel=args.data_parallel,
            pipeline=Pipeline(microbatches=args.microbatches),
        )
    except Nemo2Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.ok else 1


def _load(text: str) -> Any:
    """Return what ``module:name`` says."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise Nemo2Error(f"{text!r} is not of the form module:name")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        raise Nemo2Error(f"cannot import {module!r}: {error}") from error
    if not hasattr(found, name):
        raise Nemo2Error(f"{module} has no {name!r}")
    return getattr(found, name)


if __name__ == "__main__":
    sys.exit(main())

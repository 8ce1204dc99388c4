"""``python -m nemo2 verify ...`` and ``python -m nemo2 checkpoint show|diff|convert ...``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .errors import Nemo2Error
from .options import Pipeline
from .verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 equal or done, 1 different, 2 for a user error."""
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
    _add_checkpoint(commands)
    args = parser.parse_args(argv)
    try:
        return _verify(args) if args.command == "verify" else _checkpoint(args)
    except Nemo2Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # what reads the output has had enough: show ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if args.command == "verify":
            raise  # from the user's own code
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _verify(args: argparse.Namespace) -> int:
    sys.path.insert(0, "")
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
    print(report)
    return 0 if report.ok else 1


def _add_checkpoint(commands: Any) -> None:
    about = commands.add_parser("checkpoint", help="look into checkpoints, and convert them")
    doing = about.add_subparsers(dest="doing", required=True)
    show = doing.add_parser("show", help="names, shapes, sizes; whether its files are whole")
    show.add_argument("path", type=Path)
    show.add_argument("--check", action="store_true", help="read all files for their checksums")
    diff = doing.add_parser("diff", help="what differs; exit status 1 if something does")
    diff.add_argument("path", type=Path)
    diff.add_argument("other", type=Path)
    convert = doing.add_parser("convert", help="the weights as safetensors")
    convert.add_argument("path", type=Path)
    convert.add_argument("out", type=Path)
    convert.add_argument(
        "--format",
        default="safetensors",
        choices=("safetensors", "file", "lightning"),
        help="a Hugging Face folder, one file, or Lightning's own .ckpt (pickled)",
    )
    convert.add_argument("--part", default="", help="a module of the model: only its weights")


def _checkpoint(args: argparse.Namespace) -> int:
    from .checkpoint import tools

    if args.doing == "show":
        status, said = 0, tools.show(args.path, check=args.check)
    elif args.doing == "convert":
        status, said = 0, tools.convert(args.path, args.out, args.format, args.part)
    else:
        found = tools.diff(args.path, args.other)
        status, said = int(bool(found)), found or "equal"
    print(said, flush=True)
    return status


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

"""Activation checkpointing of blocks: parity, what is kept, what is communicated again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import nemo2
from nemo2 import Pipeline, shard
from nemo2.communication import collectives
from tests.models import GPT, ZOO, next_token, token_ids
from tests.test_communication import Watch

KINDS = ("full", "selective")
INTERLEAVED = Pipeline(4, "interleaved", 2)


def verified(cells, device):
    """Verify (model, mesh, options); return the texts of those that differ."""
    bad = []
    for model, mesh, options in cells:
        case = ZOO[model]
        if options.get("pipeline") == INTERLEAVED:
            case = case.with_layers(5)
        ids = token_ids(8, 9 if case.loss is next_token else 9)
        report = nemo2.verify(
            case, ids, case.loss, mesh, device=device, rules=case.rules, **options
        )
        if not report.ok:
            bad.append(f"{model} {mesh} {options}\n{report}")
    return bad


TWO = [
    ("example gpt", {"tp": 2}, {}),
    ("llama", {"tp": 2}, {"pipeline": Pipeline(2)}),
    ("gpt tied", {"tp": 2}, {"sequence_parallel": False}),
    ("gpt2", {"tp": 2}, {}),
    ("gpt tied", {"pp": 2}, {"pipeline": Pipeline(4)}),
    ("example gpt", {"pp": 2}, {"pipeline": INTERLEAVED}),
    ("llama", {"dp": 2}, {"data_parallel": "fsdp", "pipeline": Pipeline(2)}),
    ("gpt tied", {"dp": 2}, {"data_parallel": nemo2.DataParallel("fsdp", reshard=True)}),
    ("gpt tied", {"dp": 2}, {"data_parallel": "ddp", "pipeline": Pipeline(2)}),
    ("example gpt", {"dp": 2}, {"data_parallel": "zero1", "pipeline": Pipeline(2)}),
    ("example gpt", {"cp": 2}, {"context_parallel": "ring"}),
    ("example gpt", {"cp": 2}, {"context_parallel": "ulysses"}),
    ("example gpt", {"cp": 2}, {"context_parallel": "all_gather"}),
]

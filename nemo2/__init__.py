"""nemo2: write a model for one device, annotate what is sharded, run it on any mesh."""

from __future__ import annotations

from typing import Any

from .errors import CheckpointError, MeshError, Nemo2Error, PipelineError, ShardingError
from .explain import explain
from .functional import global_norm, grad, value_and_grad
from .mesh import make_mesh
from .model import ParallelModel
from .options import ContextParallel, DataParallel, Pipeline
from .parallelize import parallelize
from .plan import Plan, plan
from .sharding.annotate import annotate, shard
from .verify import Report, verify

__all__ = [
    "CheckpointError",
    "ContextParallel",
    "DataParallel",
    "MegatronStrategy",
    "MeshError",
    "Nemo2Error",
    "ParallelModel",
    "Pipeline",
    "PipelineError",
    "Plan",
    "Report",
    "ShardingError",
    "annotate",
    "explain",
    "global_norm",
    "grad",
    "make_mesh",
    "parallelize",
    "plan",
    "shard",
    "value_and_grad",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "MegatronStrategy":  # lightning is imported where it is used
        from .lightning import MegatronStrategy

        return MegatronStrategy
    raise AttributeError(f"module 'nemo2' has no attribute {name!r}")

"""nemo2: write a model for one device, annotate what is sharded, run it on any mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, MeshError, Nemo2Error, PipelineError, ShardingError
from .explain import explain
from .functional import global_norm, grad, value_and_grad
from .generate import generate
from .inside import is_first_stage, is_last_stage
from .mesh import make_mesh
from .options import Compile, ContextParallel, DataParallel, Pipeline
from .parallelize import parallelize
from .plan import Plan, plan
from .sharding.annotate import annotate, shard
from .verify import Report, verify
from .weights import load, save

if TYPE_CHECKING:
    from .lightning import MegatronStrategy
    from .model import ParallelModel

__all__ = [
    "CheckpointError",
    "Compile",
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
    "generate",
    "global_norm",
    "grad",
    "is_first_stage",
    "is_last_stage",
    "load",
    "make_mesh",
    "parallelize",
    "plan",
    "save",
    "shard",
    "value_and_grad",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Lightning and DTensor are imported where they are used: they take a second.
    if name == "MegatronStrategy":
        from .lightning import MegatronStrategy

        return MegatronStrategy
    if name == "ParallelModel":
        from .model import ParallelModel

        return ParallelModel
    raise AttributeError(f"module 'nemo2' has no attribute {name!r}")

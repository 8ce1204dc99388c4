"""The Lightning door: ``MegatronStrategy`` and its like. Only this folder imports lightning."""

from __future__ import annotations

from .norms import grad_norm
from .strategy import MegatronStrategy
from .throughput import Throughput

__all__ = ["MegatronStrategy", "Throughput", "grad_norm"]

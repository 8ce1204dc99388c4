"""The Lightning door: ``MegatronStrategy``, ``Throughput``. Only this folder imports lightning."""

from __future__ import annotations

from .strategy import MegatronStrategy
from .throughput import Throughput

__all__ = ["MegatronStrategy", "Throughput"]

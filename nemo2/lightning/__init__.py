"""The Lightning door: ``MegatronStrategy``. Only this folder imports lightning."""

from __future__ import annotations

from .strategy import MegatronStrategy

__all__ = ["MegatronStrategy"]

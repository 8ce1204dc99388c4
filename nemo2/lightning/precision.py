"""What the Trainer's ``precision`` means under ``MegatronStrategy``."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)

from ..errors import Nemo2Error


class Bf16Masters(Precision):
    """``Trainer(precision="bf16-mixed")``: ``parallelize(precision="bf16")``, without autocast.

    The module computes in bfloat16 from end to end; parameters, gradients and optimizer state
    are float32.
    """

    precision: Literal["bf16-mixed"] = "bf16-mixed"


def supported(plugin: Precision) -> Precision:
    """Return the plugin that does what the Trainer's ``plugin`` asks for.

    Raises: Nemo2Error for precisions that are not built.
    """
    if type(plugin) is MixedPrecision and plugin.precision == "bf16-mixed":
        return Bf16Masters()
    half = type(plugin) is HalfPrecision and plugin.precision == "bf16-true"
    if half or type(plugin) in (Precision, DoublePrecision, Bf16Masters):
        return plugin
    raise Nemo2Error(
        f"precision {plugin.precision!r} ({type(plugin).__name__}) is not built yet\n"
        "  options: Trainer(precision='32-true' | '64-true' | 'bf16-true' | 'bf16-mixed')"
    )

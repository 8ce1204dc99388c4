"""The same training from YAML: ``train_gpt.py fit --config examples/mesh.yaml``.

``train_gpt.py fit --config examples/mesh.yaml --print_config`` shows every option with its help,
those of the mesh, the pipeline and data parallelism under ``trainer.strategy``.
"""

from __future__ import annotations

import sys

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lit_gpt import LitGPT, TextData

WITH_HELP = {"--print_config": "--print_config=comments"}


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.cfg.length", "data.length")
        parser.link_arguments("model.steps", "data.steps")


def main(arguments: list[str] | None = None) -> CLI:
    sys.argv = [WITH_HELP.get(a, a) for a in sys.argv]
    strategy = {"class_path": "nemo2.MegatronStrategy"}
    return CLI(
        LitGPT,
        TextData,
        args=arguments,
        seed_everything_default=0,
        trainer_defaults={"strategy": strategy, "max_epochs": 1, "gradient_clip_val": 1.0},
    )

"""`vg train`: train a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vg.cli.arguments import add_config

if TYPE_CHECKING:
    from vg.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in train.output")
    group.add_argument("--overwrite", action="store_true", help="replace an existing run in train.output")


def run(options: argparse.Namespace) -> None:
    from vg.config import load_config

    train(load_config(options.config, options.overrides), options.resume, options.overwrite)


def train(config: RunConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Train to the end, and plot the curves even if training is interrupted."""
    from vg.distributed import ignore_stop_signals
    from vg.inference.curves import curves
    from vg.training.trainer import Trainer

    trainer = Trainer(config, resume, overwrite)
    try:
        trainer.fit()
    except SystemExit:  # stopped and saved; a further signal would only replace the message
        ignore_stop_signals()
        raise
    finally:
        rows = trainer.folder.rows()
        if trainer.accelerator.is_main_process and rows:
            curves(rows, trainer.folder.path / "curves.png")

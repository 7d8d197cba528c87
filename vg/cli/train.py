"""`vg train`: train a model."""

from __future__ import annotations

import argparse

from vg.cli.arguments import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in train.output")
    group.add_argument("--overwrite", action="store_true", help="replace an existing run in train.output")


def run(options: argparse.Namespace) -> None:
    from vg.config import load_config
    from vg.training.trainer import Trainer

    trainer = Trainer(load_config(options.config, options.overrides), options.resume, options.overwrite)
    trainer.fit()
    trainer.report.print_next_command()

"""`vg train`: train a model."""

from __future__ import annotations

import argparse

from vg.cli.arguments import add_config, add_existing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_existing(parser)


def run(options: argparse.Namespace) -> None:
    from vg.config import load_config
    from vg.training.trainer import Trainer

    trainer = Trainer(load_config(options.config, options.overrides), options.resume, options.overwrite)
    trainer.fit()
    trainer.report.print_next_command()

"""`vg demo`: train, evaluate and draw on synthetic scenes."""

from __future__ import annotations

import argparse
from pathlib import Path

from vg.cli.arguments import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser)
    parser.add_argument("--config", help="YAML file (default: the rec family, configs/demo_rec.yaml)")


def run(options: argparse.Namespace) -> None:
    """Train, then evaluate: synthetic scenes on their test split, other data as configured in `data.eval`."""
    from vg.cli.evaluate import evaluate
    from vg.cli.train import train
    from vg.config import load_config
    from vg.data.synthetic.shapes import ShapesConfig

    package = Path(__file__).parents[1]
    in_wheel = package / "configs"  # in a checkout, the folder is beside the package
    folder = in_wheel if in_wheel.exists() else package.parent / "configs"
    config = load_config(options.config or folder / "demo_rec.yaml", options.overrides)
    train(config, overwrite=True)
    overrides = ["data.eval.split=test"] if isinstance(config.data.eval, ShapesConfig) else []
    evaluate(Path(config.train.output), overrides, Path(config.train.output))

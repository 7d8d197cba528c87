"""`vg cache`: run frozen encoders once and write their features."""

from __future__ import annotations

import argparse

from vg.cli.arguments import add_config as add_arguments

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> None:
    from vg.cache.build import build_cache
    from vg.config import load_config

    build_cache(load_config(options.config, options.overrides))

"""`vg cache`: encode the data of a run once with the frozen encoders of its model."""

from __future__ import annotations

import argparse

from vg.cli.arguments import Verbs, add_overrides


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser("cache", help="run frozen encoders once and write their features to data.cache.folder")
    parser.add_argument("config", help="YAML file of the run, such as configs/rec/refcoco_cached.yaml")
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from vg.cache.build import build_cache
    from vg.config import load_config

    build_cache(load_config(options.config, options.overrides))

"""`vg config`: print a configuration as it is resolved from bases, defaults and overrides."""

from __future__ import annotations

import argparse

from vg.cli.arguments import Verbs, add_overrides


def add_parser(verbs: Verbs) -> None:
    parser = verbs.add_parser("config", help="print a configuration with its bases, all defaults and overrides")
    parser.add_argument("config", help="YAML file")
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from vg.config import dump_config, load_config

    print(dump_config(load_config(options.config, options.overrides)), end="")

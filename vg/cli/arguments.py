"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
from typing import Any


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the configuration of a run and its overrides."""
    parser.add_argument("config", help="YAML file of the run, such as configs/demo_rec.yaml")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add KEY=VALUE pairs that override values of the configuration."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optim.lr=1e-4 model.head=dense")


def add_tokenizer(parser: Any) -> None:
    """Add the tokenizer for a checkpoint that does not contain one."""
    parser.add_argument(
        "--tokenizer", help="folder or Hub id of BERT, because a .pth contains no tokenizer (default: its Hub id)"
    )

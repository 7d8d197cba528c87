"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
from typing import Any

Verbs = Any  # argparse has no public name for what `add_subparsers` returns


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add KEY=VALUE pairs that override values of the configuration."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optim.lr=1e-4 model.head=dense")


def add_tokenizer(parser: Any) -> None:
    """Add the tokenizer for a checkpoint that does not contain one."""
    parser.add_argument(
        "--tokenizer", help="folder or Hub id of BERT, because a .pth contains no tokenizer (default: its Hub id)"
    )

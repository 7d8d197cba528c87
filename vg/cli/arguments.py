"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
from typing import Any

Verbs = Any  # argparse has no public name for what `add_subparsers` returns


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """KEY=VALUE pairs that replace values of the configuration."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optim.lr=1e-4 model.head=dense")


def add_tokenizer(parser: Any) -> None:
    """The tokenizer of a checkpoint that contains none."""
    parser.add_argument(
        "--tokenizer", help="folder or Hub id of BERT, because a .pth contains no tokenizer (default: its Hub id)"
    )

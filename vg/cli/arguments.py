"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vg.config import RunConfig


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the configuration of a run and its overrides."""
    parser.add_argument("config", help="YAML file of the run, such as configs/demo_rec.yaml")
    add_overrides(parser)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the datasets that `read_data` reads."""
    known = "COCO, ODVG, Pascal VOC, YOLO, CSV or shards"
    parser.add_argument("data", help=f"YAML file of a run; or a folder or file in {known}")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add KEY=VALUE pairs that override values of the configuration."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optim.lr=1e-4 model.head=dense")


def add_tokenizer(parser: Any) -> None:
    """Add the tokenizer for a checkpoint that does not contain one."""
    parser.add_argument(
        "--tokenizer", help="folder or Hub id of BERT, because a .pth contains no tokenizer (default: its Hub id)"
    )


def read_data(path: str, overrides: Sequence[str]) -> tuple[RunConfig, bool]:
    """Return the configuration in a YAML file, or one for the datasets found at a path.

    Returns:
        The configuration, and whether the path is a single dataset, which is then both for training and evaluation.
    """
    from vg.config import load_config
    from vg.data.check import detect_format

    found = detect_format(Path(path))
    return (_config_of(found, overrides) if found else load_config(path, overrides)), len(found) == 1


def _config_of(found: Mapping[str, dict[str, Any]], overrides: Sequence[str]) -> RunConfig:
    """A run on the datasets found at a path; each override is a setting of all of them."""
    from yaml import YAMLError

    from vg.config import parse_config
    from vg.errors import ConfigError
    from vg.settings import parse_yaml

    try:
        changes = {key: parse_yaml(text) for key, _, text in (override.partition("=") for override in overrides)}
    except YAMLError as error:
        raise ConfigError(f"{' '.join(overrides)}: a value is not valid YAML ({error})") from error
    datasets = {split: settings | changes for split, settings in found.items()}
    train, *evaluation = datasets
    evaluated = {split: datasets[split] for split in evaluation or [train]}
    return parse_config({"model": {"name": "grounding_dino"}, "data": {"train": datasets[train], "eval": evaluated}})

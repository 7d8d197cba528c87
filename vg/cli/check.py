"""`vg check`: validate a dataset and suggest fixes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vg.cli.arguments import add_overrides

if TYPE_CHECKING:
    from vg.config import RunConfig
    from vg.models.settings import ModelSettings

NUM_DRAWN = 24  # images in images.png


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="YAML file of a run; or a folder or file in COCO, ODVG, Pascal VOC, YOLO or CSV")
    add_overrides(parser)
    parser.add_argument("--quick", type=int, metavar="N", help="read N images of each dataset (default: all)")
    parser.add_argument("--output", default="runs/check", help="folder for report and images (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Exit with status 1 if there are errors."""
    from vg.config import load_config
    from vg.data.check import detect_format, diagnose, to_json, to_text
    from vg.errors import ConfigError
    from vg.files import write_json
    from vg.inference.grids import image_grid

    if options.quick is not None and options.quick < 1:
        raise ConfigError(f"--quick {options.quick}: read at least one image of each dataset")
    found = detect_format(Path(options.data))
    config = _config_of(found, options.overrides) if found else load_config(options.data, options.overrides)
    datasets = {"train": config.data.train}
    if len(found) != 1:
        datasets |= {f"eval.{name}" if name else "eval": data for name, data in config.data.eval_datasets().items()}
    count_tokens = _token_counter(config.model)
    diagnosis = diagnose(datasets, config.model.max_tokens, count_tokens, options.quick)
    output = Path(options.output)
    write_json(output / "report.json", to_json(diagnosis))
    print(to_text(diagnosis))
    if count_tokens is None:
        print("tokenizer not cached locally; prompt lengths are lower bounds")
    if images := diagnosis.images(NUM_DRAWN):
        image_grid(images, 6, output / "images.png")
    print(f"written to {output}: report.json" + (", images.png" if images else ""))
    if diagnosis.count("error"):
        sys.exit(1)


def _token_counter(model: ModelSettings) -> Callable[[list[str]], list[int]] | None:
    """Count the tokens of phrases by the text encoder that needs most; None if a tokenizer is not on this machine."""
    from vg.models.encoders import cached_token_counter

    texts = [text for text in (model.text, getattr(model, "extra_text", None)) if text]
    counters = [counter for counter in map(cached_token_counter, texts) if counter]
    if len(counters) < len(texts):
        return None
    return lambda phrases: [max(counts) for counts in zip(*(count(phrases) for count in counters), strict=True)]


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

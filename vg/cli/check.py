"""`vg check`: validate a dataset and suggest fixes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vg.cli.arguments import add_data, add_data_overrides, check_writable, read_data

if TYPE_CHECKING:
    from vg.models.settings import ModelSettings

NUM_DRAWN = 24  # images in images.png


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    add_data_overrides(parser)
    parser.add_argument("--quick", type=int, metavar="N", help="read N images of each dataset (default: all)")
    parser.add_argument("--output", default="runs/check", help="folder for report and images (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Exit with status 1 if there are errors."""
    from vg.data.check import diagnose, to_json, to_text
    from vg.data.stream import StreamConfig
    from vg.errors import ConfigError
    from vg.files import write_json
    from vg.inference.grids import image_grid

    if options.quick is not None and options.quick < 1:
        raise ConfigError(f"--quick {options.quick}: read at least one image of each dataset")
    output = Path(options.output)
    check_writable(output / "report.json")
    config, is_one_dataset = read_data(options.data, options.overrides)
    datasets = {"train": config.data.train} if is_one_dataset else config.data.datasets()
    for name in [name for name, dataset in datasets.items() if isinstance(dataset, StreamConfig)]:
        print(f"{name}: {datasets.pop(name)} is a stream, which is not checked")
    count_tokens = _token_counter(config.model)
    diagnosis = diagnose(datasets, config.model.max_tokens, count_tokens, options.quick)
    print(to_text(diagnosis), flush=True)
    write_json(output / "report.json", to_json(diagnosis))
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

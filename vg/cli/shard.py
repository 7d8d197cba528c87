"""`vg shard`: write a dataset as shards, WebDataset tar or parquet, which `{name: shards}` reads."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from vg.cli.arguments import add_data, add_data_overrides, read_data

EPILOG = """
All classes are written, and no negatives are sampled: vocabulary.only and vocabulary.negatives are settings of the
reader, {name: shards, path: OUT, vocabulary: {...}}. Captions of ODVG are lost unless the dataset has captions: whole.
After an interruption, the same command continues; finished shards are kept.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_data(parser)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write, new or of an interrupted run")
    add_data_overrides(parser)
    parser.add_argument("--split", default="train", help="train, eval, or eval.NAME of several (default: train)")
    parser.add_argument(
        "--format", choices=["tar", "parquet"], default="tar", help="format of the shards (default: tar)"
    )
    number = "samples of each shard (default: 1000)"
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help=number)
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes; 0 writes in the main one (default: number of cores)"
    )
    parser.add_argument(
        "--bad-samples", choices=["error", "skip"], default="error", help="what to do with unusable samples"
    )


def run(options: argparse.Namespace) -> None:
    from vg.data.shards.write import write_shards
    from vg.errors import ConfigError

    workers = options.workers if options.workers is not None else os.cpu_count() or 1
    if workers < 0:
        raise ConfigError(f"--workers {workers}: use 0 or more processes")
    dataset = _dataset(options)
    index = write_shards(
        dataset, options.output, options.format, options.samples_per_shard, workers, options.bad_samples
    )
    skipped = f", {index.skipped} bad samples left out" if index.skipped else ""
    print(f"{options.output}: {len(index)} samples of {index.provenance} in {len(index.shards)} shards{skipped}")
    part = getattr(dataset, "dataset", dataset)  # of a split
    if getattr(part, "captions", "") == "phrases" and index.classes is None:
        print("captions are left out, only the phrases of their regions are written; captions=whole keeps them")
    print(f"data.train={{name: shards, path: {options.output}}}")


def _dataset(options: argparse.Namespace) -> Any:
    """Return the settings of the dataset to write."""
    from vg.data.mixture import MixtureConfig
    from vg.errors import ConfigError

    datasets = read_data(options.data, options.overrides)[0].data.datasets()
    if options.split not in datasets:
        raise ConfigError(f"--split {options.split}: choose one of {', '.join(datasets)}")
    dataset = datasets[options.split]
    if isinstance(dataset, MixtureConfig):
        raise ConfigError(
            f"data.{options.split} is a mixture; write each of its datasets to a folder of its own, such as "
            f"'data.{options.split}={{name: coco, path: ...}}', and mix the shards"
        )
    return dataset

"""`vg convert`: rewrite a Grounding DINO checkpoint for another implementation."""

from __future__ import annotations

import argparse
from pathlib import Path

from vg.cli.arguments import add_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="IN",
        help=".pth, folder of transformers or vg, or Hub id; the format is detected automatically",
    )
    parser.add_argument(
        "output", type=Path, metavar="OUT", help=".pth (official, mmdet) or folder (transformers, vg) to write"
    )
    parser.add_argument("--to", required=True, choices=["official", "transformers", "mmdet", "vg"], help="format")
    add_tokenizer(parser)


def run(options: argparse.Namespace) -> None:
    from vg.checkpoint import new_checkpoint, read_classes, write_weights
    from vg.config import ModelOnlyConfig
    from vg.errors import CheckpointError, printable
    from vg.models.grounding_dino.checkpoints import (
        bert_settings,
        not_stored,
        open_tokenizer,
        read_checkpoint,
        write_checkpoint,
    )
    from vg.models.saved import best_of, local_path
    from vg.types import TextSpec

    if options.output.exists():
        raise CheckpointError(f"{options.output} exists; choose another path, or remove it first")
    path = local_path(options.checkpoint)
    checkpoint, classes = read_checkpoint(path, bert_settings(options.tokenizer)), read_classes(best_of(path))
    print(f"{options.checkpoint}: {checkpoint}")
    is_file = options.to in ("official", "mmdet")
    tokenizer = None if is_file else open_tokenizer(checkpoint, options.tokenizer)
    with new_checkpoint(options.output, is_file) as partial:
        if options.to == "vg":
            spec = TextSpec(tokenizer, checkpoint.config.max_tokens)
            write_weights(partial, checkpoint.weights, ModelOnlyConfig(checkpoint.config), spec, classes)
        else:
            write_checkpoint(checkpoint.weights, checkpoint.config, tokenizer, partial, options.to)
    print(f"{options.output}: written in the {options.to} format")
    if lost := not_stored(checkpoint.config, options.to):
        print(f"lost in the {options.to} format: {', '.join(lost)}: set these where the file is used")
    if classes and options.to != "vg":
        print(f"not in the {options.to} format: the classes, {', '.join(map(printable, classes))}")

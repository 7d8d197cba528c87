"""`vg label`: pseudo-labels for any number of images, by any number of processes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vg.cli.arguments import MODEL_HELP, WordsAction, add_model_overrides, add_prediction, add_runtime, check_prediction
from vg.errors import ConfigError, printable

if TYPE_CHECKING:
    from vg.labeling.worker import Counts, LabelSettings

NUM_SHOWN = 20  # phrases in the summary
EPILOG = """
DATA is a folder of images, a pattern such as 'photos/*.jpg', a table (.jsonl, .csv, .parquet) whose column image names
them, or what vg shard has written, as a folder or a URL. OUT gets a file of ODVG lines per shard, written as a whole or
not at all: a repeated command labels what is missing, also with another number of workers. Several workers: torchrun
--nproc_per_node 8 -m vg label ..., an array job with --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT, or --engine
ray. Labels do not depend on workers or interruptions, on one type of processor and with one number of threads each.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", metavar="MODEL", help=f"{MODEL_HELP}, or .onnx file of vg export")
    parser.add_argument("data", metavar="DATA", help="images to label")
    parser.add_argument("output", metavar="OUT", help="folder of the labels")
    add_model_overrides(parser)
    about = "by default the classes on which the model was trained"
    phrases = parser.add_argument_group("phrases", about).add_mutually_exclusive_group()
    phrases.add_argument(
        "-p", "--phrases", nargs="+", action=WordsAction, metavar="PHRASE", help="such as dog 'red car'"
    )
    phrases.add_argument(
        "--phrases-file",
        type=Path,
        metavar="FILE",
        help='a phrase per line, or JSON with thresholds: {"dog": 0.4, "cat": null}',
    )
    phrases.add_argument(
        "--captions",
        metavar="KEY",
        help="column of the table, or key in the lines of shards: search for the noun phrases of each caption",
    )
    add = parser.add_argument
    add("--pipeline", default="en_core_web_sm", help="pipeline of spaCy, for --captions (default: %(default)s)")
    add_prediction(parser)
    add("--exclusive", action="store_true", help="an object has one phrase: --nms compares boxes of all phrases")
    add("--image-root", metavar="FOLDER", help="folder of the images of a table (default: that of the table)")
    add("--format", choices=["odvg", "coco", "parquet"], default="odvg", help="format of the labels (default: odvg)")
    unreadable = "what to do with unreadable images (default: error)"
    add("--bad-images", choices=["error", "skip"], default="error", help=unreadable)
    add("--shard-size", type=int, default=1000, metavar="N", help="images in a shard (default: %(default)s)")
    add("--shard", metavar="I/N", help="label every N-th shard, from the I-th on; I counts from 0")
    add("--engine", choices=["ray"], help="run the workers on a cluster of Ray, or on this machine")
    add("--workers", type=int, metavar="N", help="number of Ray workers (default: one per GPU)")
    add_runtime(parser, "the fastest available; under torchrun, one GPU each")


def run(options: argparse.Namespace) -> None:
    from vg.inference.arguments import check_count
    from vg.labeling.phrases import read_phrases
    from vg.labeling.run import label, label_on_ray, worker_of
    from vg.labeling.worker import LabelSettings

    check_prediction(options)
    if options.exclusive and options.nms is None:
        raise ConfigError("--exclusive is about --nms: give the largest overlap of two objects too, such as --nms 0.7")
    if options.workers is not None:
        check_count(options.workers, "--workers")
    if options.workers and options.engine != "ray":
        raise ConfigError("--workers is for --engine ray; other workers are processes of torchrun or of an array job")
    if options.engine == "ray" and options.shard:
        raise ConfigError("--shard is for array jobs; --engine ray has workers of its own")
    options.overrides = tuple(options.overrides)
    phrases = read_phrases(options.phrases_file) if options.phrases_file else options.phrases
    options.phrases = phrases if isinstance(phrases, dict) else phrases and dict.fromkeys(phrases)
    settings = LabelSettings(**{name: getattr(options, name) for name in LabelSettings.__dataclass_fields__})
    if options.engine == "ray":
        counts, data = label_on_ray(settings, options.workers)
    else:
        counts, data = label(settings, *worker_of(options.shard))
    _print(counts, data, settings)


def _print(counts: Counts, data: dict[str, str] | None, settings: LabelSettings) -> None:
    """Print what was labeled and, once all shards are there, how to train with `data`."""
    skipped = f", {counts.skipped:,} images skipped (see *.skipped.json)" if counts.skipped else ""
    print(f"{counts.images:,} images, {counts.boxes:,} boxes{skipped}")
    print(f"{counts.total:.1f} s, {counts.forward:.1f} s of them in forward passes")
    for phrase, number in counts.phrases.most_common(NUM_SHOWN):
        print(f"  {number:,} {printable(phrase)}")
    if len(counts.phrases) > NUM_SHOWN:
        print(f"  and {len(counts.phrases) - NUM_SHOWN:,} more phrases")
    if data is None:
        print(f"{settings.output} is not complete: other workers are at work, or the command must be repeated")
    elif settings.format != "parquet":
        values = ", ".join(f"{key}: {value}" for key, value in data.items())
        print(f"{settings.output} is complete; to train with it: {shlex.quote(f'data.train={{{values}}}')}")

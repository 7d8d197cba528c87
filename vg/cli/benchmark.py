"""`vg eval --suite`: evaluate any checkpoint on a benchmark, beside published results."""

from __future__ import annotations

import argparse
import logging
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from vg import __version__
from vg.errors import ConfigError

if TYPE_CHECKING:
    from vg.config import SavedConfig

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "evaluate on a benchmark instead of the data of a run"
    suite = parser.add_argument_group("suites", about)
    suite.add_argument("--suite", choices=["refcoco"], help="writes benchmark.json and benchmark.html to --output")
    suite.add_argument("--data", type=Path, help="folder with the datasets (default: download from the Hub)")
    suite.add_argument("--images", type=Path, help="folder of COCO train2014 images, for annotations without pixels")
    suite.add_argument(
        "--datasets", type=_names, help="such as refcoco,refcoco+,refcocog,grefcoco (default: the first three)"
    )
    suite.add_argument("--splits", type=_names, help="such as val,testA (default: all)")
    suite.add_argument("--limit", type=int, help="evaluate at most this many expressions of each split")
    suite.add_argument("--batch-size", type=int, help="expressions per batch (default: 32)")
    suite.add_argument("--workers", type=int, help="processes that read images (default: 2)")
    suite.add_argument(
        "--bad-samples", choices=["error", "skip"], help="skip: leave unusable samples out and count them"
    )
    suite.add_argument("--precision", choices=["no", "bf16", "fp16"], help="mixed precision (default: that of the run)")


def _names(text: str) -> list[str]:
    return text.split(",")


def run(options: argparse.Namespace, output: Path) -> None:
    """Evaluate a checkpoint, write benchmark.json and benchmark.html to `output`, and print the tables.

    Raises:
        ConfigError: an option is out of range, or only for detection datasets.
        ConfigError, DataError, CheckpointError: see `open_model` and `open_splits`; the model is opened first.
    """
    import yaml

    from vg.config import RunConfig, dump_config
    from vg.distributed import new_accelerator, raise_on_all_processes
    from vg.evaluation.benchmark.report import report
    from vg.evaluation.benchmark.run import run as run_benchmark
    from vg.evaluation.benchmark.run import use_rec_protocol
    from vg.evaluation.benchmark.suite import open_splits
    from vg.evaluation.benchmark.table import text
    from vg.files import write_bytes, write_json
    from vg.inference.arguments import check_count
    from vg.inference.load import open_model

    if options.detections:
        raise ConfigError("--detections is for detection datasets, and this benchmark has none; remove it")
    batch_size = 32 if options.batch_size is None else options.batch_size
    workers = 2 if options.workers is None else options.workers
    check_count(batch_size, "--batch-size")
    check_count(workers, "--workers", 0)
    loaded = open_model(options.checkpoint, options.tokenizer, options.overrides)
    model, config = loaded.model, loaded.training
    use_rec_protocol(model, config, options.overrides)
    splits = open_splits(options.data, options.images, options.datasets or (), options.splits or (), options.limit)
    own_precision = config.train.precision if isinstance(config, RunConfig) else "no"
    accelerator = new_accelerator(mixed_precision=options.precision or own_precision)
    with raise_on_all_processes():
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)  # raises OSError before hours of evaluation
    results, evaluated = run_benchmark(model, splits, accelerator, batch_size, workers, options.bad_samples or "error")
    software = {"vg": __version__} | {name: version(name) for name in ("torch", "transformers")}
    about = {
        "checkpoint": options.checkpoint,
        "overrides": options.overrides,
        "software": software,
        "precision": accelerator.mixed_precision,
        "config": yaml.safe_load(dump_config(config)),
        "trained_parameters": trained_parameters(config),
        "interpolation": interpolation(Path(options.checkpoint)),
    }
    results = about | results
    if accelerator.is_main_process:
        print(text(results))  # first: they are there if the files cannot be written
        write_json(output / "benchmark.json", results)
        write_bytes(output / "benchmark.html", report(results, evaluated, model).encode())
        print(f"\nwritten to {output}: benchmark.json, benchmark.html")


def trained_parameters(config: SavedConfig) -> int | None:
    """Count the parameters that a run trained, adapters of LoRA before they were merged; None if that is unknown."""
    from vg.config import RunConfig
    from vg.training.optim import count_parameters

    if not isinstance(config, RunConfig):
        return None
    try:
        return count_parameters(config)[1]
    except ConfigError as error:
        logger.warning("the number of trained parameters stays unknown: %s", error)
        return None


def interpolation(checkpoint: Path) -> float | None:
    """Return the weight of the fine-tuned weights if `vg interpolate` or `train.interpolate` wrote a checkpoint."""
    from vg.files import read_json
    from vg.training.interpolation import INTERPOLATION

    file = checkpoint / INTERPOLATION
    return read_json(file, dict)["best"] if file.exists() else None


def selection(options: argparse.Namespace) -> list[str]:
    """Return what differs from the whole suite with the settings of a run, such as ["suite=refcoco", "splits=val"]."""
    given = {name: getattr(options, name) for name in ("datasets", "splits", "limit", "precision")}
    chosen = [f"{name}={','.join(x) if isinstance(x, list) else x}" for name, x in given.items() if x is not None]
    chosen += options.overrides
    return [f"suite={options.suite}", *chosen] if chosen else []


def refuse_options(options: argparse.Namespace) -> None:
    """Raise ConfigError for an option that only benchmarks have."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name, default in vars(parser.parse_args([])).items():
        if getattr(options, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} belongs to a benchmark: add --suite refcoco")

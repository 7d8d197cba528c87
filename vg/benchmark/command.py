"""What `vg eval --suite` does."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

from vg import __version__
from vg.benchmark.models import open_model
from vg.benchmark.report import report
from vg.benchmark.run import run
from vg.benchmark.suite import open_parts
from vg.benchmark.table import text
from vg.checkpoint import write_json
from vg.distributed import new_accelerator
from vg.types import ConfigError

OPTIONS = ("data", "images", "sets", "splits", "limit", "batch_size", "workers", "precision", "tokenizer")


def benchmark(options: argparse.Namespace) -> None:
    """Judge a checkpoint; writes benchmark.json and benchmark.html and prints the tables.

    Raises:
        ConfigError, DataError, CheckpointError: see `open_parts` and `open_model`; the data is looked for first.
    """
    if options.detections:
        raise ConfigError("--detections writes boxes of detection sets, and this benchmark has none; leave it out")
    data, images = (None if place is None else Path(place) for place in (options.data, options.images))
    sets, splits = ([] if names is None else names.split(",") for names in (options.sets, options.splits))
    parts = open_parts(data, images, sets, splits, options.limit)
    model = open_model(options.checkpoint, options.overrides, options.tokenizer)
    accelerator = new_accelerator(mixed_precision=options.precision or "no")
    workers = 2 if options.workers is None else options.workers
    results, judged = run(model, parts, accelerator, options.batch_size or 32, workers)
    software = {name: version(name) for name in ("torch", "transformers")}
    results = {"checkpoint": options.checkpoint, "software": {"vg": __version__, **software}, **results}
    if accelerator.is_main_process:
        place = Path(options.checkpoint)
        output = Path(options.output or (place if place.is_dir() else Path("runs", place.stem)))
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "benchmark.json", results)
        (output / "benchmark.html").write_text(report(results, judged, model), encoding="utf-8")
        print(text(results))
        print(f"\nwritten to {output}: benchmark.json, benchmark.html")


def refuse(options: argparse.Namespace) -> None:
    """Raises ConfigError for an option that only benchmarks have."""
    for name in OPTIONS:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} belongs to a benchmark: add --suite refcoco")

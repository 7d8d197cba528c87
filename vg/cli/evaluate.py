"""`vg eval`: evaluate a checkpoint on the data of its run, or on a benchmark suite."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from vg.cli import benchmark
from vg.cli.arguments import MODEL_HELP, add_overrides, add_tokenizer, with_data
from vg.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="MODEL", help=MODEL_HELP)
    about = "settings of the run, such as data.eval.split=test model.vision.id=/new/folder"
    add_overrides(parser, about, ("optim",))
    parser.add_argument(
        "--output",
        help="folder for metrics.json and predictions.png (default: RUN/eval, or RUN/eval/split=testA with such an "
        "override), or for the files of --suite (default: RUN, or RUN/eval/suite=refcoco,splits=val with such options)",
    )
    parser.add_argument("--detections", action="store_true", help="also write the detections as COCO results json")
    add_tokenizer(parser)
    benchmark.add_arguments(parser)


def run(options: argparse.Namespace) -> None:
    from vg.models.saved import CONFIG
    from vg.training.run_folder import EVALUATIONS

    path = Path(options.checkpoint)
    folder = path if path.is_dir() else Path("runs", path.stem)
    if folder != path and (folder / CONFIG).exists() and not options.output:
        raise ConfigError(f"{folder} is a run, so results of {path} need another folder; set --output")
    if options.suite:
        part = benchmark.selection(options)
        benchmark.run(options, Path(options.output or (folder / EVALUATIONS / name_of(part) if part else folder)))
    else:
        benchmark.refuse_options(options)
        output = Path(options.output or folder / EVALUATIONS / name_of(options.overrides))
        evaluate(path, options.overrides, output, options.detections, options.tokenizer)


def name_of(overrides: Sequence[str]) -> str:
    """Return the name of a folder for results with these settings: "split=testA" of data.eval.split=testA."""
    full = ",".join(override.removeprefix("data.eval.") for override in overrides)
    name = re.sub(r"[^\w.,=-]", "_", full)[:80]
    return name if name == full else f"{name}-{sha256(full.encode()).hexdigest()[:8]}"


def evaluate(
    checkpoint: Path, overrides: list[str], output: Path, detections: bool = False, tokenizer: str | None = None
) -> None:
    """Evaluate a checkpoint; write metrics.json, predictions.png and optionally detections.json to `output`."""
    from vg.distributed import new_accelerator, raise_on_all_processes
    from vg.evaluation.evaluator import Evaluator
    from vg.evaluation.table import table
    from vg.files import write_bytes, write_json
    from vg.inference.load import open_model
    from vg.inference.sample_grid import draw_samples

    model, saved, *_ = open_model(checkpoint, tokenizer, overrides)
    config = with_data(saved, checkpoint)
    accelerator = new_accelerator(mixed_precision=config.train.precision)
    evaluator = Evaluator(config.data, model, accelerator)
    with raise_on_all_processes():
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)  # raises OSError before minutes of evaluation
    if detections:
        evaluator.category_ids()  # raises ConfigError before minutes of evaluation
    result = evaluator.run(model.to(accelerator.device))
    rows_of = evaluator.detections() if detections else {}  # dataset name -> rows
    about = {"checkpoint": str(checkpoint), "overrides": " ".join(overrides), "precision": accelerator.mixed_precision}
    if accelerator.is_main_process:
        print(table(result))  # first: it is there if the files cannot be written
        write_json(output / "metrics.json", about | result.flat())
        for name, rows in rows_of.items():
            write_bytes(output / f"detections{name and '_'}{name}.json", json.dumps(rows).encode())
        draw_samples(model, config.data, output / "predictions.png", evaluator.datasets[0].data)
        print(f"written to {output}: metrics.json, predictions.png")

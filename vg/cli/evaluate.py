"""`vg eval`: evaluate a checkpoint on the data of its run, or on a benchmark suite."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vg.cli import benchmark
from vg.cli.arguments import add_overrides

if TYPE_CHECKING:
    from vg.config import RunConfig
    from vg.models.base import GroundingModel

NUM_DRAWN = 24  # samples in predictions.png


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder of a run or checkpoint, or YAML file with model.weights")
    add_overrides(parser)
    parser.add_argument(
        "--output", help="folder for metrics.json and predictions.png (default: that folder, or runs/NAME)"
    )
    parser.add_argument("--detections", action="store_true", help="also write the detections as COCO results json")
    benchmark.add_arguments(parser)


def run(options: argparse.Namespace) -> None:
    path = Path(options.checkpoint)
    output = Path(options.output or (path if path.is_dir() else Path("runs", path.stem)))
    if options.suite:
        benchmark.run(options, output)
    else:
        benchmark.refuse_options(options)
        evaluate(path, options.overrides, output, options.detections)


def evaluate(checkpoint: Path, overrides: list[str], output: Path, detections: bool = False) -> None:
    """Evaluate a checkpoint; write metrics.json, predictions.png and optionally detections.json to `output`."""
    from vg.cli.models import load_with_data
    from vg.distributed import new_accelerator
    from vg.evaluation.evaluator import Evaluator
    from vg.evaluation.table import table
    from vg.files import write_bytes, write_json

    model, config = load_with_data(checkpoint, overrides)
    accelerator = new_accelerator(mixed_precision=config.train.precision)
    evaluator = Evaluator(config.data, model, accelerator)
    result = evaluator.run(model.to(accelerator.device))
    rows_of = evaluator.detections() if detections else {}  # dataset name -> rows
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "metrics.json", {"checkpoint": str(checkpoint), **result.flat()})
        for name, rows in rows_of.items():
            write_bytes(output / f"detections{name and '_'}{name}.json", json.dumps(rows).encode())
        print(table(result))
        _draw(model, config, output / "predictions.png")
        print(f"written to {output}: metrics.json, predictions.png")


def _draw(model: GroundingModel, config: RunConfig, path: Path) -> None:
    """Draw a grid of samples and predictions, evenly spaced over the first evaluation dataset."""
    from vg.data.collate import Collator
    from vg.data.dataset import GroundingDataset
    from vg.inference.draw import prediction_grid
    from vg.inference.grounder import Grounder

    settings = next(iter(config.data.eval_datasets().values()))
    collate = Collator(model.image_spec, model.text_spec)
    data = GroundingDataset(settings.build(), bad_samples=config.data.bad_samples, collate=collate)
    count = min(NUM_DRAWN, len(data))
    # Rounded, so that the spacing is not constant: consecutive samples may cycle through the expression types.
    samples = [data[round(index * (len(data) - 1) / max(1, count - 1))] for index in range(count)]
    predictions = Grounder(model, str(model.device)).predict_samples(samples)
    prediction_grid(list(zip(samples, predictions, strict=True)), 6, path)

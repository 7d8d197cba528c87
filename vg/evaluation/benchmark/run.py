"""Run the benchmark: evaluate every split once, with confidence intervals, slices and speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from vg.config import RunConfig, SavedConfig
from vg.data.collate import Collator
from vg.data.dataset import BadSamples, GroundingDataset
from vg.evaluation.benchmark.slices import slices
from vg.evaluation.benchmark.suite import BenchmarkSplit
from vg.evaluation.benchmark.table import MAIN
from vg.evaluation.evaluator import DatasetEvaluator
from vg.evaluation.results import DatasetResult
from vg.inference.torch_backend import TorchBackend
from vg.metrics.collected import CollectingMetric, stable_hash
from vg.models.base import GroundingModel
from vg.models.grounding_dino.model import GroundingDino

POOLED = ("testA", "testB")
NUM_DRAWS, LEVEL = 1000, 0.95  # of the bootstrap


@dataclass(frozen=True)
class EvaluatedSplit:
    """One split with its result and the contribution of each expression."""

    split: BenchmarkSplit
    metric: CollectingMetric
    result: DatasetResult
    values: dict[str, np.ndarray]  # name -> [samples], NaN where a sample does not count; also `score`
    evaluated: np.ndarray  # [samples] bool, all but the skipped ones
    seconds: float

    @property
    def image_keys(self) -> list[str]:
        return [annotation.image_key for annotation in self.split.annotations]

    @property
    def means(self) -> dict[str, np.ndarray]:
        """The `values` whose mean is a metric."""
        return {name: column for name, column in self.values.items() if name in self.metric.metric_names}

    def slices(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return attribute -> label -> the main metrics of its expressions, their number and intervals."""
        names = [name for name in MAIN if name in self.values]
        keys = np.asarray(self.image_keys)
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for attribute, masks in slices(self.split.annotations).items():
            for label, rows in masks.items():
                values = {name: self.values[name][rows] for name in names}
                known = rows & ~np.isnan(self.values[names[0]])
                if not known.any():
                    continue
                found.setdefault(attribute, {})[label] = {
                    "num_expressions": int(known.sum()),
                    **{name: float(np.nanmean(value)) for name, value in values.items()},
                    "intervals": intervals(values, keys[rows]),
                }
        return found

    def row(self) -> dict[str, Any]:
        """Return the entry of this split in benchmark.json."""
        keys = self.image_keys
        images = {key for key, evaluated in zip(keys, self.evaluated, strict=True) if evaluated}
        return {
            "key": self.split.dataset,
            "title": self.split.dataset_title,
            **self.result.flat(),
            "intervals": intervals(self.means, keys),
            "slices": self.slices(),
            "num_images": len(images),
            "seconds": self.seconds,
            "expressions_per_second": int(self.evaluated.sum()) / self.seconds,
            "images_per_second": len(images) / self.seconds,
        }


def use_rec_protocol(model: GroundingModel, config: SavedConfig, overrides: Sequence[str]) -> None:
    """Score the boxes of a Grounding DINO by the REC protocol, unless its run or an override determines the score."""
    if isinstance(config, RunConfig) or any(item.startswith("model.predict.score=") for item in overrides):
        return
    if isinstance(model, GroundingDino):
        model.config.predict.score = "max"


@torch.no_grad()
def run(
    model: GroundingModel,
    splits: Sequence[BenchmarkSplit],
    accelerator: Accelerator,
    batch_size: int,
    workers: int,
    bad_samples: BadSamples = "error",
) -> tuple[dict[str, Any], list[EvaluatedSplit]]:
    """Evaluate a model on all splits.

    Args:
        bad_samples: see DataConfig; the lengths of all expressions are checked before anything is evaluated.

    Returns:
        results: the content of benchmark.json: `model` and `device`; `parts`, one flat dict per split with its result
            (see vg.evaluation.results.DatasetResult.flat), `intervals` (name -> low, high), `slices` (attribute ->
            label -> metrics), `seconds`, `expressions_per_second` and `images_per_second` (all processes together,
            data loading included); `pooled`, the same metrics of testA and testB together.
        evaluated splits, from which the results were computed.
    """
    model = model.to(accelerator.device).eval()
    collate = Collator(model.image_spec, model.text_spec)
    data = [
        GroundingDataset(split.source, bad_samples=bad_samples, collate=collate, share_images=True) for split in splits
    ]
    with accelerator.autocast():  # compiles kernels and allocates memory before anything is timed
        TorchBackend(model, str(accelerator.device)).predict_samples([samples[0] for samples in data][:1])
    evaluated = [
        _evaluate(model, split, DatasetEvaluator(split.id, samples, batch_size, workers, accelerator))
        for split, samples in zip(splits, data, strict=True)
    ]
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    results = {
        "model": {
            "parameters": model.num_parameters(),
            "trainable_parameters": model.num_parameters(trainable_only=True),
            "answers": _protocol(model),
        },
        "device": f"{accelerator.num_processes} x {device}, {accelerator.mixed_precision} mixed precision, "
        f"batch size {batch_size}",
        "parts": [split.row() for split in evaluated],
        "pooled": _pooled(evaluated),
    }
    return results, evaluated


def _protocol(model: GroundingModel) -> str:
    """Describe how a model processes an expression, as far as results depend on it."""
    if not isinstance(model, GroundingDino):
        return "one expression per forward pass"
    over = {"max": "best", "mean": "mean"}[model.config.predict.score]
    return f"the prompt is the expression alone, a box scores the {over} probability over its tokens"


def _evaluate(model: GroundingModel, split: BenchmarkSplit, evaluator: DatasetEvaluator) -> EvaluatedSplit:
    accelerator = evaluator.accelerator
    accelerator.wait_for_everyone()
    start = time.perf_counter()
    evaluator.predict(model)
    accelerator.wait_for_everyone()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    ids, columns = evaluator.metric.per_sample()  # [U]
    wanted = np.array([stable_hash(annotation.id) for annotation in split.annotations])  # [samples]
    indices = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
    evaluated = ids[indices] == wanted  # [samples]
    values = {name: np.where(evaluated, column[indices], np.nan) for name, column in columns.items()}
    return EvaluatedSplit(split, evaluator.metric, evaluator.result(), values, evaluated, seconds)


def _pooled(evaluated: Sequence[EvaluatedSplit]) -> list[dict[str, Any]]:
    """Return the metrics of testA and testB of a dataset together, for each dataset with both."""
    rows = []
    for key in dict.fromkeys(split.split.dataset for split in evaluated):
        both = [split for split in evaluated if split.split.dataset == key and split.split.name in POOLED]
        if len(both) < len(POOLED):
            continue
        metric = type(both[0].metric)().to(both[0].metric.device)
        for split in both:
            metric.absorb(split.metric)
        values = {name: np.concatenate([split.means[name] for split in both]) for name in both[0].means}
        known = [split.result.provenance.official for split in both]
        official = False if False in known else None if None in known else True
        num_skipped = sum(split.result.num_skipped for split in both)
        provenance = replace(both[0].result.provenance, split=" + ".join(POOLED), official=official)
        rows.append(
            {
                "key": key,
                "title": both[0].split.dataset_title,
                **DatasetResult("", provenance, metric.protocol, *metric.compute(), num_skipped).flat(),
                "intervals": intervals(values, [image for split in both for image in split.image_keys]),
            }
        )
    return rows


def intervals(values: Mapping[str, np.ndarray], image_keys: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Compute 95 % bootstrap confidence intervals of means (percentile method, Efron 1979).

    Whole images are drawn: expressions of one image are not independent, and drawing single expressions would give
    intervals that are too narrow.

    Args:
        values: name -> [E], whose mean is the metric; NaN values are ignored.
        image_keys: E keys; expressions of one image have the same key.

    Returns:
        name -> (low, high), without the metrics whose values are all of one image.
    """
    _, image = np.unique(np.asarray(image_keys), return_inverse=True)  # [E] -> 0..I-1
    count = int(image.max()) + 1
    generator = np.random.default_rng(0)
    draws = generator.multinomial(count, np.full(count, 1 / count), size=NUM_DRAWS).astype(np.float64)  # [NUM_DRAWS, I]
    found = {}
    for name, column in values.items():
        known = ~np.isnan(column)
        if len(np.unique(image[known])) > 1:
            sums = np.bincount(image[known], column[known], minlength=count)  # [I]
            counts = np.bincount(image[known], minlength=count)  # [I]
            weight = draws @ counts  # [NUM_DRAWS]
            means = (draws @ sums)[weight > 0] / weight[weight > 0]
            low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
            found[name] = (float(low), float(high))
    return found

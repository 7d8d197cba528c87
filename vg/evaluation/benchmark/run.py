"""Running the benchmark: every split once, and all that can be said about the answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from vg.config import DataConfig
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.data.overlap import Subset
from vg.data.refcoco.source import RefcocoConfig
from vg.evaluation.benchmark.bootstrap import intervals
from vg.evaluation.benchmark.models import protocol
from vg.evaluation.benchmark.slices import slices
from vg.evaluation.benchmark.suite import SETS, Part
from vg.evaluation.evaluator import EvaluationSet
from vg.metrics.collected import CollectingMetric, hashed
from vg.metrics.rec import RecMetric
from vg.models.base import GroundingModel

POOLED = ("testA", "testB")


@dataclass(frozen=True)
class Judged:
    """One split with what each of its expressions contributed."""

    part: Part
    metric: CollectingMetric
    values: dict[str, np.ndarray]  # name -> [samples of the part], NaN where it does not count; also `score`
    results: dict[str, Any]  # json-able

    @property
    def leading(self) -> tuple[str, ...]:
        """The numbers that slices are told by."""
        return ("acc@0.5", "miou") if isinstance(self.metric, RecMetric) else ("f1",)


@torch.no_grad()
def run(
    model: GroundingModel, parts: Sequence[Part], accelerator: Accelerator, batch_size: int, workers: int
) -> tuple[dict[str, Any], list[Judged]]:
    """Evaluate a model on all parts.

    Returns:
        results: json-able: `model` and `device`; `parts`, a flat dict for each split of each data set: what it was
            measured on (see vg.evaluation.evaluator.EvaluationSet), the numbers of its metric, `intervals` (name -> low, high),
            `slices` (what about -> label -> numbers), `seconds`, `expressions_per_second` and `images_per_second` (all
            processes together, reading included); `pooled`, the same numbers of testA and testB taken together.
        what they were computed from.
    """
    model = model.to(accelerator.device).eval()
    for part in parts[:1]:  # kernels are compiled and memory is allocated before anything is timed
        _evaluation(model, replace(part, source=Subset(part.source, np.zeros(1, int))), accelerator, 1, 0).collect(
            model
        )
    judged = [_judge(model, part, accelerator, batch_size, workers) for part in parts]
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    about = {
        "parameters": model.num_parameters(),
        "trainable_parameters": model.num_parameters(trainable_only=True),
        "answers": protocol(model),
    }
    results = {
        "model": about,
        "device": f"{accelerator.num_processes} x {device}, {accelerator.mixed_precision} mixed precision, "
        f"batch size {batch_size}",
        "parts": [each.results for each in judged],
        "pooled": _pooled(judged),
    }
    return results, judged


def _judge(model: GroundingModel, part: Part, accelerator: Accelerator, batch_size: int, workers: int) -> Judged:
    evaluation = _evaluation(model, part, accelerator, batch_size, workers)
    accelerator.wait_for_everyone()
    start = time.perf_counter()
    evaluation.collect(model)
    accelerator.wait_for_everyone()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    pictures = [annotation.picture for annotation in part.annotations]
    ids, found = evaluation.metric.per_sample()  # [U]
    places = np.searchsorted(ids, [hashed(annotation.id) for annotation in part.annotations])  # [samples]
    values = {name: each[places] for name, each in found.items()}
    numbers = {name: each for name, each in values.items() if name in evaluation.metric.numbers}
    results = {"key": part.key, "title": SETS[part.key].title, **evaluation.summary()}
    judged = Judged(part, evaluation.metric, values, results)
    results |= {
        "intervals": intervals(numbers, pictures),
        "slices": _slices(judged, pictures),
        "num_images": len(set(pictures)),
        "seconds": seconds,
        "expressions_per_second": len(pictures) / seconds,
        "images_per_second": len(set(pictures)) / seconds,
    }
    return judged


def _evaluation(
    model: GroundingModel, part: Part, accelerator: Accelerator, batch_size: int, workers: int
) -> EvaluationSet:
    unused = RefcocoConfig()  # the part has its source
    config = DataConfig(train=unused, eval=unused, eval_batch_size=batch_size, workers=workers)
    data = GroundingDataset(part.source, collate=Collator(model.image_spec, model.text_spec))
    return EvaluationSet(part.name, data, config, accelerator)


def _slices(judged: Judged, pictures: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    keys = np.asarray(pictures)
    told: dict[str, dict[str, dict[str, Any]]] = {}
    for about, labels in slices(judged.part.annotations).items():
        for label, rows in labels.items():
            values = {name: judged.values[name][rows] for name in judged.leading}
            known = rows & ~np.isnan(judged.values[judged.leading[0]])
            if not known.any():
                continue
            told.setdefault(about, {})[label] = {
                "num_expressions": int(known.sum()),
                **{name: float(np.nanmean(value)) for name, value in values.items()},
                "intervals": intervals(values, keys[rows]),
            }
    return told


def _pooled(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """testA and testB of a data set as one set of expressions."""
    pooled = []
    for key in dict.fromkeys(each.part.key for each in judged):
        both = [each for each in judged if each.part.key == key and each.part.split in POOLED]
        if len(both) < len(POOLED):
            continue
        metric = type(both[0].metric)().to(both[0].metric.device)
        for each in both:
            metric.absorb(each.metric)
        names = [name for name in both[0].values if name in metric.numbers]
        values = {name: np.concatenate([each.values[name] for each in both]) for name in names}
        pictures = [annotation.picture for each in both for annotation in each.part.annotations]
        provenance = both[0].part.source.provenance
        pooled.append(
            {
                "key": key,
                "title": SETS[key].title,
                "split": " + ".join(POOLED),
                "data": provenance.data,
                "partition": provenance.partition,
                "official": "yes" if all(each.part.source.provenance.official for each in both) else "no",
                "protocol": metric.protocol,
                **metric.compute(),
                "intervals": intervals(values, pictures),
            }
        )
    return pooled

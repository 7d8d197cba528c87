"""Evaluation: every sample counts once on any number of processes; results name the data they were measured on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from vg.config import DataConfig, eval_key
from vg.data.dataset import RunDataset
from vg.data.mixture import sources_of
from vg.data.source import Source, Task
from vg.datasets import evaluation_dataset
from vg.distributed import mean_over_processes, progress_bar
from vg.errors import ConfigError
from vg.evaluation.results import DatasetResult, EvaluationResult
from vg.evaluation.table import cell
from vg.metrics import CocoMetric, FederatedMetric, GrecMetric, RecMetric
from vg.metrics.result import flat_key, split_flat_key
from vg.models.base import GroundingModel, check_finite, on_host
from vg.workers import new_loader

NUM_PRINTED = 6  # metrics of a dataset in the line of an evaluation

METRICS: dict[Task, Callable[[], RecMetric | GrecMetric | CocoMetric]] = {
    "expressions": RecMetric,
    "generalized": GrecMetric,
    "detection": CocoMetric,
}


def new_metric(source: Source) -> RecMetric | GrecMetric | CocoMetric:
    """Return the metric of a dataset: the data selects it, not the model.

    Raises:
        ConfigError: the data is federated, but its source has no `frequencies`.
    """
    provenance = source.provenance
    if provenance.task != "federated":
        return METRICS[provenance.task]()
    if source.frequencies is None:
        raise ConfigError(
            f"{provenance}: every image is annotated for some of the classes only, and shards and mixtures do not keep "
            "which; evaluate on the json file of the dataset"
        )
    return FederatedMetric(source.frequencies)


class DatasetEvaluator:
    """Evaluate models on one dataset, with the metric of its task.

    Args:
        name: key in data.eval, "" for a single dataset without a name.
        data: its samples, and how they become batches.
        workers: data workers of each process.
        with_loss: also compute the loss of models of expressions, as far as they can be trained on these samples.
        prefix: see DatasetResult.

    Raises:
        ConfigError: the source is a mixture of datasets with different metrics.
    """

    def __init__(
        self,
        name: str,
        data: RunDataset,
        batch_size: int,
        workers: int,
        accelerator: Accelerator,
        with_loss: bool = False,
        prefix: str = "",
    ):
        self.name, self.prefix = name, prefix
        self.with_loss = with_loss
        self.accelerator = accelerator
        self.data = data
        loader = new_loader(
            self.data,
            workers,
            batch_size=batch_size,
            collate_fn=data.collate,
            pin_memory=accelerator.device.type == "cuda",
        )
        accelerator.even_batches = False  # else repeated samples pad the last batch, which the loss would count twice
        self.loader: DataLoader[Any] = accelerator.prepare_data_loader(loader)
        accelerator.even_batches = True
        tasks = {source.provenance.task for source in sources_of(data.source)}
        if len(tasks) > 1:
            raise ConfigError(
                f"data.{eval_key(name)}: a mixture of {' and '.join(sorted(tasks))} has no common metric; "
                "list its datasets separately: {first: {...}, second: {...}}"
            )
        self.metric = new_metric(data.source).to(accelerator.device)

    def predict(self, model: GroundingModel) -> None:
        """Run inference on all samples and update the (reset) metric; raises PredictionError for NaN or Inf."""
        self.metric.reset()
        self.loss = torch.zeros(2, device=self.accelerator.device)  # sum over the samples, weight
        description = f"evaluate {self.name}".strip()
        for batch in progress_bar(self.accelerator, iterable=self.loader, desc=description, leave=False):
            with self.accelerator.autocast():
                output = model(batch)
            predictions = on_host(model.predict(output, batch))
            check_finite(predictions, model)
            self.metric.update(predictions, on_host(batch.targets))
            if self.with_loss and (model.generalized or model.iou(output, batch) is not None):
                weight = max(1, model.batch_weight(batch))
                loss = torch.stack(list(model.loss(output, batch).values())).sum()
                self.loss += torch.stack([weight * loss, torch.full_like(loss, weight)])

    def result(self) -> DatasetResult:
        """Compute the metrics of the last `predict`; every process must call it."""
        provenance, computed = self.data.source.provenance, self.metric.compute()
        bad = mean_over_processes(self.accelerator, self.data.bad.float().to(self.accelerator.device))  # [samples]
        num_skipped = int(bad.count_nonzero())
        if num_skipped and provenance.official:
            provenance = replace(provenance, official=False)
        loss, weight = mean_over_processes(self.accelerator, self.loss).tolist()
        mean = loss / weight if weight else None
        return DatasetResult(self.name, provenance, self.metric.protocol, *computed, num_skipped, mean, self.prefix)


class Evaluator:
    """Evaluate models on all evaluation datasets of a run.

    Args:
        best_metric: flat key of the metric that selects the best checkpoint; by default the first metric of the first
            dataset.
        with_loss: see DatasetEvaluator.

    Raises:
        ConfigError: no dataset has this metric, or see DatasetEvaluator.
    """

    def __init__(
        self,
        config: DataConfig,
        model: GroundingModel,
        accelerator: Accelerator,
        best_metric: str | None = None,
        with_loss: bool = False,
    ):
        self.datasets = [
            DatasetEvaluator(
                name,
                evaluation_dataset(settings, config, model),
                config.eval_batch_size,
                config.workers,
                accelerator,
                with_loss,
                prefix=name if index else "",
            )
            for index, (name, settings) in enumerate(config.eval_datasets().items())
        ]
        metrics = [dataset.metric for dataset in self.datasets]
        self.best_metric = best_metric or metrics[0].metric_names[0]
        prefix, name = split_flat_key(self.best_metric)
        # A prefix can be a group, and these are not known before the first evaluation.
        known = dict.fromkeys(name for metric in (metrics if prefix else metrics[:1]) for name in metric.metric_names)
        if name not in known:
            raise ConfigError(f"train.best_metric: {best_metric!r} is not one of {', '.join(known)}")

    @property
    def sources(self) -> list[Source]:
        return [dataset.data.source for dataset in self.datasets]

    @property
    def main_metrics(self) -> list[str]:
        """Flat key of the first metric of each dataset."""
        return [flat_key(dataset.prefix, dataset.metric.metric_names[0]) for dataset in self.datasets]

    @property
    def classes(self) -> tuple[str, ...]:
        """Phrases of the classes of the first dataset; empty if its samples have expressions or captions."""
        return tuple(self.sources[0].category_ids or ())

    @torch.no_grad()
    def run(self, model: GroundingModel) -> EvaluationResult:
        """Evaluate a model in evaluation mode and restore its mode; every process must call it.

        Args:
            model: the network itself, without a wrapper that synchronizes processes.

        Raises:
            ConfigError: a dataset has the name of a group (class or expression type) of the first one.
        """
        was_training = model.training
        model.eval()
        results = []
        for dataset in self.datasets:
            dataset.predict(model)
            results.append(dataset.result())
        model.train(was_training)
        return EvaluationResult(tuple(results), self.best_metric)

    def in_one_line(self, results: Mapping[str, Any]) -> str:
        """Return the first metrics of each dataset: "miou 0.8741, acc@0.5 0.9602; base: miou 0.4013".

        Args:
            results: with flat keys, as in history.jsonl and validation.json.
        """
        texts = []
        for dataset in self.datasets:
            keys = {name: flat_key(dataset.prefix, name) for name in dataset.metric.metric_names}
            if not dataset.prefix and self.best_metric not in list(keys)[:NUM_PRINTED]:
                keys = {self.best_metric: self.best_metric} | keys
            known = [f"{name} {cell(results[key])}" for name, key in keys.items() if key in results]
            texts.append(f"{dataset.name}{': ' * bool(dataset.name)}{', '.join(known[:NUM_PRINTED])}")
        return "; ".join(texts)

    def change_since_first(self, history: Sequence[Mapping[str, Any]], result: EvaluationResult) -> str:
        """Describe the change since the first evaluation: "gained 41.2 AP on raccoon, lost 1.3 AP on base".

        Args:
            history: rows of history.jsonl, oldest first; "" is returned if no row has an evaluation.
            result: the current evaluation.
        """
        changes, metrics = [], result.flat_metrics()
        for dataset, key in zip(self.datasets, self.main_metrics, strict=True):
            first = next((row[key] for row in history if key in row), None)
            if first is not None and key in metrics:
                points = 100 * (metrics[key] - first)
                verb, name = "lost" if points < 0 else "gained", dataset.name or dataset.data.source.provenance.data
                changes.append(f"{verb} {abs(points):.1f} {dataset.metric.label} on {name}")
        return ", ".join(changes)

    def category_ids(self) -> dict[str, Mapping[str, int]]:
        """Return the category ids of the classes, by name of the detection dataset.

        Raises:
            ConfigError: there is no detection dataset, or the classes of one have no ids.
        """
        ids: dict[str, Mapping[str, int]] = {}
        for dataset in self.datasets:
            if isinstance(dataset.metric, CocoMetric):
                source = dataset.data.source
                if source.category_ids is None:
                    raise ConfigError(f"{source.provenance.data} has no category ids, which COCO results need")
                ids[dataset.name] = source.category_ids
        if not ids:
            raise ConfigError("data.eval has no detection dataset whose boxes could be written as COCO results")
        return ids

    def detections(self) -> dict[str, list[dict[str, Any]]]:
        """Return the detections of the last `run` as rows of a COCO results file, by name of the detection dataset.

        Every process must call it; raises as `category_ids`.
        """
        ids = self.category_ids()
        return {
            dataset.name: dataset.metric.detections(ids[dataset.name])
            for dataset in self.datasets
            if isinstance(dataset.metric, CocoMetric)
        }

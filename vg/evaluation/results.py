"""Typed results of an evaluation; only files and trackers get them as flat dicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vg.data.source import Provenance
from vg.errors import ConfigError
from vg.metrics.result import UNDEFINED, MetricResult, flat_key


@dataclass(frozen=True)
class DatasetResult:
    """Metrics of one evaluation dataset, and what they were measured on."""

    name: str  # key in data.eval; "" if there is only one dataset, without a name
    provenance: Provenance
    protocol: str  # how predictions were evaluated
    metrics: dict[str, float]  # name -> value over all samples
    groups: dict[str, dict[str, float]]  # expression type or class name -> metrics of its samples
    num_skipped: int = 0  # bad samples that were not evaluated
    loss: float | None = None  # mean over the samples, if the evaluation computes it
    prefix: str = ""  # of the flat keys: the name, "" for the first dataset

    def key(self, name: str) -> str:
        """Return the flat key of a metric or text of this dataset."""
        return flat_key(self.prefix, name)

    @property
    def totals(self) -> dict[str, float]:
        """Metrics over all samples and, if samples were skipped, `num_skipped`."""
        return self.metrics | ({"num_skipped": self.num_skipped} if self.num_skipped else {})

    def flat(self) -> dict[str, Any]:
        """Return metrics, "<group>/<metric>" and texts (data, split, protocol, ...) as one dict that JSON can store."""
        provenance = self.provenance
        texts = {
            "data": provenance.data,
            "split": provenance.split,
            "protocol": self.protocol,
            "partition": provenance.partition,
            "official": {True: "yes", False: "no", None: None}[provenance.official],
            "set": self.name or None,
        }
        known = {key: text for key, text in texts.items() if text is not None}
        return MetricResult(self.metrics, self.groups).flat() | known | self.totals


@dataclass(frozen=True)
class EvaluationResult:
    """Results of all evaluation datasets.

    Raises:
        ConfigError: a dataset has the name of a group of the first one, so two values would have one flat key.
    """

    datasets: tuple[DatasetResult, ...]  # in the order of data.eval
    best_metric: str  # flat key of the metric that selects the best checkpoint

    def __post_init__(self) -> None:
        first, *further = self.datasets
        for dataset in further:
            if first.flat().keys() & map(dataset.key, dataset.flat()):
                raise ConfigError(
                    f"data.eval.{dataset.name}: {first.name} has a group of that name; rename the dataset"
                )

    @property
    def score(self) -> float:
        """The value of `best_metric`; higher is better.

        Raises:
            ConfigError: no dataset or group has this metric, or it is undefined for lack of ground truth.
        """
        metrics = self.flat_metrics()
        if self.best_metric not in metrics:
            raise ConfigError(f"train.best_metric: {self.best_metric!r} is not one of {', '.join(metrics)}")
        if metrics[self.best_metric] == UNDEFINED:
            raise ConfigError(
                f"train.best_metric: {self.best_metric!r} is undefined, because data.eval has no ground-truth box that "
                "counts for it; set another train.best_metric, or use other evaluation data"
            )
        return metrics[self.best_metric]

    def flat(self) -> dict[str, Any]:
        """Return one dict that JSON can store: keys of the first dataset as they are, of others "<dataset>/<key>"."""
        return {dataset.key(name): value for dataset in self.datasets for name, value in dataset.flat().items()}

    def flat_metrics(self) -> dict[str, float]:
        """Return `flat` without the texts, for trackers and history.jsonl."""
        return {key: value for key, value in self.flat().items() if not isinstance(value, str)}

    def losses(self) -> dict[str, float]:
        """Return the loss of each dataset that has one: "eval_loss" of the first, "<dataset>/eval_loss" of others."""
        return {dataset.key("eval_loss"): dataset.loss for dataset in self.datasets if dataset.loss is not None}

"""What a metric computes, and the flat keys under which files and trackers store it."""

from __future__ import annotations

from typing import NamedTuple

UNDEFINED = -1.0  # value of pycocotools for metrics without a ground-truth box


class MetricResult(NamedTuple):
    """The result of `compute`. A NamedTuple: torchmetrics rebuilds results, and its code rejects frozen dataclasses."""

    metrics: dict[str, float]  # name -> value over all samples; counts are int
    groups: dict[str, dict[str, float]]  # expression type or class name -> metrics of its samples

    def flat(self) -> dict[str, float]:
        """Return one dict: "miou" for all samples, then "<group>/miou" for each group."""
        grouped = {
            flat_key(group, name): value for group, metrics in self.groups.items() for name, value in metrics.items()
        }
        return self.metrics | grouped


def flat_key(*names: str) -> str:
    """Join dataset, group and metric to a flat key; empty names are left out."""
    return "/".join(filter(None, names))


def split_flat_key(key: str) -> tuple[str, str]:
    """Split a flat key into its prefix (dataset and group, "" if there is neither) and the metric name."""
    prefix, _, name = key.rpartition("/")
    return prefix, name

"""Runs all checks on the datasets of a run and collects their issues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vg.data.check.boxes import check_boxes
from vg.data.check.dataset import CheckedDataset, check_loading, read_dataset, spread
from vg.data.check.images import check_images
from vg.data.check.overlap import check_classes, check_copies, check_pair
from vg.data.check.phrases import CountTokens, check_phrases
from vg.data.detection.issues import SEVERITIES, Issue, Severity
from vg.data.mixture import MixtureConfig, SourceConfig
from vg.errors import BadSampleError


@dataclass
class Diagnosis:
    """All datasets with their issues."""

    datasets: list[CheckedDataset]

    @property
    def issues(self) -> list[Issue]:
        """Issues of all datasets, errors first."""
        issues = [issue for dataset in self.datasets for issue in dataset.issues]
        return sorted(issues, key=lambda issue: SEVERITIES.index(issue.severity))

    def count(self, severity: Severity) -> int:
        return sum(issue.severity == severity for issue in self.issues)

    def images(self, limit: int) -> list[tuple[str, np.ndarray, np.ndarray, list[str]]]:
        """Return images to look at, the same number of each dataset: those with issues, then evenly spaced ones.

        Returns:
            Up to `limit` of: caption, image [H, W, 3] uint8, boxes [N, 4] xyxy pixels, names of the boxes.
        """
        images = []
        num = limit // len(self.datasets)
        for dataset in self.datasets:
            annotations, xyxy = dataset.annotations, dataset.xyxy
            issues = [issue for issue in self.issues if issue.dataset == dataset.name and issue.severity != "note"]
            reasons = {index: issue.what for issue in reversed(issues) for index in issue.images[:2]}
            indices = dict.fromkeys([*list(reasons)[: num // 2], *spread(len(annotations.ids), num)])
            for index in list(indices)[:num]:
                try:
                    image = dataset.image(index)
                except (BadSampleError, OSError):
                    continue  # reported as an issue
                drawable = np.isfinite(xyxy).all(axis=1) & (xyxy[:, 2:] >= xyxy[:, :2]).all(axis=1)
                own = np.flatnonzero((annotations.image_indices == index) & drawable)
                names = [annotations.names[label] for label in annotations.labels[own].tolist()]
                caption = f"{dataset.name}: {reasons.get(index, annotations.files[index])}"
                images.append((caption, image, xyxy[own], names))
        return images


def diagnose(
    configs: Mapping[str, SourceConfig],
    max_tokens: int,
    count_tokens: CountTokens | None = None,
    limit: int | None = None,
) -> Diagnosis:
    """Check datasets, and the evaluation datasets against those for training.

    Args:
        configs: settings by name; training datasets have the name "train", all components of a mixture are checked.
        max_tokens: tokens of the model's longest prompt.
        count_tokens: number of tokens of each phrase; None uses lower bounds.
        limit: number of images to read of each dataset; None for all.
    """
    datasets = []
    for name, config in _components(configs).items():
        dataset = read_dataset(name, config, limit)
        annotations, issues = dataset.annotations, dataset.issues
        if dataset.load_image is None:
            check_images(dataset, spread(len(annotations.ids), limit))
        check_boxes(dataset)
        if not annotations.ids:
            issues.add("error", "no images", "see the other issues", [dataset.title])
        elif not len(annotations.boxes):
            issues.add("error", "no boxes", "annotate the images, or use the right file", [dataset.title])
        check_phrases(dataset, count_tokens, max_tokens)
        check_copies(dataset)
        check_loading(dataset, config)
        datasets.append(dataset)
    training = [dataset for dataset in datasets if dataset.is_training]
    for other in datasets:
        if not other.is_training:
            for train in training:
                check_pair(train, other)
            check_classes(training, other)
    return Diagnosis(datasets)


def _components(configs: Mapping[str, SourceConfig]) -> dict[str, Any]:
    """Replace mixtures by their components, named "train.datasets.0" and so on."""
    components: dict[str, Any] = {}
    for name, config in configs.items():
        if isinstance(config, MixtureConfig):
            components |= {f"{name}.datasets.{index}": component for index, component in enumerate(config.datasets)}
        else:
            components[name] = config
    return components

"""Runs all checks on the datasets of a run, those between two datasets included, and collects their issues."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vg.data import DatasetConfig
from vg.data.check.boxes import check_boxes
from vg.data.check.dataset import CheckedDataset, check_loading, read_dataset, spread
from vg.data.check.images import check_images
from vg.data.check.phrases import CountTokens, check_phrases
from vg.data.detection.issues import SEVERITIES, Issue, Severity
from vg.data.detection.vocabulary import normalized_name
from vg.data.mixture import MixtureConfig, SourceConfig, configs_of
from vg.data.subset import SplitConfig
from vg.errors import BadSampleError

_ZERO_SHOT = "nothing if zero-shot evaluation is intended; otherwise fix names or splits"


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
            reasons: dict[int, str] = {}
            for issue in self.issues:
                for index in issue.images[:2] if issue.dataset == dataset.name else ():
                    reasons.setdefault(index, issue.what)
            indices = dict.fromkeys([*list(reasons)[: num // 2], *spread(len(annotations.ids), num)])
            drawable = np.isfinite(xyxy).all(axis=1) & (xyxy[:, 2:] >= xyxy[:, :2]).all(axis=1)
            for index in list(indices)[:num]:
                try:
                    image = dataset.image(index)
                except (BadSampleError, OSError):
                    continue  # reported as an issue
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
        configs: settings by name; training datasets have the name "train". The components of a mixture are checked
            separately, with names such as "train.datasets.0"; a dataset that is split is checked as a whole.
        max_tokens: tokens of the model's longest prompt.
        count_tokens: number of tokens of each phrase; None uses lower bounds.
        limit: number of images to read of each dataset; None for all.
    """
    components: dict[str, DatasetConfig] = {}
    for name, config in configs.items():
        for index, component in enumerate(configs_of(config)):
            if isinstance(component, SplitConfig):
                component = component.dataset
                if component in components.values():
                    continue
            components[f"{name}.datasets.{index}" if isinstance(config, MixtureConfig) else name] = component
    datasets = []
    for name, config in components.items():
        dataset = read_dataset(name, config, limit)
        datasets.append(dataset)
        annotations, issues = dataset.annotations, dataset.issues
        if not annotations.ids and any(issue.severity == "error" for issue in issues):
            continue  # nothing could be read, which is the reason for everything that the checks would report
        if dataset.load_image is None:
            check_images(dataset, spread(len(annotations.ids), limit))
        check_boxes(dataset)
        if not annotations.ids:
            issues.add("error", "no images", "add images, or use the right file", [dataset.title])
        elif not len(annotations.boxes):
            issues.add("error", "no boxes", "annotate the images, or use the right file", [dataset.title])
        check_phrases(dataset, count_tokens, max_tokens)
        _check_copies(dataset)
        check_loading(dataset, config)
    training = [dataset for dataset in datasets if dataset.is_training]
    for evaluation in (dataset for dataset in datasets if not dataset.is_training):
        for train in training:
            _check_shared_images(train, evaluation)
        _check_classes(training, evaluation)
    return Diagnosis(datasets)


def _check_copies(dataset: CheckedDataset) -> None:
    """Report image files of one dataset with the same bytes."""
    names: dict[bytes, set[str]] = defaultdict(set)
    for index, file in dataset.image_files.items():
        if file.digest:
            names[file.digest].add(dataset.annotations.files[index])
    groups = [" = ".join(sorted(group)) for group in names.values() if len(group) > 1]
    fix = "keep one of each, with all boxes"
    dataset.issues.add("warning", "identical images under several names", fix, groups)


def _check_shared_images(train: CheckedDataset, evaluation: CheckedDataset) -> None:
    names, train_keys = evaluation.annotations.files, set(train.image_keys)
    shared = {index: names[index] for index, key in enumerate(evaluation.image_keys) if key in train_keys}
    fix = "use another split, or set data.drop_overlap=true, which leaves them out of training"
    what = f"images that are also in {train.name}, which makes metrics too optimistic"
    evaluation.issues.add("warning", what, fix, shared.values())
    originals = {file.digest: train.annotations.files[index] for index, file in train.image_files.items()}
    copies = [
        f"{names[index]} is {originals[file.digest]} of {train.name}"
        for index, file in evaluation.image_files.items()
        if file.digest and file.digest in originals and index not in shared
    ]
    what = f"images that are also in {train.name} under another name, which makes metrics too optimistic"
    evaluation.issues.add("warning", what, f"remove them from {train.name}", copies)


def _check_classes(training: Sequence[CheckedDataset], evaluation: CheckedDataset) -> None:
    """Report classes with boxes in an evaluation dataset but not in any training dataset.

    Referring expressions and other phrases are free text: reported if they have no word in common with the training.
    """
    known = {name for dataset in training for name in dataset.classes_with_boxes}
    evaluated = evaluation.classes_with_boxes
    if not known or not evaluated or not all(dataset.annotations.num_classes for dataset in training):
        words = {word for dataset in training for word in dataset.words_with_boxes}
        if words and evaluation.words_with_boxes and not words & evaluation.words_with_boxes:
            phrases = [evaluation.annotations.names[label] for label in np.unique(evaluation.annotations.labels)]
            evaluation.issues.add("warning", "phrases without any word of the training data", _ZERO_SHOT, phrases)
        return
    similar = {normalized_name(name): name for name in known}
    unknown = {name: similar.get(normalized_name(name)) for name in sorted(evaluated - known)}
    examples = [name + (f" ({match!r} in training)" if match else "") for name, match in unknown.items()]
    is_zero_shot = not evaluated & known and not any(unknown.values())
    all_of = "all classes are " if is_zero_shot else "classes "
    evaluation.issues.add("warning", f"{all_of}without any box in training", _ZERO_SHOT, examples)

"""Checks between datasets: images that are in two of them, and classes that only the evaluation has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from vg.data.check.dataset import CheckedDataset
from vg.data.check.phrases import normalized_name
from vg.data.detection.issues import Severity


def check_copies(dataset: CheckedDataset) -> None:
    """Report image files of one dataset with the same bytes."""
    names: dict[bytes, set[str]] = defaultdict(set)
    for index, file in dataset.image_files.items():
        if file.digest:
            names[file.digest].add(dataset.annotations.files[index])
    groups = [" = ".join(sorted(group)) for group in names.values() if len(group) > 1]
    fix = "keep one of each, with all boxes"
    dataset.issues.add("warning", "identical images under several names", fix, groups)


def check_pair(train: CheckedDataset, other: CheckedDataset) -> None:
    """Report images that an evaluation dataset shares with a training dataset."""
    names, train_keys = other.annotations.files, set(train.image_keys)
    shared = {index: names[index] for index, key in enumerate(other.image_keys) if key in train_keys}
    fix = "use another split, or set data.drop_overlap=true, which leaves them out of training"
    what = f"images that are also in {train.name}, which makes metrics too optimistic"
    other.issues.add("warning", what, fix, shared.values())
    originals = {file.digest: train.annotations.files[index] for index, file in train.image_files.items()}
    copies = [
        f"{names[index]} is {originals[file.digest]} of {train.name}"
        for index, file in other.image_files.items()
        if file.digest and file.digest in originals and index not in shared
    ]
    what = f"images that are also in {train.name} under another name, which makes metrics too optimistic"
    other.issues.add("warning", what, f"remove them from {train.name}", copies)


def check_classes(training: Sequence[CheckedDataset], other: CheckedDataset) -> None:
    """Report classes with boxes in an evaluation dataset but not in any training dataset."""
    known, evaluated = set[str]().union(*map(_classes_with_boxes, training)), _classes_with_boxes(other)
    if not known or not all(dataset.annotations.num_classes for dataset in training):
        return  # phrases can refer to any class
    similar = {normalized_name(name): name for name in known}
    unknown = {name: similar.get(normalized_name(name)) for name in sorted(evaluated - known)}
    examples = [name + (f" ({match!r} in training)" if match else "") for name, match in unknown.items()]
    is_zero_shot = not evaluated & known and not any(unknown.values())
    fix = "nothing if zero-shot evaluation is intended; otherwise fix names or splits"
    severity: Severity = "note" if is_zero_shot else "warning"
    other.issues.add(severity, "classes without any box in training", fix, examples)


def _classes_with_boxes(dataset: CheckedDataset) -> set[str]:
    names, num_classes = dataset.annotations.names, dataset.annotations.num_classes
    return {names[label] for label in set(dataset.annotations.labels.tolist()) if label < num_classes}

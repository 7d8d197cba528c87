"""A diagnosis as text for people and as JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from vg.data.check.dataset import CheckedDataset
from vg.data.check.diagnosis import Diagnosis
from vg.data.detection.issues import SEVERITIES
from vg.errors import printable

_SMALL, _LARGE = 32**2, 96**2  # square pixels, as in COCO evaluation
_NUM_NAMES = 12  # classes to list


def _statistics(dataset: CheckedDataset) -> dict[str, Any]:
    annotations, xyxy, limits = dataset.annotations, dataset.xyxy, dataset.limits
    sides = xyxy[:, 2:] - xyxy[:, :2]
    measured = np.isfinite(sides).all(axis=1) & (sides > 0).all(axis=1)
    areas = np.prod(sides[measured], axis=1)
    known = measured & (limits > 0).all(axis=1)
    shares = np.prod(sides[known] / limits[known], axis=1)
    counts = np.bincount(annotations.labels, minlength=len(annotations.names))
    order = np.argsort(-counts, kind="stable").tolist()
    num_images = len(annotations.ids)
    return {
        "data": dataset.title,
        "images": num_images,
        "images_read": num_images if dataset.load_image else len(dataset.image_files),
        "images_without_boxes": num_images - len(np.unique(annotations.image_indices)),
        "boxes": len(xyxy),
        "crowd": int(annotations.crowd.sum()),
        "classes": {annotations.names[i]: int(counts[i]) for i in order if i < annotations.num_classes},
        "phrases": len(annotations.names) - annotations.num_classes,
        "small": float(np.mean(areas < _SMALL)) if len(areas) else None,
        "large": float(np.mean(areas > _LARGE)) if len(areas) else None,
        "median_sides": np.median(sides[measured], axis=0).round().tolist() if len(areas) else None,
        "median_share": float(np.median(shares)) if len(shares) else None,
    }


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return statistics and issues of all datasets."""
    issues = [asdict(issue) for issue in diagnosis.issues]
    for issue in issues:
        del issue["images"]
    return {
        "errors": diagnosis.count("error"),
        "warnings": diagnosis.count("warning"),
        "datasets": {dataset.name: _statistics(dataset) for dataset in diagnosis.datasets},
        "issues": issues,
    }


def to_text(diagnosis: Diagnosis) -> str:
    """Return statistics and issues as lines of text, the most severe last."""
    lines = [line for dataset in diagnosis.datasets for line in _statistics_lines(dataset)]
    for issue in reversed(diagnosis.issues):
        lines += ["", f"{issue.severity.upper()} {issue.dataset}: {issue.what} ({issue.count})"]
        lines += [f"    {example}" for example in issue.examples]
        lines += ["    ..."] if issue.count > len(issue.examples) else []
        lines.append(f"    -> {issue.fix}")
    counts = ((diagnosis.count(severity), severity) for severity in SEVERITIES)
    lines += ["", ", ".join(f"{count} {severity}{'s' * (count != 1)}" for count, severity in counts)]
    return "\n".join(map(printable, lines))


def _statistics_lines(dataset: CheckedDataset) -> list[str]:
    stats = _statistics(dataset)
    num_read = "all" if stats["images_read"] == stats["images"] else stats["images_read"]
    lines = [
        f"{dataset.name}: {stats['data']}",
        f"    {stats['images']} images ({num_read} of them read), {stats['images_without_boxes']} without boxes; "
        f"{stats['boxes']} boxes, {stats['crowd']} of them crowd",
    ]
    if stats["median_sides"]:
        small, large = 100 * stats["small"], 100 * stats["large"]
        width, height = stats["median_sides"]
        share = "" if stats["median_share"] is None else f", {100 * stats['median_share']:.1f} % of the image"
        lines.append(
            f"    boxes: {small:.0f} % small (below 32 x 32 px), {large:.0f} % large (above 96 x 96 px); median "
            f"{width:.0f} x {height:.0f} px{share}"
        )
    if classes := [f"{name} {count}" for name, count in stats["classes"].items()]:
        more = [f"{len(classes) - _NUM_NAMES} more"] if len(classes) > _NUM_NAMES else []
        listed = ", ".join(classes[:_NUM_NAMES] + more)
        lines.append(f"    {len(classes)} classes: {listed}" if len(classes) > 1 else f"    one class: {listed}")
    if stats["phrases"]:
        lines.append(f"    {stats['phrases']} different phrases")
    return lines

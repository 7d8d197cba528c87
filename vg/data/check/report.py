"""A diagnosis as text for people, and as JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from vg.data.check.diagnosis import Diagnosis, Examined

_SMALL, _LARGE = 32**2, 96**2  # square pixels, as COCO counts
_NUM_NAMES = 12  # classes that are listed


def summary(each: Examined) -> dict[str, Any]:
    """The numbers of one set."""
    reading, boxes = each.reading, each.boxes
    sides = boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]
    measured = np.isfinite(sides).all(axis=1) & (sides > 0).all(axis=1)
    areas = np.prod(sides[measured], axis=1)
    known = measured & (boxes.limits > 0).all(axis=1)
    shares = np.prod(sides[known] / boxes.limits[known], axis=1)
    counts = np.bincount(boxes.labels, minlength=len(reading.names))
    order = np.argsort(-counts, kind="stable").tolist()
    return {
        "data": reading.title,
        "pictures": len(reading.pictures),
        "pictures_read": len(reading.pictures) if reading.load else len(each.looks),
        "pictures_without_boxes": len(reading.pictures) - len(np.unique(boxes.owners)),
        "boxes": len(boxes.owners),
        "crowd": int(boxes.crowd.sum()),
        "classes": {reading.names[label]: int(counts[label]) for label in order if label < reading.num_classes},
        "phrases": len(reading.names) - reading.num_classes,
        "small": float(np.mean(areas < _SMALL)) if len(areas) else None,
        "large": float(np.mean(areas > _LARGE)) if len(areas) else None,
        "median_sides": np.median(sides[measured], axis=0).round().tolist() if len(areas) else None,
        "median_share": float(np.median(shares)) if len(shares) else None,
    }


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything that was found."""
    findings = [asdict(finding) for finding in diagnosis.findings.ranked()]
    for finding in findings:
        del finding["pictures"]
    return {
        "errors": diagnosis.findings.num("error"),
        "warnings": diagnosis.findings.num("warning"),
        "sets": {each.reading.set: summary(each) for each in diagnosis.sets},
        "findings": findings,
    }


def to_text(diagnosis: Diagnosis) -> str:
    """What a person wants to know, most important last."""
    lines = [line for each in diagnosis.sets for line in _of_set(each)]
    for finding in reversed(diagnosis.findings.ranked()):
        lines += ["", f"{finding.severity.upper()} {finding.set}: {finding.what} ({finding.count})"]
        lines += [f"    {example}" for example in finding.examples]
        lines += ["    ..."] if finding.count > len(finding.examples) else []
        lines.append(f"    -> {finding.mend}")
    numbers = ((diagnosis.findings.num(name), name) for name in ("error", "warning", "note"))
    counted = ", ".join(f"{number} {name}{'s' * (number != 1)}" for number, name in numbers)
    return "\n".join([*lines, "", counted])


def _of_set(each: Examined) -> list[str]:
    numbers = summary(each)
    read = "all" if numbers["pictures_read"] == numbers["pictures"] else numbers["pictures_read"]
    lines = [
        f"{each.reading.set}: {numbers['data']}",
        f"    {numbers['pictures']} pictures ({read} of them read), {numbers['pictures_without_boxes']} without boxes; "
        f"{numbers['boxes']} boxes, {numbers['crowd']} of them crowd",
    ]
    if numbers["median_sides"]:
        small, large = 100 * numbers["small"], 100 * numbers["large"]
        width, height = numbers["median_sides"]
        share = "" if numbers["median_share"] is None else f", {100 * numbers['median_share']:.1f} % of the picture"
        lines.append(
            f"    boxes: {small:.0f} % small (below 32 x 32 px), {large:.0f} % large (above 96 x 96 px); median "
            f"{width:.0f} x {height:.0f} px{share}"
        )
    classes = list(numbers["classes"].items())
    if classes:
        more = [f"{len(classes) - _NUM_NAMES} more"] if len(classes) > _NUM_NAMES else []
        told = ", ".join([*(f"{name} {count}" for name, count in classes[:_NUM_NAMES]), *more])
        lines.append(f"    {len(classes)} classes: {told}" if len(classes) > 1 else f"    one class: {told}")
    if numbers["phrases"]:
        lines.append(f"    {numbers['phrases']} different phrases")
    return lines

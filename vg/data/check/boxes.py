"""Checks of boxes: their format, position and size, duplicates, and placeholder boxes."""

from __future__ import annotations

from functools import partial

import numpy as np

from vg.data.check.dataset import CheckedDataset
from vg.data.detection.annotations import CXCYWH, MIN_SIDE, VOC, XYWH, XYXY, BoxFormat
from vg.data.detection.issues import Severity
from vg.data.source import OVERHANG

_MANY = 0.1  # other formats are tried if at least this fraction of the boxes does not fit their image
_ALL = 0.98  # fraction of boxes that must fit in another format for it to be the actual one
_FEW = 10  # boxes: fewer are not evidence of anything
_MIX_UPS = {XYWH: (XYXY, CXCYWH), XYXY: (XYWH,), VOC: (XYWH,), CXCYWH: (XYWH, XYXY)}  # expected format -> others to try


def check_boxes(dataset: CheckedDataset) -> None:
    """Report issues of the boxes, and set `dataset.xyxy` from the format that fits."""
    annotations, issues = dataset.annotations, dataset.issues
    dataset.xyxy = xyxy = dataset.to_pixels(annotations.box_format)
    known = np.asarray((dataset.limits > 0).all(axis=1))

    if annotations.report_relative(issues):
        dataset.xyxy = xyxy * np.where(known[:, None], dataset.limits, np.nan)[:, [0, 1, 0, 1]]
        return
    if not annotations.relative and annotations.report_thousandths(issues, dataset.limits):
        dataset.xyxy = xyxy * np.where(known[:, None], dataset.limits / 1000, np.nan)[:, [0, 1, 0, 1]]
        return
    report = partial(annotations.report, issues)
    if (actual := _actual_format(dataset, known)) is not None:
        what = f"boxes that are not {annotations.box_format.description}"
        report("error", what, f"all of them fit as {actual.description}: convert them", ~_fits(dataset, xyxy))
        dataset.xyxy = dataset.to_pixels(actual)
        return
    inverted = annotations.report_inverted(issues)
    thin = ((xyxy[:, 2:] - xyxy[:, :2]) < MIN_SIDE).any(axis=1) & ~inverted
    clipped = np.clip(xyxy, 0, np.where(known[:, None], dataset.limits, np.inf)[:, [0, 1, 0, 1]])
    outside = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1) & ~inverted & ~thin
    beyond = (np.abs(clipped - xyxy) > OVERHANG).any(axis=1) & ~inverted & ~outside & ~thin
    severity: Severity = "warning"
    fixes = "remove them; all datasets but COCO json (min_side) leave them out", "they are left out", "they are clipped"
    if dataset.task == "expressions":  # a sample has one box, which cannot be left out
        severity, fixes = "error", ("remove these rows", "remove these rows", "clip them")
    report(severity, f"boxes with a side below {MIN_SIDE:g} pixel", fixes[0], thin)
    report(severity, "boxes outside of their image", f"{fixes[1]}; check that it is the right image", outside)
    report(severity, "boxes that extend beyond their image", f"{fixes[2]}; correct them", beyond)
    rows = np.column_stack([annotations.image_indices, annotations.labels, xyxy])
    duplicate = np.ones(len(rows), bool)
    duplicate[np.unique(rows, axis=0, return_index=True)[1]] = False
    if dataset.task == "detection":
        report("warning", "duplicate boxes", "remove one: a model must find both", duplicate & ~thin)
    _check_placeholders(dataset, known)


def _fits(dataset: CheckedDataset, xyxy: np.ndarray) -> np.ndarray:
    """[A] bool, which boxes have an area and are inside their image."""
    low, high = xyxy[:, :2], xyxy[:, 2:]
    return np.asarray(((high > low) & (low >= -OVERHANG) & (high <= dataset.limits + OVERHANG)).all(axis=1))


def _actual_format(dataset: CheckedDataset, known: np.ndarray) -> BoxFormat | None:
    """Return the format that the boxes are in if it is not the expected one; `known` [A]: the image size is known."""
    if known.sum() < _FEW or np.mean(_fits(dataset, dataset.xyxy)[known]) > 1 - _MANY:
        return None
    candidates = _MIX_UPS[dataset.annotations.box_format]
    fractions = [np.mean(_fits(dataset, dataset.to_pixels(candidate))[known]) for candidate in candidates]
    best = int(np.argmax(fractions))
    return candidates[best] if fractions[best] >= _ALL else None


def _check_placeholders(dataset: CheckedDataset, known: np.ndarray) -> None:
    """Report boxes that are the same everywhere, such as placeholders for a program that requires boxes."""
    annotations, xyxy = dataset.annotations, dataset.xyxy
    if len(xyxy) < _FEW or len(np.unique(annotations.image_indices)) < _FEW:
        return
    relative = xyxy[known] / dataset.limits[known][:, [0, 1, 0, 1]]  # [A, 4]
    pixels_differ = np.ptp(xyxy, axis=0).max() > MIN_SIDE
    if not pixels_differ or (known.all() and np.ptp(relative, axis=0).max() < 0.01):
        what, fix = "all boxes are the same", "annotate the images: a model would memorize this one position"
    elif known.any() and np.mean(np.prod(relative[:, 2:] - relative[:, :2], axis=1) > 0.95) > 0.9:
        what = "nearly all boxes are as large as the image"
        fix = "these look like labels of whole images; annotate the objects in them"
    else:
        return
    dataset.issues.add("warning", what, fix, [annotations.describe(0)], [0], len(xyxy))

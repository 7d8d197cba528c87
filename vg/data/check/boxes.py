"""What can be wrong with boxes: their format, their place, their size, and that they are all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vg.data.check.findings import Findings, Reading
from vg.data.detection.source import MIN_SIDE
from vg.data.source import OVERHANG

_MANY = 0.1  # share of boxes that do not fit their picture from which on another format is tried
_ALL = 0.98  # share that must fit in another format for it to be the true one
_FEW = 10  # boxes: fewer say nothing about a set


def _edges(boxes: np.ndarray) -> np.ndarray:
    return boxes


def _corner(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _centre(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def _from_one(boxes: np.ndarray) -> np.ndarray:
    return boxes - np.array([1, 1, 0, 0])


Format = tuple[str, Callable[[np.ndarray], np.ndarray]]  # its name, and [A, 4] as written -> xyxy

EDGES: Format = ("left, top, right, bottom", _edges)
CORNER: Format = ("left, top, width, height", _corner)
CENTRE: Format = ("x and y of the centre, width, height", _centre)
FORMATS: dict[str, list[Format]] = {  # the right one first, then those that it is mixed up with
    "coco": [CORNER, EDGES, CENTRE],
    "odvg": [EDGES, CORNER],
    "voc": [("left, top, right, bottom from 1", _from_one), CORNER],
    "yolo": [CENTRE, CORNER, EDGES],
    "samples": [EDGES],
}


class Boxes(NamedTuple):
    """The boxes of a reading in arrays."""

    xyxy: np.ndarray  # [A, 4] float64, in pixels; NaN where the size of the picture is needed and not known
    limits: np.ndarray  # [A, 2] (width, height) of the picture; 0 where not known
    owners: np.ndarray  # [A] pictures
    labels: np.ndarray  # [A]
    crowd: np.ndarray  # [A] bool


def boxes_of(reading: Reading, sizes: np.ndarray, form: Format | None = None) -> Boxes:
    """All boxes of a reading, whose pictures have sizes [I, 2] (height, width)."""
    owners = np.array([box.picture for box in reading.boxes], np.int64)
    limits = sizes[owners][:, ::-1].astype(np.float64).reshape(-1, 2)
    numbers = np.array([box.numbers for box in reading.boxes], np.float64).reshape(-1, 4)
    xyxy = (form or FORMATS[reading.form][0])[1](numbers)
    if reading.form == "yolo":
        xyxy = xyxy * np.where(limits > 0, limits, np.nan)[:, [0, 1, 0, 1]]
    labels = np.array([box.label for box in reading.boxes], np.int64)
    return Boxes(xyxy, limits, owners, labels, np.array([box.crowd for box in reading.boxes], bool))


def check_boxes(reading: Reading, sizes: np.ndarray, findings: Findings) -> Boxes:
    """Note what is wrong with the boxes; returns them, read in the format that fits."""
    boxes = boxes_of(reading, sizes)

    def note(severity: str, what: str, mend: str, wrong: np.ndarray) -> None:
        places = np.flatnonzero(wrong).tolist()
        examples = [reading.example(reading.boxes[place]) for place in places[:3]]
        pictures = [reading.boxes[place].picture for place in places[:3]]
        findings.add(severity, reading.set, what, mend, examples, pictures, count=len(places))  # type: ignore[arg-type]

    if (other := _mixed_up(reading, sizes)) is not None:
        what = f"boxes that are not {FORMATS[reading.form][0][0]}, as this form of data wants"
        mend = f"all of them fit as {other[0]}: convert them"
        note("error", what, mend, ~_fits(boxes))
        return boxes_of(reading, sizes, other)
    sides = boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]
    inverted = (sides < 0).any(axis=1)
    thin = (sides < MIN_SIDE).any(axis=1) & ~inverted
    known = np.all(boxes.limits > 0, axis=1)
    inside = np.clip(boxes.xyxy, 0, np.where(known[:, None], boxes.limits, np.inf)[:, [0, 1, 0, 1]])
    outside = (inside[:, 2:] <= inside[:, :2]).any(axis=1) & ~inverted & ~thin
    beyond = (np.abs(inside - boxes.xyxy) > OVERHANG).any(axis=1) & ~inverted & ~outside & ~thin
    note("error", "boxes that end before they begin", "correct or remove them", inverted)
    note(
        "warning",
        f"boxes with a side below {MIN_SIDE:g} pixel",
        "remove them; all but COCO sets (min_side) leave them out",
        thin,
    )
    note("warning", "boxes outside of their picture", "they are left out; is it the right picture?", outside)
    note("warning", "boxes that stick out of their picture", "they are clipped; correct them", beyond)
    rows = np.column_stack([boxes.owners, boxes.labels, boxes.xyxy])
    again = np.ones(len(rows), bool)
    again[np.unique(rows, axis=0, return_index=True)[1]] = False
    if reading.task == "detection":
        note("warning", "boxes that are there twice", "remove one: both have to be found", again & ~thin)
    _check_constant(reading, boxes, known, findings)
    return boxes


def _fits(boxes: Boxes) -> np.ndarray:
    """[A] which boxes have an area and lie in their picture."""
    low, high = boxes.xyxy[:, :2], boxes.xyxy[:, 2:]
    return np.all((high > low) & (low >= -OVERHANG) & (high <= boxes.limits + OVERHANG), axis=1)


def _mixed_up(reading: Reading, sizes: np.ndarray) -> Format | None:
    """The format that the boxes are in, if it is not the right one."""
    known = np.all(boxes_of(reading, sizes).limits > 0, axis=1)
    if known.sum() < _FEW:
        return None
    right, *others = FORMATS[reading.form]
    if np.mean(_fits(boxes_of(reading, sizes, right))[known]) > 1 - _MANY:
        return None
    shares = [float(np.mean(_fits(boxes_of(reading, sizes, other))[known])) for other in others]
    best = int(np.argmax(shares)) if shares else 0
    return others[best] if shares and shares[best] >= _ALL else None


def _check_constant(reading: Reading, boxes: Boxes, known: np.ndarray, findings: Findings) -> None:
    """Boxes that somebody filled in, because a program wanted some."""
    if len(boxes.owners) < _FEW or len(set(boxes.owners.tolist())) < _FEW:
        return
    first = [reading.example(reading.boxes[0])]
    relative = boxes.xyxy[known] / boxes.limits[known][:, [0, 1, 0, 1]]  # [A, 4]
    pixels_differ = np.ptp(boxes.xyxy, axis=0).max() > MIN_SIDE
    if not pixels_differ or (known.all() and np.ptp(relative, axis=0).max() < 0.01):
        what = "all boxes are the same"
        mend = "annotate the pictures: a model would learn this one place by heart"
        findings.add("warning", reading.set, what, mend, first, [0], len(boxes.owners))
    elif known.any() and np.mean(np.prod(relative[:, 2:] - relative[:, :2], axis=1) > 0.95) > 0.9:
        what = "nearly all boxes are as large as the picture"
        mend = "these look like labels of whole pictures; annotate the things in them"
        findings.add("warning", reading.set, what, mend, first, [0], len(boxes.owners))

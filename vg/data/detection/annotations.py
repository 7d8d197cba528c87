"""Annotations as the files of a dataset have them, whatever the file format and the box format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from vg.data.detection.issues import Issues

MAX_COORDINATE = 1e15  # larger values are treated as not finite, because boxes are float32 later


def xywh_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    """[..., 4] (left, top, width, height) -> [..., 4] (left, top, right, bottom), any unit."""
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def cxcywh_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    """[..., 4] (center x, center y, width, height) -> [..., 4] (left, top, right, bottom); vg.boxes is for tensors."""
    return np.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], axis=-1)


def voc_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    """[..., 4] (xmin, ymin, xmax, ymax) of the first and last pixel, counted from 1 -> [..., 4] xyxy in pixels."""
    return boxes - np.array([1, 1, 0, 0])


class BoxFormat(NamedTuple):
    """What the four numbers of a box mean."""

    description: str
    to_xyxy: Callable[[np.ndarray], np.ndarray]  # [..., 4] -> [..., 4]


XYXY = BoxFormat("xyxy (left, top, right, bottom)", lambda boxes: boxes)
XYWH = BoxFormat("xywh (left, top, width, height)", xywh_to_xyxy)
CXCYWH = BoxFormat("cxcywh (center x, center y, width, height)", cxcywh_to_xyxy)
VOC = BoxFormat("VOC xyxy (left, top, right, bottom, counted from 1)", voc_to_xyxy)


@dataclass
class Annotations:
    """I images and their A boxes; rows that cannot be used are left out and reported as issues."""

    image_root: Path = Path()
    names: list[str] = field(default_factory=list)
    """Classes in the order of their labels, then phrases that refer to single images."""
    num_classes: int = 0
    category_ids: Sequence[Any] = ()
    """Ids that the files, and files of results, have for the classes."""
    ids: Sequence[str] = ()  # I
    files: Sequence[str] = ()  # I, below image_root
    locations: Sequence[str] = ()
    """Where each of the I images is described: "image 17", "line 3"."""
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """[I, 2] (height, width) in pixels as written; 0 where missing."""
    image_indices: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [A]
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    """[A, 4] float64 as written, in `box_format`."""
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [A] indices into `names`
    locate: Callable[[int], str] = str
    """Box index -> where the box is described: "annotation 25"."""
    crowd: np.ndarray | None = None  # [A] bool, see Sample.crowd
    areas: np.ndarray | None = None  # [A] float64, see Sample.areas
    box_format: BoxFormat = XYXY
    relative: bool = False
    """Boxes are in 0..1 of the image after its EXIF orientation is applied, not in pixels."""

    @cached_property
    def xyxy(self) -> np.ndarray:
        """[A, 4] float64 (left, top, right, bottom), in pixels or, if `relative`, in 0..1."""
        return self.box_format.to_xyxy(self.boxes)

    def describe(self, index: int) -> str:
        """ "annotation 25 (a.jpg, cat): [1, 2, 3, 4]": location, image, name and content of a box."""
        values = ", ".join(f"{value:g}" for value in self.boxes[index].tolist())
        file, name = self.files[self.image_indices[index]], self.names[self.labels[index]]
        return f"{self.locate(index)} ({file}, {name}): [{values}]"

    def report_inverted(self, issues: Issues) -> np.ndarray:
        """Report boxes with a negative side; return [A] bool, which boxes these are."""
        boxes = self.xyxy
        inverted = (boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1])
        what, fix = "inverted boxes (x2 < x1 or y2 < y1)", f"boxes are {self.box_format.description}; correct them"
        issues.add_rows("error", what, fix, inverted, self.describe, self.image_indices)
        return inverted


@runtime_checkable
class ReadsAnnotations(Protocol):
    """Settings of a dataset that can read all annotations without stopping at the first error."""

    def read(self, issues: Issues) -> Annotations:
        """Parse the files.

        Raises:
            DataError: from the file system or `issues`; nothing can be read.
        """
        ...


def to_float(value: Any) -> float:
    """The value as a float; NaN if it is not a finite number of reasonable size."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) < MAX_COORDINATE else math.nan


def to_boxes(values: Sequence[Any]) -> np.ndarray:
    """[A, 4] float64; NaN in the rows whose value is not a list of four finite numbers."""
    try:
        is_regular = {*map(type, values)} <= {list} and {*map(len, values)} <= {4}
        flat = np.fromiter(chain.from_iterable(values), np.float64) if is_regular else None
    except (TypeError, ValueError, OverflowError):
        flat = None
    if flat is None:  # slow, so only if there is an invalid box
        rows = [value if isinstance(value, list) and len(value) == 4 else [None] * 4 for value in values]
        flat = np.array([to_float(value) for row in rows for value in row], np.float64)
    boxes = flat.reshape(-1, 4)
    valid = np.abs(boxes) < MAX_COORDINATE
    if not valid.all():
        boxes[~valid.all(axis=1)] = np.nan
    return boxes


def to_size(height: Any, width: Any) -> tuple[int, int]:
    """(height, width) in pixels; 0 for a missing value, -1 for one that is not a possible size."""
    if type(height) is type(width) is int and 0 < height < 1e9 and 0 < width < 1e9:
        return height, width
    sides = [to_float(side or 0) for side in (height, width)]
    rows, columns = (int(side) if 0 <= side < 1e9 else -1 for side in sides)
    return rows, columns

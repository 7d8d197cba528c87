"""Annotations as the files of a dataset have them, in any file format and box format."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from vg.data.detection.issues import NUM_EXAMPLES, Issues, Severity
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.source import OVERHANG
from vg.types import Caption

MIN_SIDE = 1.0  # pixels: published training leaves out boxes with a shorter side; the default except for COCO json
MAX_LOST = 0.05  # fraction of the boxes of a dataset that may be left out; more mean that something else is wrong
MAX_COORDINATE = 1e15  # larger values are treated as not finite, because boxes are float32 later


class BoxFormat(NamedTuple):
    """What the four numbers of a box mean."""

    description: str
    to_xyxy: Callable[[np.ndarray], np.ndarray]  # [A, 4] -> [A, 4]; vg.boxes is for tensors


XYXY = BoxFormat("xyxy (left, top, right, bottom)", lambda b: b)
XYWH = BoxFormat("xywh (left, top, width, height)", lambda b: np.hstack([b[:, :2], b[:, :2] + b[:, 2:]]))
CXCYWH = BoxFormat(
    "cxcywh (center x, center y, width, height)",
    lambda b: np.hstack([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2]),
)
VOC = BoxFormat("VOC xyxy (left, top, right, bottom, counted from 1)", lambda b: b - np.array([1, 1, 0, 0]))


class AnnotatedBox(NamedTuple):
    label: int  # index into Annotations.names
    values: Sequence[float]  # four, as written
    location: str  # "annotation 25"
    crowd: bool = False  # see Sample.crowd


class AnnotatedImage(NamedTuple):
    id: str
    file: str  # below the image root
    location: str  # where the image is described: "image 17", "line 3"
    size: tuple[int, int]  # (height, width) in pixels as written; 0 where missing
    boxes: list[AnnotatedBox]
    caption: Caption | None = None  # see Sample.caption


@dataclass
class Annotations:
    """Columns of I images and their A boxes; rows that cannot be used are left out and reported as issues."""

    image_root: Path = Path()
    names: list[str] = field(default_factory=list)  # classes by label, then phrases that refer to single images
    category_ids: Sequence[Any] = ()  # ids of the classes in the files, and in files of results
    ids: Sequence[str] = ()  # I
    files: Sequence[str] = ()  # I
    locations: Sequence[str] = ()  # I
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # [I, 2]
    captions: Sequence[str | None] = ()  # I, or empty; see Sample.caption
    image_indices: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [A]
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # [A, 4] float64 as written, in `box_format`
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [A] indices into `names`
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # [A]
    areas: np.ndarray | None = None  # [A] float64, see Sample.areas
    # Of federated data (LVIS), [J, 3] int: image, label and Coverage of the classes that annotators searched for in an
    # image; others are UNKNOWN there. None: every image has all objects of all classes.
    coverage: np.ndarray | None = None
    frequencies: Sequence[str] = ()  # by label: "r", "c" or "f", see vg.metrics.federated; or empty
    segmentations: Sequence[Any] = ()  # A, as written: polygons, a run-length encoding or None; or empty
    locate: Callable[[int], str] = str  # box index -> where the box is described
    box_format: BoxFormat = XYXY
    relative: bool = False  # boxes are in 0..1 of the image, not in pixels
    upright: bool | None = None  # they refer to the image with its EXIF orientation applied, see `read_image`

    @classmethod
    def of(cls, images: Sequence[AnnotatedImage], names: list[str], num_classes: int, **fields: Any) -> Annotations:
        """Make columns of images and their boxes; `fields` are the remaining fields."""
        boxes = [box for image in images for box in image.boxes]
        return cls(
            names=names,
            category_ids=range(num_classes),
            ids=[image.id for image in images],
            files=[image.file for image in images],
            locations=[image.location for image in images],
            sizes=np.array([image.size for image in images], np.int64).reshape(-1, 2),
            captions=[image.caption and image.caption.text for image in images],
            image_indices=np.repeat(np.arange(len(images)), [len(image.boxes) for image in images]),
            boxes=np.array([box.values for box in boxes], np.float64).reshape(-1, 4),
            labels=np.array([box.label for box in boxes], np.int64),
            crowd=np.array([box.crowd for box in boxes], bool),
            locate=lambda index: boxes[index].location,
            **fields,
        )

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    @cached_property
    def xyxy(self) -> np.ndarray:
        """[A, 4] float64 (left, top, right, bottom), in pixels or, if `relative`, in 0..1."""
        return self.box_format.to_xyxy(self.boxes)

    def describe(self, index: int) -> str:
        """ "annotation 25 (a.jpg, cat): [1, 2, 3, 4]": location, image, name and content of a box."""
        values = ", ".join(f"{value:g}" for value in self.boxes[index].tolist())
        file, name = self.files[self.image_indices[index]], self.names[self.labels[index]]
        return f"{self.locate(index)} ({file}, {name}): [{values}]"

    def report(self, issues: Issues, severity: Severity, what: str, fix: str, affected: np.ndarray) -> None:
        """Add a problem of the boxes where `affected`, [A] bool."""
        rows = np.flatnonzero(affected)
        first = rows[:NUM_EXAMPLES]
        examples, images = map(self.describe, first.tolist()), self.image_indices[first].tolist()
        issues.add(severity, what, fix, examples, images, len(rows))

    def report_inverted(self, issues: Issues) -> np.ndarray:
        """Report boxes with a negative side; return [A] bool, which boxes these are."""
        inverted = np.asarray((self.xyxy[:, 2:] < self.xyxy[:, :2]).any(axis=1))
        fix = f"boxes are {self.box_format.description}; correct them"
        self.report(issues, "error", "inverted boxes (x2 < x1 or y2 < y1)", fix, inverted)
        return inverted

    def report_relative(self, issues: Issues) -> bool:
        """Report boxes in 0..1 of the image where pixels are expected; return whether nearly all boxes are."""
        positive = (self.boxes[:, 2:] > 0).all(axis=1)
        relative = np.asarray((np.abs(self.boxes - 0.5) < 0.6).all(axis=1) & positive)  # [A]
        if self.relative or not len(relative) or relative.mean() < 1 - MAX_LOST:
            return False
        fix = "multiply x and width by the width of the image in pixels, y and height by its height"
        self.report(issues, "error", "boxes in 0..1 of the image instead of pixels", fix, relative)
        return True

    def report_thousandths(self, issues: Issues, limits: np.ndarray) -> bool:
        """Report boxes in 0..1000, as vision-language models write them; return whether nearly all boxes are.

        Args:
            limits: [A, 2] (width, height) of the image of each box; 0 if unknown.
        """
        known = (limits > 0).all(axis=1)  # [A]
        # A coordinate as written: boxes that are xyxy in place of xywh have none beyond their image.
        beyond = np.asarray((self.boxes > limits[:, [0, 1, 0, 1]] + OVERHANG).any(axis=1) & known)
        in_range = ((self.boxes >= 0) & (self.boxes <= 1000)).all(axis=1)
        if known.sum() < 10 or beyond.sum() < 2 * MAX_LOST * known.sum() or in_range.mean() < 1 - MAX_LOST:
            return False
        if self.boxes[in_range].max() < 900:  # pixels of a larger image, for example
            return False
        fix = "they look normalized: multiply x and width by the width of the image / 1000, y and height by its height"
        self.report(issues, "error", "boxes in 0..1000 instead of pixels, many beyond their image", fix, beyond)
        return True

    def report_lost(self, issues: Issues, min_side: float = MIN_SIDE) -> None:
        """Report boxes in other units, or more boxes than MAX_LOST that loading leaves out (see DetectionSource)."""
        limits = self.sizes[self.image_indices][:, ::-1]  # [A, 2]
        if self.report_relative(issues) or (not self.relative and self.report_thousandths(issues, limits)):
            return
        sizes = np.where(self.sizes > 0, self.sizes, 1 if self.relative else np.inf)  # [I, 2]
        visible = np.clip(self.xyxy, 0, sizes[self.image_indices][:, [1, 0, 1, 0]])  # [A, 4]
        sides = self.xyxy[:, 2:] - self.xyxy[:, :2]  # [A, 2]
        thin = (sides < (0 if self.relative else min_side)).any(axis=1)
        outside = (visible[:, 2:] <= visible[:, :2]).any(axis=1)
        lost = np.asarray((thin | outside) & (sides >= 0).all(axis=1))  # inverted boxes are an error of their own
        if lost.sum() > max(3, MAX_LOST * len(lost)) or (len(lost) and lost.all()):
            side = f"with a side below {min_side:g} pixel" if min_side and not self.relative else "without area"
            fix = f"that is too many of {len(lost)} boxes; check format and unit: {self.box_format.description}"
            self.report(issues, "error", f"boxes that are left out, {side} or outside of their image", fix, lost)


@runtime_checkable
class ReadsAnnotations(Protocol):
    """Settings of a dataset that can read all annotations without stopping at the first error."""

    path: str
    vocabulary: VocabularyConfig

    def read(self, issues: Issues) -> Annotations: ...


@contextmanager
def without_gc() -> Iterator[None]:
    """Pause the garbage collector, which scans millions of new objects again and again: up to half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def to_float(value: Any) -> float:
    """The value as a float; NaN if it is not a finite number of reasonable size."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) < MAX_COORDINATE else math.nan


def to_box(value: Any) -> list[float] | None:
    """The value as four floats; None if it is not a list of four finite numbers."""
    box = [to_float(side) for side in value] if isinstance(value, list) and len(value) == 4 else [math.nan]
    return None if any(map(math.isnan, box)) else box


def to_boxes(values: Sequence[Any]) -> np.ndarray:
    """[A, 4] float64; NaN in the rows whose value is not a list of four finite numbers."""
    try:
        if {*map(type, values)} <= {list} and {*map(len, values)} <= {4}:
            boxes = np.fromiter(chain.from_iterable(values), np.float64).reshape(-1, 4)
            if (np.abs(boxes) < MAX_COORDINATE).all():
                return boxes
    except (TypeError, ValueError, OverflowError):
        pass
    return np.array([to_box(value) or [math.nan] * 4 for value in values], np.float64).reshape(-1, 4)  # slow


def to_size(height: Any, width: Any) -> tuple[int, int]:
    """(height, width) in pixels; 0 for a missing value, -1 for one that is not a possible size."""
    if type(height) is type(width) is int and 0 < height < 1e9 and 0 < width < 1e9:
        return height, width
    sides = [to_float(side or 0) for side in (height, width)]
    rows, columns = (int(side) if 0 <= side < 1e9 else -1 for side in sides)
    return rows, columns

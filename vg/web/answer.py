"""The boxes of one image: those of the model, corrected by hand, and those that are shown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from vg.errors import DataError
from vg.inference.formats import SUFFIXES, Format, write_results
from vg.inference.result import Result
from vg.nms import box_iou, nms
from vg.web.phrases import checked_label

PREVIEW = (800, 1280)  # least and most pixels of its longest side: small images need room for labels
NUM_SHOWN = 100  # best boxes; more would hide the image
BY_HAND = 1.0  # score of boxes that were drawn or changed by hand
HEADERS = ["phrase", "score", "left", "top", "right", "bottom"]


@dataclass(frozen=True, eq=False)
class Answer:
    """All boxes of an image; selections and corrections need no other pass of the network.

    Boxes are in pixels of the original image, of which only a preview is kept. Boxes by hand are ground truth: the
    threshold and NMS apply to the boxes of the model only, among themselves.
    """

    result: Result  # its image is the preview
    size: tuple[int, int]  # (height, width) of the original image
    found: Result  # as predicted, without corrections
    num_by_hand: int = 0  # the first boxes of `result`

    @classmethod
    def of(cls, result: Result) -> Answer:
        image = Image.fromarray(result.image)
        longest = max(image.size)
        scale = min(max(longest, PREVIEW[0]), PREVIEW[1]) / longest
        if scale != 1:
            size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        preview = replace(result, image=np.array(image))
        return cls(preview, result.size, preview)

    def original(self) -> Answer:
        """Return the answer without corrections."""
        return replace(self, result=self.found, num_by_hand=0)

    def indices(self, threshold: float, iou: float) -> np.ndarray:
        """Return the indices of all boxes by hand and of those that reach `threshold` and pass NMS, best first.

        Raises:
            DataError: a request that is not from the page has other values than numbers.
        """
        if not all(isinstance(value, (int, float)) for value in (threshold, iou)):
            raise DataError("threshold and IoU must be numbers")
        by_hand, predicted = np.split(np.arange(len(self.result)), [self.num_by_hand])
        predicted = predicted[self.result.scores[predicted] >= threshold]
        part = self.result.select(predicted)
        return np.concatenate([by_hand, predicted[nms(part.boxes, part.scores, iou, part.phrase_ids)]])

    def shown(self, threshold: float, iou: float) -> Shown:
        """Return the best boxes of a selection."""
        indices = self.indices(threshold, iou)
        return Shown(self.result.select(indices[:NUM_SHOWN]), self.size, len(indices))

    def with_table(self, rows: Sequence[Sequence[Any]], threshold: float, iou: float) -> Answer:
        """Replace the boxes of a selection by rows of HEADERS; boxes below the threshold stay.

        A predicted box that is changed or removed takes along those that NMS dropped in its favor: they are the same
        object. A row that differs from those of the selection is a box by hand, with the score BY_HAND. An empty row
        becomes a box in the center, to be moved.

        Raises:
            DataError: a phrase or side is missing, a box is inverted or outside the image, or there are too many.
        """
        indices = self.indices(threshold, iou)[:NUM_SHOWN]
        table = self.shown(threshold, iou).table()
        unchanged: dict[tuple[str, ...], list[int]] = {}  # two boxes may have equal rows
        for shown, index in zip(table, indices.tolist(), strict=True):
            unchanged.setdefault(_key(shown), []).append(index)
        kept, added = [], []
        for number, row in enumerate(rows, start=1):
            if same := unchanged.get(_key(row)):
                kept.append(same.pop(0))
            elif any(str(value).strip() for value in row if value is not None):
                added.append(self._checked(row, number))
            else:
                added.append(self._centered())
        hidden = np.setdiff1d(np.arange(len(self.result)), indices)
        for index in np.setdiff1d(indices[self.num_by_hand :], kept):
            overlaps = box_iou(self.result.boxes[index], self.result.boxes[hidden]) > iou
            same_phrase = self.result.phrase_ids[hidden] == self.result.phrase_ids[index]
            hidden = hidden[~(overlaps & same_phrase & (self.result.scores[hidden] >= threshold))]
        return self._with_boxes(np.sort([*hidden, *kept]).astype(np.int64), added)

    def with_box(self, phrase: str, corners: Sequence[tuple[float, float]]) -> Answer:
        """Add a box by hand between two opposite corners in pixels of the preview.

        Raises:
            DataError: the corners are not opposite, the phrase is unusable, or there are too many boxes by hand.
        """
        sides = np.sort(np.array(corners, float), axis=0) / _scale(self.result, self.size)
        if (sides[0] == sides[1]).any():
            raise DataError("the corners are on one line; click on two opposite ones")
        row = [phrase, BY_HAND, *sides.flatten().tolist()]
        return self._with_boxes(np.arange(len(self.result)), [self._checked(row, len(self.result) + 1)])

    def _centered(self) -> tuple[str, list[float]]:
        height, width = self.size
        return self.result.phrases[0], [round(x, 1) for x in (width / 3, height / 3, 2 * width / 3, 2 * height / 3)]

    def _checked(self, row: Sequence[Any], number: int) -> tuple[str, list[float]]:
        """Return the phrase and the sides of a row, clipped to the image; raises DataError that names the row."""
        if len(row) != len(HEADERS):
            raise DataError(f"the table needs the columns {', '.join(HEADERS)}; neither add nor delete columns")
        try:
            phrase = checked_label(str(row[0] or ""))
            sides = [float(side) for side in row[2:6]]
        except (ValueError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"row {number}: left, top, right and bottom must be numbers of pixels") from error
        height, width = self.size
        if not phrase:
            raise DataError(f"row {number} has no phrase")
        if not all(map(math.isfinite, sides)):
            raise DataError(f"row {number}: left, top, right and bottom must be numbers of pixels")
        left, top, right, bottom = np.clip(sides, 0, (width, height, width, height)).tolist()
        if left >= right or top >= bottom:
            raise DataError(
                f"row {number}: left must be less than right, top less than bottom, within the image of "
                f"{width} x {height} pixels"
            )
        return phrase, [left, top, right, bottom]

    def _with_boxes(self, kept: np.ndarray, added: Sequence[tuple[str, list[float]]]) -> Answer:
        """Return the answer with the boxes `added` by hand, then `kept`, whose indices are sorted."""
        num_by_hand = len(added) + int((kept < self.num_by_hand).sum())
        if num_by_hand > NUM_SHOWN:
            raise DataError(f"at most {NUM_SHOWN} boxes by hand; more would not be shown")
        part = self.result.select(kept)
        phrases = tuple(dict.fromkeys((*part.phrases, *(phrase for phrase, _ in added))))
        number = {phrase: index for index, phrase in enumerate(phrases)}
        boxes = np.concatenate([np.array([box for _, box in added], np.float32).reshape(-1, 4), part.boxes])
        scores = np.concatenate([np.full(len(added), BY_HAND, np.float32), part.scores])
        phrase_ids = np.concatenate([np.array([number[phrase] for phrase, _ in added], np.int64), part.phrase_ids])
        corrected = Result(part.name, part.image, phrases, boxes, scores, phrase_ids)
        return replace(self, result=corrected, num_by_hand=num_by_hand)


@dataclass(frozen=True, eq=False)
class Shown:
    """The boxes that are drawn, listed and downloaded."""

    result: Result  # in pixels of the original image; its image is the preview
    size: tuple[int, int]  # (height, width) of the original image
    num_selected: int  # boxes before the limit of NUM_SHOWN

    def on_preview(self) -> Result:
        """Return the boxes in pixels of the preview, to be drawn and cropped."""
        return replace(self.result, boxes=self.result.boxes * np.tile(_scale(self.result, self.size), 2))

    def table(self) -> list[list[Any]]:
        """Return a row of HEADERS per box."""
        return [[phrase, round(score, 2), *(round(side, 1) for side in box)] for phrase, score, box in self.result]

    def text(self, format: Format) -> tuple[str, str]:
        """Return name and content of a file in a format; jsonl is one record, so plain JSON."""
        height, width = self.size
        record = self.result.to_dict() | {"height": height, "width": width}
        stem = Path(self.result.name).stem or "image"
        if format == "jsonl":
            return f"{stem}.json", json.dumps(record, ensure_ascii=False, indent=1)
        with TemporaryDirectory() as folder:
            path = Path(folder, "results")
            write_results([record], path, format)
            return stem + SUFFIXES[format], path.read_text(encoding="utf-8")


def _scale(result: Result, size: tuple[int, int]) -> np.ndarray:
    """Pixels of the preview per pixel of the original image -> [2], x and y."""
    return np.array(result.size[::-1], float) / size[::-1]


def _key(row: Sequence[Any]) -> tuple[str, ...]:
    """A row without its score, as text: the page returns 10 for 10.0."""
    values = [row[0], *row[2:]]
    return tuple(f"{value:.1f}" if isinstance(value, (int, float)) else str(value) for value in values)

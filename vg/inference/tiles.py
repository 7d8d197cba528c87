"""Large images in overlapping tiles, beside the whole image, and their boxes merged without duplicates at the seams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vg.inference.result import Boxes
from vg.nms import nms

TOUCH = 0.01  # of the side of a tile: a box that comes so close to a seam is cut by it
COVERED = 0.7  # of a cut box: if a whole box of its phrase covers as much, it is a part of that object
MERGE_IOU = 0.5  # boxes of one phrase that overlap more are the same object
LEAST = 0.02  # score; there may be thousands of boxes with less


class Window(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    right: int
    bottom: int


def windows(height: int, width: int, tile: int, overlap: float) -> list[Window]:
    """Cover an image with square tiles of equal distances; the whole image comes first.

    Args:
        tile: side in pixels; an image that is not larger is not cut.
        overlap: least fraction of a tile that its neighbors share with it, 0..0.9.
    """
    starts = [_starts(length, tile, overlap) for length in (height, width)]
    whole = Window(0, 0, width, height)
    tiles = [Window(x, y, min(x + tile, width), min(y + tile, height)) for y in starts[0] for x in starts[1]]
    return [whole, *(tiles if len(tiles) > 1 else [])]


def predict_tiled(
    predict: Callable[[list[np.ndarray]], list[Boxes]], image: np.ndarray, tile: int, overlap: float, batch_size: int
) -> Boxes:
    """Predict for an image [H, W, 3] and its tiles, `batch_size` of them at a time, and merge their boxes.

    The boxes of an image that is not larger than a tile are those of the model.
    """
    height, width = image.shape[:2]
    parts = windows(height, width, tile, overlap)
    found: list[Boxes] = []
    for start in range(0, len(parts), batch_size):
        found += predict([image[y:bottom, x:right] for x, y, right, bottom in parts[start : start + batch_size]])
    if len(found) == 1:
        return found[0]
    return merge(
        [(part, boxes.above(LEAST)) for part, boxes in zip(parts, found, strict=True)], (height, width), tile, overlap
    )


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    if length <= tile:
        return [0]
    steps = math.ceil((length - tile) / (tile * (1 - overlap)))
    return [round(i * (length - tile) / steps) for i in range(steps + 1)]


def merge(parts: Sequence[tuple[Window, Boxes]], size: tuple[int, int], tile: int, overlap: float) -> Boxes:
    """Join the boxes of the windows of an image of `size` (height, width), best first.

    A box that a seam cuts is left out if it is smaller than the overlap, because a neighbor then has all of it, or if
    it is a part of a box that is not cut.
    """
    shifted = [found.boxes + np.array([window.left, window.top] * 2, np.float32) for window, found in parts]
    boxes = np.concatenate(shifted)
    scores = np.concatenate([found.scores for _, found in parts])
    phrase_ids = np.concatenate([found.phrase_ids for _, found in parts])
    cut = np.concatenate([_cut(window, moved, size, tile) for (window, _), moved in zip(parts, shifted, strict=True)])
    is_cut = np.asarray(cut.any(axis=1))
    elsewhere = ((boxes[:, 2:] - boxes[:, :2] < tile * overlap) | ~cut).all(axis=1)  # all of it is in another tile
    kept = ~(is_cut & elsewhere) & ~_covered(boxes, phrase_ids, is_cut)
    boxes, scores, phrase_ids = boxes[kept], scores[kept], phrase_ids[kept]
    best = nms(boxes, scores, MERGE_IOU, phrase_ids)
    return Boxes(boxes[best], scores[best], phrase_ids[best])


def _cut(window: Window, boxes: np.ndarray, size: tuple[int, int], tile: int) -> np.ndarray:
    """Return whether a seam cuts each box along x and along y: [N, 2]; the borders of the image are no seams."""
    margin = tile * TOUCH
    low = (boxes[:, :2] < np.array([window.left, window.top]) + margin) & (np.array([window.left, window.top]) > 0)
    ends = np.array([window.right, window.bottom])
    high = (boxes[:, 2:] > ends - margin) & (ends < np.array(size[::-1]))
    return np.asarray(low | high)


def _covered(boxes: np.ndarray, phrase_ids: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Return which cut boxes lie for the most part in a box of the same phrase that is not cut: [N] bool."""
    covered = np.zeros(len(boxes), bool)
    for index in np.flatnonzero(cut):
        whole = boxes[~cut & (phrase_ids == phrase_ids[index])]
        shared = np.minimum(boxes[index, 2:], whole[:, 2:]) - np.maximum(boxes[index, :2], whole[:, :2])
        area = np.prod(boxes[index, 2:] - boxes[index, :2])
        covered[index] = bool((shared.clip(min=0).prod(axis=1) > COVERED * area).any())
    return covered

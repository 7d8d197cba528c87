"""The door to pycocotools: boxes in, precision and recall out."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
ANY_SIZE = (0.0, 1e10)  # square pixels
UNDEFINED = -1.0  # what pycocotools says where there is no box to find


class Boxes(NamedTuple):
    """N boxes of several images."""

    images: np.ndarray  # [N] int, the number of the image
    categories: np.ndarray  # [N] int
    boxes: np.ndarray  # [N, 4] xyxy pixels


class Curves(NamedTuple):
    """What pycocotools accumulates; `UNDEFINED` where there is no box of that category and size to find.

    T IoU thresholds, 101 recalls, C categories, A ranges of sizes, M limits of the number of boxes.
    """

    precision: np.ndarray  # [T, 101, C, A, M]
    recall: np.ndarray  # [T, C, A, M] the highest one reached


def precision_and_recall(
    num_images: int,
    num_categories: int,
    truth: Boxes,
    found: Boxes,
    scores: np.ndarray,
    *,
    iou_thresholds: Sequence[float] | np.ndarray = IOU_THRESHOLDS,
    sizes: Sequence[tuple[float, float]] = (ANY_SIZE,),
    max_boxes: Sequence[int] = (100,),
    areas: np.ndarray | None = None,
    crowd: np.ndarray | None = None,
) -> Curves:
    """Match boxes as COCO does: by falling score, each true box at most once, images and categories numbered from 0.

    Boxes of equal score come in the order of their images, and within an image in the order given.

    Args:
        truth: N boxes to find.
        found: K predicted boxes.
        scores: [K].
        iou_thresholds: T, from which a predicted box counts as found.
        sizes: A ranges of the area of a true box in square pixels.
        max_boxes: M limits of the number of predicted boxes of one image and category, the best ones, ascending.
        areas: [N] square pixels, what `sizes` is about; by default those of the boxes.
        crowd: [N] bool, regions of many things: what is found inside one counts neither for nor against.
    """
    areas = _areas(truth.boxes) if areas is None else areas
    crowd = np.zeros(len(areas), dtype=bool) if crowd is None else crowd
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(
            _coco(num_images, num_categories, truth, area=areas, iscrowd=crowd.astype(int)),
            _coco(num_images, num_categories, found, area=_areas(found.boxes), score=scores),
            "bbox",
        )
        evaluation.params.iouThrs = np.asarray(iou_thresholds)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = (
            [list(size) for size in sizes],
            [str(s) for s in sizes],
        )
        evaluation.params.maxDets = list(max_boxes)
        evaluation.evaluate()
        evaluation.accumulate()
    return Curves(evaluation.eval["precision"], evaluation.eval["recall"])


def mean_defined(values: np.ndarray) -> float:
    """Mean over all values but the undefined ones; `UNDEFINED` if there are no others."""
    values = values[values > UNDEFINED]
    return float(values.mean()) if values.size else UNDEFINED


def to_xywh(boxes: np.ndarray) -> np.ndarray:
    """[N, 4] xyxy -> [N, 4] (left, top, width, height), as COCO spells boxes, to a thousandth of a pixel.

    That undoes the rounding of float32: boxes are published with two decimals, and an IoU may be a threshold exactly.
    """
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1).round(3)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _coco(num_images: int, num_categories: int, boxes: Boxes, **columns: np.ndarray) -> COCO:
    """Boxes in the data structure of pycocotools, whose own `loadRes` fails where nothing was predicted."""
    fields = {"image_id": boxes.images, "category_id": boxes.categories, "bbox": to_xywh(boxes.boxes), **columns}
    rows = zip(*(column.tolist() for column in fields.values()), strict=True)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(num_images)],
        "categories": [{"id": category} for category in range(num_categories)],
        # ids from 1: pycocotools takes a match with the object of id 0 for none
        "annotations": [{"id": number} | dict(zip(fields, row, strict=True)) for number, row in enumerate(rows, 1)],
    }
    coco.createIndex()
    return coco

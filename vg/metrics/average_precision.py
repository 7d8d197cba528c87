"""Thin wrapper around pycocotools: boxes in, precision and recall out."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
ANY_AREA = (0.0, 1e10)  # square pixels
UNDEFINED = -1.0  # value of pycocotools for metrics without a ground-truth box


class Boxes(NamedTuple):
    """N boxes of several images."""

    images: np.ndarray  # [N] int, image index
    categories: np.ndarray  # [N] int, category index
    boxes: np.ndarray  # [N, 4] xyxy pixels


class Curves(NamedTuple):
    """Precision and recall of pycocotools; `UNDEFINED` for a category and size without a ground-truth box.

    T IoU thresholds, 101 recall levels, C categories, A area ranges, M limits of boxes per image.
    """

    precision: np.ndarray  # [T, 101, C, A, M]
    recall: np.ndarray  # [T, C, A, M] maximum


def precision_and_recall(
    num_images: int,
    num_categories: int,
    truth: Boxes,
    predicted: Boxes,
    scores: np.ndarray,
    *,
    iou_thresholds: Sequence[float] | np.ndarray = IOU_THRESHOLDS,
    area_ranges: Sequence[tuple[float, float]] = (ANY_AREA,),
    max_boxes: Sequence[int] = (100,),
    areas: np.ndarray | None = None,
    crowd: np.ndarray | None = None,
) -> Curves:
    """Match boxes as COCO does: in order of descending score, each ground-truth box at most once.

    Boxes with equal scores are matched in the order of their images, and within an image in the given order.

    Args:
        truth: N ground-truth boxes.
        predicted: K predicted boxes.
        scores: [K].
        iou_thresholds: T, minimum IoU of a match.
        area_ranges: A ranges of the area of a ground-truth object in square pixels.
        max_boxes: M limits of predicted boxes per image and category, ascending; the highest scores are kept.
        areas: [N] areas of the objects in square pixels, for `area_ranges`; by default the areas of the boxes.
        crowd: [N] bool, crowd regions (COCO `iscrowd`): predictions inside one are ignored.
    """
    areas = _areas(truth.boxes) if areas is None else areas
    crowd = np.zeros(len(areas), dtype=bool) if crowd is None else crowd
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(
            _coco(num_images, num_categories, truth, area=areas, iscrowd=crowd.astype(int)),
            _coco(num_images, num_categories, predicted, area=_areas(predicted.boxes), score=scores),
            "bbox",
        )
        evaluation.params.iouThrs = np.asarray(iou_thresholds)
        evaluation.params.areaRng = [list(limits) for limits in area_ranges]
        evaluation.params.areaRngLbl = [str(limits) for limits in area_ranges]
        evaluation.params.maxDets = list(max_boxes)
        evaluation.evaluate()
        evaluation.accumulate()
    return Curves(evaluation.eval["precision"], evaluation.eval["recall"])


def mean_defined(values: np.ndarray) -> float:
    """Return the mean of the defined values, or `UNDEFINED` without any."""
    values = values[values > UNDEFINED]
    return float(values.mean()) if values.size else UNDEFINED


def to_xywh(boxes: np.ndarray) -> np.ndarray:
    """Convert [N, 4] xyxy to [N, 4] xywh, the box format of COCO, rounded to a thousandth of a pixel.

    This undoes the rounding of float32: annotations have two decimals, and an IoU may equal a threshold exactly.
    """
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1).round(3)


def _areas(boxes: np.ndarray) -> np.ndarray:
    """[N, 4] xyxy -> [N]; zero for inverted boxes, because pycocotools ignores boxes of negative area."""
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1)


def _coco(num_images: int, num_categories: int, boxes: Boxes, **columns: np.ndarray) -> COCO:
    """Return boxes as a COCO object; pycocotools' own `loadRes` fails without predictions."""
    fields = {"image_id": boxes.images, "category_id": boxes.categories, "bbox": to_xywh(boxes.boxes), **columns}
    rows = zip(*(column.tolist() for column in fields.values()), strict=True)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(num_images)],
        "categories": [{"id": category} for category in range(num_categories)],
        # ids from 1: pycocotools treats a match with the object of id 0 as unmatched
        "annotations": [{"id": id} | dict(zip(fields, row, strict=True)) for id, row in enumerate(rows, 1)],
    }
    coco.createIndex()
    return coco

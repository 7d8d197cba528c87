"""Thin wrapper around pycocotools: boxes in, precision and recall out."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vg.metrics.result import UNDEFINED

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_LEVELS = np.linspace(0, 1, 101)
ANY_AREA = (0.0, 1e10)  # square pixels


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
    shape = (num_categories, len(area_ranges), len(max_boxes))
    precision = np.full((len(iou_thresholds), len(RECALL_LEVELS), *shape), UNDEFINED)
    recall = np.full((len(iou_thresholds), *shape), UNDEFINED)
    # pycocotools has a Python object for every box and every pair of image and category: one category at a time, and
    # only the images with boxes of it, need a fraction of the memory.
    rows_of = zip(*(_rows_by_category(boxes.categories, num_categories) for boxes in (truth, predicted)), strict=True)
    for category, (true, found) in enumerate(rows_of):
        image_ids, images = np.unique(
            np.concatenate((truth.images[true], predicted.images[found])), return_inverse=True
        )
        if not len(image_ids):
            continue
        # Limits above the number of boxes of every image have equal results.
        most = np.bincount(images[len(true) :], minlength=1).max()
        limits = list(max_boxes[: int(np.searchsorted(max_boxes, most)) + 1])
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            evaluation = COCOeval(
                _coco(images[: len(true)], truth.boxes[true], area=areas[true], iscrowd=crowd[true].astype(int)),
                _coco(
                    images[len(true) :],
                    predicted.boxes[found],
                    area=_areas(predicted.boxes[found]),
                    score=scores[found],
                ),
                "bbox",
            )
            evaluation.params.iouThrs = np.asarray(iou_thresholds)
            evaluation.params.recThrs = RECALL_LEVELS
            evaluation.params.areaRng = [list(limits) for limits in area_ranges]
            evaluation.params.areaRngLbl = [str(limits) for limits in area_ranges]
            evaluation.params.maxDets = limits
            evaluation.params.imgIds = list(range(len(image_ids)))
            evaluation.evaluate()
            evaluation.accumulate()
        used = np.minimum(np.arange(len(max_boxes)), len(limits) - 1)  # [M]
        precision[:, :, category] = evaluation.eval["precision"][:, :, 0, :, used].transpose(1, 2, 3, 0)
        recall[:, category] = evaluation.eval["recall"][:, 0, :, used].transpose(1, 2, 0)
    return Curves(precision, recall)


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


def _rows_by_category(categories: np.ndarray, num_categories: int) -> list[np.ndarray]:
    """[N] category indices -> for each category the rows that have it, in ascending order."""
    order = np.argsort(categories, kind="stable")
    return np.split(order, np.searchsorted(categories[order], np.arange(1, num_categories)))


def _coco(images: np.ndarray, boxes: np.ndarray, **columns: np.ndarray) -> COCO:
    """Return boxes of one category as a COCO object; pycocotools' own `loadRes` fails without predictions.

    Args:
        images: [N] image of each box.
        boxes: [N, 4] xyxy pixels.
        columns: [N] each, further fields of the boxes.
    """
    fields = {"image_id": images, "bbox": to_xywh(boxes), **columns}
    rows = zip(*(column.tolist() for column in fields.values()), strict=True)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in np.unique(images).tolist()],
        "categories": [{"id": 0}],
        # ids from 1: pycocotools treats a match with the object of id 0 as unmatched
        "annotations": [
            {"id": id, "category_id": 0} | dict(zip(fields, row, strict=True)) for id, row in enumerate(rows, 1)
        ],
    }
    coco.createIndex()
    return coco

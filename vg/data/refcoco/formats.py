"""Converts published formats with several objects per row, or with reviews, to flat rows with xywh pixel boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vg.errors import DataError

NESTED = ("samples", "ref_list")  # all objects of an image: moondream/refcoco-m, jxu124/refcoco-benchmark
_MIN_IOU = 0.5  # median IoU of the boxes with the bounding boxes of their masks
_NUM_CHECKED = 200  # objects of a table whose masks are used to detect its box format


def flat_rows(images: Iterable[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """Convert rows of images (without pixels) to one row per object, whose `image_row` is the index of the original.

    These tables do not document whether boxes are xywh or xyxy, so the format is detected from the object masks.

    Raises:
        DataError: naming `where`, if a row is malformed or the boxes fit the masks in neither format.
    """
    try:
        objects = [
            _object(item, image, index)
            for index, image in enumerate(images)
            for item in _items(image["samples"] if "samples" in image else image["ref_list"])
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: a row does not have the structure its columns imply ({error!r})") from error
    box_format = _detect_box_format([row for row in objects if row["mask_box"] is not None][:_NUM_CHECKED], where)
    for row in objects:
        del row["mask_box"]
        row["bbox"] = _to_xywh(row["bbox"], box_format)
    return objects


def reviewed_rows(document: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Convert the reviewed RefCOCO (Chen et al. 2024, arXiv 2406.16866) to one row per expression, faulty or not.

    `quality` is 0 if the reviewer found that the expression fits several objects or none, or that the box is wrong.

    Raises:
        DataError: the document does not have this format.
    """
    try:
        images = {image["id"]: image for image in document["images"]}
        return [
            {
                "file_name": images[annotation["image_id"]]["file_name"],
                "ann_id": annotation.get("original_id", annotation["id"]),
                "category_id": annotation.get("category_id"),
                "bbox": annotation["bbox"],
                "sent": images[annotation["image_id"]]["caption"],
                "quality": annotation["caption_quality"],
            }
            for annotation in document["annotations"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where} has images and annotations but is not a reviewed RefCOCO ({error!r}); "
            "for a COCO detection dataset set name to coco"
        ) from error


def _items(cell: Any) -> list[dict[str, Any]]:
    """Return a list of structs, which old versions of datasets return as a struct of lists."""
    if isinstance(cell, Mapping):
        return [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]
    return list(cell)


def _object(item: Mapping[str, Any], image: Mapping[str, Any], index: int) -> dict[str, Any]:
    if "ref_info" in item:  # jxu124/refcoco-benchmark
        ref, ann = item["ref_info"], item["ann_info"]
        mask_box = _polygons_to_box(ann.get("segmentation"))
        sentences = [sentence["sent"] for sentence in _items(ref["sentences"])]
        name, key, category = image["image_info"]["file_name"], ref["ann_id"], ref.get("category_id")
    else:  # moondream/refcoco-m
        ann, sentences, key = item, list(item["sentences"]), item["id"]
        mask_box = _mask_to_box(item.get("mask"))
        name, category = image["file_name"], item.get("category")
    row = {"file_name": name, "ann_id": key, "bbox": list(ann["bbox"]), "sent": sentences, "image_row": index}
    return row | {"category_id": category, "mask_box": mask_box}


def _mask_to_box(mask: Mapping[str, Any] | None) -> np.ndarray | None:
    """Return the bounding box [4] (xywh) of a run-length encoded mask."""
    if not mask or not mask.get("counts"):
        return None
    from pycocotools import mask as masks

    return np.array(masks.toBbox({"size": list(mask["size"]), "counts": mask["counts"]}))


def _polygons_to_box(polygons: Sequence[Sequence[float]] | None) -> np.ndarray | None:
    """Return the bounding box [4] (xywh) of polygons, each a list x, y, x, y, ..."""
    if not polygons:
        return None
    points = np.concatenate([np.asarray(polygon, float).reshape(-1, 2) for polygon in polygons])  # [points, 2]
    return np.array([*points.min(axis=0), *np.ptp(points, axis=0)])


def _detect_box_format(objects: Sequence[Mapping[str, Any]], where: str) -> str:
    """Return the box format ("xywh" or "xyxy") that fits the masks best; without masks xywh, as in COCO."""
    if not objects:
        return "xywh"
    from pycocotools import mask as masks

    median_iou = {}
    mask_boxes = np.stack([row["mask_box"] for row in objects])  # [objects, 4] xywh
    for box_format in ("xywh", "xyxy"):
        boxes = np.array([_to_xywh(row["bbox"], box_format) for row in objects])
        median_iou[box_format] = np.median(np.diag(masks.iou(boxes, mask_boxes, [0] * len(objects))))
    best = max(median_iou, key=median_iou.__getitem__)
    if median_iou[best] < _MIN_IOU:
        raise DataError(
            f"{where}: the boxes fit the masks of their objects neither as x, y, width, height (median IoU "
            f"{median_iou['xywh']:.2f}) nor as left, top, right, bottom ({median_iou['xyxy']:.2f}); wrong units?"
        )
    return best


def _to_xywh(box: Sequence[float], box_format: str) -> list[float]:
    left, top, third, fourth = map(float, box)
    return [left, top, third, fourth] if box_format == "xywh" else [left, top, third - left, fourth - top]

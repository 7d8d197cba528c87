"""Published forms with several objects in a row, or faulty ones, made flat: boxes are xywh in pixels then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vg.errors import DataError

NESTED = ("samples", "ref_list")  # columns with all objects of a picture: moondream/refcoco-m, jxu124/refcoco-benchmark
_AGREEMENT = 0.5  # IoU of a box with the box around its own mask
_CHECKED = 200  # objects of a table whose masks tell how its boxes are meant


def flat_rows(pictures: Iterable[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """The objects of a table with one row per picture, each with `picture`, the number of that row.

    No publisher of such a table says whether its boxes are xywh or xyxy, so the outlines of the objects decide.

    Args:
        pictures: its rows without pixels.

    Raises:
        DataError: naming `where`, if a row is not of this form or the boxes contradict the outlines in any spelling.
    """
    try:
        objects = [
            _object(item, picture, number)
            for number, picture in enumerate(pictures)
            for item in _items(picture["samples"] if "samples" in picture else picture["ref_list"])
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: a row is not of the form that its columns announce ({error!r})") from error
    spelling = _spelling([row for row in objects if row["outline"] is not None][:_CHECKED], where)
    for row in objects:
        del row["outline"]
        row["bbox"] = _to_xywh(row["bbox"], spelling)
    return objects


def reviewed_rows(document: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The rows of a review of RefCOCO (Chen et al. 2024, arXiv 2406.16866), one per expression, faulty ones as well.

    `quality` is 0 where a person found the expression to fit several things or none, or the box to be wrong.

    Raises:
        DataError: the document is no such review.
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
            f"{where} has images and annotations, but is no reviewed RefCOCO ({error!r}); "
            "for detection boxes set name to coco"
        ) from error


def _items(cell: Any) -> list[dict[str, Any]]:
    """A list of structs, which older versions of datasets give as a struct of lists."""
    if isinstance(cell, Mapping):
        return [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]
    return list(cell)


def _object(item: Mapping[str, Any], picture: Mapping[str, Any], number: int) -> dict[str, Any]:
    if "ref_info" in item:  # jxu124/refcoco-benchmark
        about, box = item["ref_info"], item["ann_info"]
        outline = _around_polygons(box.get("segmentation"))
        sentences = [sentence["sent"] for sentence in _items(about["sentences"])]
        name, key, category = picture["image_info"]["file_name"], about["ann_id"], about.get("category_id")
    else:  # moondream/refcoco-m
        box, sentences, key = item, list(item["sentences"]), item["id"]
        outline = _around_mask(item.get("mask"))
        name, category = picture["file_name"], item.get("category")
    row = {"file_name": name, "ann_id": key, "bbox": list(box["bbox"]), "sent": sentences, "picture": number}
    return row | {"category_id": category, "outline": outline}


def _around_mask(mask: Mapping[str, Any] | None) -> np.ndarray | None:
    """[4] x, y, width, height of the box around a run-length coded mask."""
    if not mask or not mask.get("counts"):
        return None
    from pycocotools import mask as masks

    return np.array(masks.toBbox({"size": list(mask["size"]), "counts": mask["counts"]}))


def _around_polygons(polygons: Sequence[Sequence[float]] | None) -> np.ndarray | None:
    """The same for polygons, each a list x, y, x, y, ..."""
    if not polygons:
        return None
    points = np.concatenate([np.asarray(polygon, float).reshape(-1, 2) for polygon in polygons])  # [points, 2]
    return np.array([*points.min(axis=0), *np.ptp(points, axis=0)])


def _spelling(objects: Sequence[Mapping[str, Any]], where: str) -> str:
    """How the boxes must be meant for them to enclose the outlines; xywh, as COCO has it, where there are none."""
    if not objects:
        return "xywh"
    from pycocotools import mask as masks

    found = {}
    for spelling in ("xywh", "xyxy"):
        pairs = [(_to_xywh(row["bbox"], spelling), row["outline"]) for row in objects]
        found[spelling] = float(
            np.median([masks.iou(np.array([box]), np.array([outline]), [0])[0, 0] for box, outline in pairs])
        )
    best = max(found, key=found.__getitem__)
    if found[best] < _AGREEMENT:
        raise DataError(
            f"{where}: the boxes fit the outlines of their objects neither as x, y, width, height (median IoU "
            f"{found['xywh']:.2f}) nor as left, top, right, bottom ({found['xyxy']:.2f}); are they in other units?"
        )
    return best


def _to_xywh(box: Sequence[float], spelling: str) -> list[float]:
    left, top, third, fourth = map(float, box)
    return [left, top, third, fourth] if spelling == "xywh" else [left, top, third - left, fourth - top]

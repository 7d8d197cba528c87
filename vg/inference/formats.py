"""Files of results: COCO json, JSON lines, CSV, ODVG and Label Studio, all from the records of `Result.to_dict`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from vg.errors import DataError
from vg.files import replacing
from vg.inference.result import Result

Record: TypeAlias = Mapping[str, Any]
Format: TypeAlias = Literal["jsonl", "coco", "csv", "odvg", "label-studio"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[Format, str] = {  # of files that are named by their format
    "jsonl": ".jsonl",
    "coco": ".coco.json",
    "csv": ".csv",
    "odvg": ".odvg.jsonl",
    "label-studio": ".label-studio.json",
}
KEYS = ("image", "height", "width", "phrases", "boxes")  # of a record
COLUMNS = ("image", "phrase", "left", "top", "right", "bottom", "score", "height", "width")


def write_results(results: Result | Iterable[Result | Record], path: str | Path, format: Format) -> None:
    """Write a file atomically.

    Args:
        results: results, or records of `Result.to_dict`; read once, one at a time. A single one is written, too.
        format: "jsonl", a record per line; "coco", images, annotations (with score) and categories, one per phrase;
            "csv", a row per box, and one without a phrase for an image without boxes; "odvg", a line per image, whose
            caption are its phrases; "label-studio", tasks with pre-annotations.

    Raises:
        DataError: an unknown format, or something else than results and records.
        OSError: the file cannot be written.
    """
    if format not in FORMATS:
        raise DataError(f"unknown format {format!r}; use {', '.join(FORMATS)}")
    if isinstance(results, (Result, Mapping)) or not isinstance(results, Iterable):
        results = [results]  # the items of a Result are boxes
    records = map(_to_record, results)
    with replacing(Path(path), is_file=True) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        if format == "csv":
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(row for record in records for row in _rows(record))
        elif format in ("jsonl", "odvg"):
            for record in records:
                line = record if format == "jsonl" else _odvg_line(record)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        else:
            document = _coco(records) if format == "coco" else [_label_studio_task(record) for record in records]
            json.dump(document, file, ensure_ascii=False)


def _to_record(result: Any) -> Record:
    if isinstance(result, Result):
        return result.to_dict()
    if not isinstance(result, Mapping):
        raise DataError(f"expected results of a Grounder, or their records, got one of type {type(result).__name__}")
    if missing := [key for key in KEYS if key not in result]:
        raise DataError(f"a record without {', '.join(missing)}: expected those of Result.to_dict")
    return result


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield the records of a JSON lines file; raises DataError that names a line that is not one."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                record["image"], record["boxes"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: not a result of vg predict ({error}); remove it") from error
            yield record


def coco_results(record: Record, image_id: int) -> list[dict[str, Any]]:
    """Return the boxes of a record as COCO results, categories numbered from 1 on in the order of its phrases."""
    return [
        {
            "image_id": image_id,
            "category_id": entry["phrase_id"] + 1,
            "bbox": _xywh(entry["box"]),
            "score": entry["score"],
            **({"segmentation": entry["mask"]} if "mask" in entry else {}),
        }
        for entry in record["boxes"]
    ]


def _label_studio_task(record: Record) -> dict[str, Any]:
    """Return a task of Label Studio, for a `RectangleLabels` control named "label".

    Boxes are left, top, width and height in percent of the image.
    """
    height, width = record["height"], record["width"]
    regions = []
    for index, entry in enumerate(record["boxes"]):
        x, y, w, h = _xywh(entry["box"])
        percent = {"x": x / width, "y": y / height, "width": w / width, "height": h / height}
        value = {key: round(100 * share, 4) for key, share in percent.items()}
        regions.append(
            {
                "id": f"box{index}",
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": entry["score"],
                "value": {**value, "rotation": 0, "rectanglelabels": [entry["phrase"]]},
            }
        )
    score = max((entry["score"] for entry in record["boxes"]), default=0.0)
    return {
        "data": {"image": record["image"]},
        "predictions": [{"model_version": "vg", "score": score, "result": regions}],
    }


def _coco(records: Iterable[Record]) -> dict[str, Any]:
    """A COCO dataset; equal phrases of different images are one category."""
    numbers: dict[str, int] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, record in enumerate(records, start=1):
        images.append({"id": image_id, "file_name": record["image"], **{k: record[k] for k in ("height", "width")}})
        for phrase in record["phrases"]:
            numbers.setdefault(phrase, len(numbers) + 1)
        for entry, result in zip(record["boxes"], coco_results(record, image_id), strict=True):
            added = {"id": len(annotations) + 1, "category_id": numbers[entry["phrase"]], "iscrowd": 0}
            annotations.append(result | added | {"area": _area(result)})
    categories = [{"id": number, "name": phrase} for phrase, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _area(result: Mapping[str, Any]) -> float:
    """Return the area of a COCO result in pixels: that of its mask, or else of its box."""
    if "segmentation" not in result:
        width, height = result["bbox"][2:]
        return round(width * height, 2)
    from pycocotools.mask import area

    return float(area(result["segmentation"]))


def _rows(record: Record) -> Iterator[dict[str, Any]]:
    size = {"image": record["image"], "height": record["height"], "width": record["width"]}
    for entry in record["boxes"]:
        sides = dict(zip(("left", "top", "right", "bottom"), entry["box"], strict=True))
        yield size | sides | {"phrase": entry["phrase"], "score": entry["score"]}
    if not record["boxes"]:
        yield size


def _odvg_line(record: Record) -> dict[str, Any]:
    """A grounding line: the caption lists all phrases, and one that names nothing in the image has an empty region."""
    caption, regions = "", []
    for phrase in dict.fromkeys(record["phrases"]):
        caption += " . " if caption else ""
        region = {"phrase": phrase, "tokens_positive": [[len(caption), len(caption) + len(phrase)]]}
        caption += phrase
        found = [entry for entry in record["boxes"] if entry["phrase"] == phrase]
        regions += [{"bbox": entry["box"], **region, "score": entry["score"]} for entry in found]
        regions += [] if found else [{"bbox": [], **region}]
    size = {"filename": record["image"], "height": record["height"], "width": record["width"]}
    return size | {"grounding": {"caption": caption, "regions": regions}}


def _xywh(box: list[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, round(right - left, 2), round(bottom - top, 2)]

"""COCO json: pictures, boxes and classes in one file, as COCO, LVIS and Objects365 export them."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeFloat

from vg.data.detection.source import Detection, DetectionTable
from vg.data.detection.vocabulary import Vocabulary, VocabularyConfig
from vg.data.source import Provenance
from vg.data.synthetic.shapes import write_scenes
from vg.errors import DataError
from vg.settings import Settings


@dataclass
class CocoConfig(Settings):
    """Which json file, and where its pictures are."""

    name: Literal["coco"] = "coco"
    path: str = field(kw_only=True)  # instances_train2017.json
    image_root: str | None = None  # folder of the pictures; by default that of the file, or the one above `annotations`
    min_side: NonNegativeFloat = 0.0
    """Pixels; boxes with a shorter side are left out. Published training: 1. Evaluation counts every box that has an
    area, as pycocotools does."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)

    @classmethod
    def miniature(cls, folder: Path) -> CocoConfig:
        """Write a tiny dataset and return its settings, for tests."""
        rows = write_scenes(folder, "detection")
        names = sorted({name for _, name, _ in rows})
        document = {
            "images": [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 64} for i in range(4)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
            "annotations": [
                {"id": i, "image_id": image, "category_id": names.index(name), "bbox": [x1, y1, x2 - x1, y2 - y1]}
                for i, (image, name, (x1, y1, x2, y2)) in enumerate(rows)
            ],
        }
        (folder / "instances_val.json").write_text(json.dumps(document))
        return cls(path=str(folder / "instances_val.json"))

    def build(self) -> Detection:
        """Read the file.

        Raises:
            DataError: no such file, not COCO's json, or an entry that cannot be used; the message names it.
        """
        file = Path(self.path)
        table, names, class_ids = read_coco(file)
        folder = file.resolve().parent
        folder = folder.parent if folder.name == "annotations" else folder
        return Detection(
            table,
            Vocabulary(names, self.vocabulary, str(file)),
            class_ids,
            Path(self.image_root) if self.image_root is not None else folder,
            Provenance(folder.name, file.stem.removeprefix("instances_"), "detection"),
            self.min_side,
        )


def read_coco(file: Path) -> tuple[DetectionTable, list[str], list[int]]:
    """The pictures in the order of the file; the names and ids of the classes in the order of their ids."""
    document = _read_json(file)
    parts = ("images", "annotations", "categories")
    if not isinstance(document, Mapping) or not all(isinstance(document.get(part), list) for part in parts):
        found = f"the keys {sorted(document)}" if isinstance(document, Mapping) else f"a {type(document).__name__}"
        raise DataError(f"{file} has {found}; COCO's json has lists of images, annotations and categories")
    images, annotations, categories = (document[part] for part in parts)

    classes = dict(zip(_column(categories, "id", file), map(str, _column(categories, "name", file)), strict=True))
    pictures = {id: number for number, id in enumerate(_column(images, "id", file))}
    if len(classes) < len(categories) or len(pictures) < len(images):
        raise DataError(f"{file}: two images or two categories have the same id; renumber them")
    class_ids = sorted(classes)
    labels = {id: label for label, id in enumerate(class_ids)}
    boxes = _boxes(annotations, file)  # [A, 4] xywh
    areas = np.array([annotation.get("area") for annotation in annotations], np.float64)  # [A], NaN where there is none
    table = DetectionTable.of(
        ids=list(map(str, pictures)),
        files=[_file_name(image, file) for image in images],
        sizes=np.array([(image.get("height") or 0, image.get("width") or 0) for image in images]),
        owners=_numbers(annotations, "image_id", pictures, "images", file),
        boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
        labels=_numbers(annotations, "category_id", labels, "categories", file),
        crowd=np.array([bool(annotation.get("iscrowd")) for annotation in annotations], bool),
        areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
    )
    return table, [classes[id] for id in class_ids], class_ids


def _read_json(file: Path) -> Any:
    gc.disable()  # it would look through the growing millions of objects again and again, for half of the time
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; path is a json file in COCO's format") from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); replace it by an intact copy") from error
    finally:
        gc.enable()


def _column(rows: Sequence[Any], key: str, file: Path) -> list[Any]:
    try:
        return [row[key] for row in rows]
    except (KeyError, TypeError):
        number = next(number for number, row in enumerate(rows) if not isinstance(row, Mapping) or key not in row)
    raise DataError(
        f"{file}: entry {number} has no {key!r}, it is {str(rows[number])[:100]}; add it or remove the entry"
    )


def _file_name(image: Mapping[str, Any], file: Path) -> str:
    """LVIS has no file_name but the end of the URL, which is train2017/000000391895.jpg."""
    name = image.get("file_name") or "/".join(str(image.get("coco_url") or "").split("/")[-2:])
    if not name:
        raise DataError(f"{file}: image {image['id']} has neither file_name nor coco_url; add its file_name")
    return str(name)


def _numbers(
    annotations: Sequence[Mapping[str, Any]], key: str, numbers: Mapping[Any, int], part: str, file: Path
) -> np.ndarray:
    """[A] the number of what `key` refers to."""
    ids = _column(annotations, key, file)
    try:
        return np.array([numbers[id] for id in ids], np.int64)
    except (KeyError, TypeError):
        row = next(number for number, id in enumerate(ids) if not isinstance(id, int | str) or id not in numbers)
    raise DataError(
        f"{file}: annotation {annotations[row].get('id', row)} has {key} {ids[row]!r}, which is not among the {part}; "
        f"add it to {part} or remove the annotation"
    )


def _boxes(annotations: Sequence[Mapping[str, Any]], file: Path) -> np.ndarray:
    """[A, 4] float64 xywh."""
    column = _column(annotations, "bbox", file)
    try:
        boxes = np.array(column, np.float64).reshape(-1, 4)
        good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] >= 0).all(axis=1)
        if len(boxes) == len(column) and good.all():
            return boxes
    except (TypeError, ValueError):
        pass  # the search for the culprit follows
    row, box = next((row, box) for row, box in zip(annotations, column, strict=True) if not _is_box(box))
    raise DataError(
        f"{file}: annotation {row.get('id')} has bbox {box!r}, expected x, y, width, height in pixels; correct or "
        "remove it"
    )


def _is_box(box: object) -> bool:
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(number, int | float) for number in box):
        return False
    return bool(np.isfinite(box).all()) and min(box[2:]) >= 0

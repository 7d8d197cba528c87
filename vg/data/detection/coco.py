"""COCO json: images, boxes and classes in one file, as COCO, LVIS and Objects365 export them."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import NonNegativeFloat

from vg.data.detection.annotations import XYWH, Annotations, to_boxes, to_float, to_size
from vg.data.detection.issues import Issues, RaiseFirstError
from vg.data.detection.source import DetectionSource
from vg.data.detection.vocabulary import Vocabulary, VocabularyConfig
from vg.data.source import Provenance
from vg.data.synthetic.shapes import write_scenes
from vg.errors import DataError
from vg.settings import Settings

_Id: TypeAlias = int | float | str


@dataclass
class CocoConfig(Settings):
    """Which json file to read, and where its images are."""

    name: Literal["coco"] = "coco"
    path: str = field(kw_only=True)
    """The json file, such as instances_train2017.json."""
    image_root: str | None = None
    """Folder of the images; by default the folder of the file, or its parent if the file is in `annotations`."""
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

    def build(self) -> DetectionSource:
        """Read the file.

        Raises:
            DataError: the file is missing or not COCO json, or an entry cannot be used; the message names it.
        """
        strict = RaiseFirstError(self.path)
        annotations = self.read(strict)
        annotations.report_inverted(strict)
        folder, split = self._folder(), Path(self.path).stem.removeprefix("instances_")
        return DetectionSource(
            annotations,
            Vocabulary(annotations.names, self.vocabulary, self.path),
            Provenance(folder.name, split, "detection"),
            self.min_side,
        )

    def _folder(self) -> Path:
        folder = Path(self.path).resolve().parent
        return folder.parent if folder.name == "annotations" else folder

    def read(self, issues: Issues) -> Annotations:
        """Parse the file: images in its order, classes in the order of their ids.

        Whole columns of annotations are validated at once; single rows are visited only to describe invalid ones.

        Raises:
            DataError: the file cannot be read or is not JSON.
        """
        document = _read_json(Path(self.path))
        categories, images, rows = (_objects(document, key, issues) for key in ("categories", "images", "annotations"))
        names = _read_categories(categories, issues)  # id -> name
        index_of_id, files, sizes = _read_images(images, issues)
        columns = {key: _column(rows, key) for key in ("image_id", "category_id", "bbox", "area")}
        image_indices = _look_up(columns["image_id"], index_of_id)  # [A], -1 where unknown
        labels = _look_up(columns["category_id"], {id: label for label, id in enumerate(names)})  # [A], -1 if unknown
        boxes = to_boxes(columns["bbox"])  # [A, 4] xywh, NaN where invalid
        areas, invalid_areas = _to_areas(columns["area"])  # [A] both

        def locate(index: int) -> str:
            if "id" in (row := rows[index]):
                return f"annotation {row['id']}"
            return f"annotations[{next(i for i, other in enumerate(document['annotations']) if other is row)}]"

        def report(key: str, invalid: np.ndarray, what: str, fix: str) -> None:
            def describe(index: int) -> str:
                return f"{locate(index)}: {key} {repr(columns[key][index])[:80]}"

            issues.add_rows("error", what, fix, invalid, describe)

        for key, indices, target in (("image_id", image_indices, "images"), ("category_id", labels, "categories")):
            fix = f"add it to {target} (numbers and strings differ: 7 is not '7'), or remove the annotation"
            report(key, indices < 0, f"annotations whose {key} is not in {target}", fix)
        fix = "write x, y, width, height in pixels, or remove the annotation"
        report("bbox", np.isnan(boxes[:, 0]), "boxes that are not four finite numbers", fix)
        report("area", invalid_areas, "areas that are not numbers", "correct or remove them")
        positions = np.flatnonzero((image_indices >= 0) & (labels >= 0) & ~np.isnan(boxes[:, 0]))
        valid = slice(None) if len(positions) == len(rows) else positions  # avoids copies
        boxes, areas = boxes[valid], areas[valid]
        return Annotations(
            image_root=Path(self.image_root) if self.image_root is not None else self._folder(),
            names=list(names.values()),
            num_classes=len(names),
            category_ids=list(names),
            ids=list(map(str, index_of_id)),
            files=files,
            locations=[f"image {id}" for id in index_of_id],
            sizes=sizes,
            image_indices=image_indices[valid],
            boxes=boxes,
            labels=labels[valid],
            locate=lambda index: locate(positions[index]),
            crowd=np.array([bool(row.get("iscrowd")) for row in rows], bool)[valid],
            areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
            box_format=XYWH,
        )


def _read_json(file: Path) -> Any:
    gc.disable()  # otherwise the collector scans the millions of objects again and again, half of the loading time
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; path is a json file in COCO format") from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); replace it with an intact copy") from error
    finally:
        gc.enable()


def _objects(document: Any, key: str, issues: Issues) -> list[dict[str, Any]]:
    rows = document.get(key) if isinstance(document, dict) else None
    if not isinstance(rows, list):
        found = f"the keys {sorted(document)}" if isinstance(document, dict) else f"a {type(document).__name__}"
        fix = "COCO json has lists of images, annotations and categories; a file of results has not"
        issues.add("error", "missing lists", fix, [f"no list of {key}, the file has {found}"])
        return []
    if {*map(type, rows)} <= {dict}:
        return rows
    others = [f"{key}[{index}]: {str(row)[:80]}" for index, row in enumerate(rows) if not isinstance(row, dict)]
    issues.add("error", "entries that are not objects", "remove them", others)
    return [row for row in rows if isinstance(row, dict)]


def _column(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    try:
        return list(map(itemgetter(key), rows))
    except KeyError:
        return [row.get(key) for row in rows]


def _read_categories(rows: Sequence[dict[str, Any]], issues: Issues) -> dict[_Id, str]:
    """Category id -> name, in the order of the ids."""
    names: dict[_Id, str] = {}
    for index, row in enumerate(rows):
        example = [f"categories[{index}]: {str(row)[:80]}"]
        if "id" not in row or not str(row.get("name") or "").strip():
            issues.add("error", "categories without id or name", "add both", example)
        elif (id := _hashable(row["id"])) in names:
            issues.add("error", "duplicate category ids", "renumber them, and their annotations", example)
        else:
            names[id] = str(row["name"])
    return dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _read_images(rows: Sequence[dict[str, Any]], issues: Issues) -> tuple[dict[_Id, int], list[str], np.ndarray]:
    """Image id -> index, file names, and sizes [I, 2] int64 (height, width) as in Annotations."""
    index_of_id: dict[_Id, int] = {}
    id_of_file: dict[str, _Id] = {}
    files: list[str] = []
    sizes: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        # LVIS has no file_name but the end of the URL, which is train2017/000000391895.jpg.
        file = row.get("file_name") or "/".join(str(row.get("coco_url") or "").split("/")[-2:])
        if not file or "id" not in row:
            example = [f"images[{index}]: {str(row)[:80]}"]
            issues.add(
                "error", "images without id or file_name", "add both (or coco_url in place of file_name)", example
            )
            continue
        id, file = _hashable(row["id"]), str(file)
        if id in index_of_id:
            issues.add("error", "duplicate image ids", "renumber them, and their annotations", [f"image {id}: {file}"])
            continue
        if id_of_file.setdefault(file, id) != id:
            fix = "merge the entries: each of them lacks the boxes of the other"
            issues.add("warning", "images listed twice", fix, [f"image {id} and image {id_of_file[file]}: {file}"])
        index_of_id[id] = len(files)
        files.append(file)
        sizes.append(to_size(row.get("height"), row.get("width")))
    return index_of_id, files, np.array(sizes, np.int64).reshape(-1, 2)


def _hashable(id: Any) -> _Id:
    return id if isinstance(id, (int, float, str)) else repr(id)


def _look_up(ids: Sequence[Any], indices: dict[_Id, int]) -> np.ndarray:
    """[A] int64, the index of each id; -1 for an unknown one."""
    try:
        return np.fromiter(map(indices.get, ids, repeat(-1)), np.int64, len(ids))
    except TypeError:  # an id that cannot be hashed, such as a list
        return np.array([indices.get(_hashable(id), -1) for id in ids], np.int64)


def _to_areas(values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """[A] float64 areas, NaN where missing; [A] bool, which are given but not numbers."""
    try:
        return np.array(values, np.float64).reshape(len(values)), np.zeros(len(values), bool)
    except (TypeError, ValueError, OverflowError):
        areas = np.array([to_float(value) for value in values])
        return areas, np.isnan(areas) & np.array([value is not None for value in values])

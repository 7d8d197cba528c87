"""COCO json: images, boxes and classes in one file, as COCO, LVIS and Objects365 export them."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import NonNegativeFloat

from vg.data.detection.annotations import XYWH, Annotations, to_boxes, to_float, to_size, without_gc
from vg.data.detection.issues import NUM_EXAMPLES, Issues
from vg.data.detection.source import DetectionSource, read_strictly
from vg.data.detection.vocabulary import VocabularyConfig
from vg.data.image_files import dataset_folder, image_root
from vg.data.synthetic.shapes import write_scenes
from vg.errors import DataError
from vg.files import located, read_json
from vg.settings import Settings
from vg.types import Coverage

_Id: TypeAlias = int | float | str
_NEGATIVE, _PARTIAL = "neg_category_ids", "not_exhaustive_category_ids"  # of images of LVIS


@dataclass
class CocoConfig(Settings):
    """Which json file to read, and where its images are."""

    name: Literal["coco"] = "coco"
    path: str = field(kw_only=True)
    """The json file, such as instances_train2017.json."""
    image_root: str | None = None
    """Folder of the images; by default the one of the file, or its parent if that is `annotations`, or a folder in it
    where the images are: `images`, and `train`, `train2017` or `images/train` for instances_train2017.json."""
    min_side: NonNegativeFloat = 0.0
    """Pixels; boxes with a shorter side are left out. Published training: 1. Evaluation counts every box that has an
    area, as pycocotools does."""
    upright: bool | None = None
    """Apply the EXIF orientation of images. null: only where the annotated height and width are those of the upright
    image; this does not find images that are flipped or turned by 180 degrees, nor square ones turned by 90 degrees."""
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
        annotations, file = read_strictly(self, self.min_side), Path(self.path)
        name, split = dataset_folder(file).name, file.stem.removeprefix("instances_")
        return DetectionSource(self, annotations, name, split, self.min_side)

    @without_gc()
    def read(self, issues: Issues) -> Annotations:
        """Parse the file: images in its order, classes in the order of their ids.

        Whole columns of annotations are validated at once; single rows are visited only to describe invalid ones.

        Raises:
            DataError: the file cannot be read or is not JSON.
        """
        file = Path(self.path)
        try:
            document: Any = read_json(file, object)
        except OSError as error:
            known = "path is an intact json file in COCO format"
            raise DataError(f"cannot read {located(file)}: {error.strerror}; {known}") from error
        categories, images, rows = (_objects(document, key, issues) for key in ("categories", "images", "annotations"))
        category_of_id = _by_id(categories, "categories", ("name",), issues)
        names = {id: str(row["name"]) for id, row in category_of_id.items()}
        names = dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))
        image_of_id = _by_id(images, "images", ("file_name", "coco_url"), issues)
        image_rows = image_of_id.values()
        # LVIS has no file_name but the end of the URL, which is train2017/000000391895.jpg.
        files = [_text(row.get("file_name")) or "/".join(str(row["coco_url"]).split("/")[-2:]) for row in image_rows]
        sizes = [to_size(row.get("height"), row.get("width")) for row in image_rows]
        first: dict[str, _Id] = {}
        twice = [
            f"image {id} and image {first[file]}: {file}"
            for id, file in zip(image_of_id, files, strict=True)
            if first.setdefault(file, id) != id
        ]
        issues.add("warning", "images listed twice", "merge the entries: each lacks the boxes of the other", twice)

        columns = {
            key: [row.get(key) for row in rows] for key in ("image_id", "category_id", "bbox", "area", "iscrowd")
        }
        image_indices = _look_up(columns["image_id"], image_of_id)  # [A], -1 where unknown
        labels = _look_up(columns["category_id"], names)  # [A], -1 where unknown
        if spare := _unused_copies(names, labels):
            fix = "nothing: the one without boxes is left out"
            issues.add("note", "classes listed twice, once without boxes", fix, [names[id] for id in spare])
            names = {id: name for id, name in names.items() if id not in spare}
            labels = _look_up(columns["category_id"], names)
        boxes = to_boxes(columns["bbox"])  # [A, 4] xywh, NaN where invalid
        areas, invalid_areas = _to_areas(columns["area"])  # [A] both

        def locate(index: int) -> str:
            row = rows[index]
            return f"annotation {row['id']}" if "id" in row else f"annotations[{document['annotations'].index(row)}]"

        add = "add it to {} (numbers and strings differ: 7 is not '7'), or remove the annotation"
        crowd, invalid_crowd = _to_flags(columns["iscrowd"])  # [A] both
        not_a_box = "write x, y, width, height in pixels, or remove the annotation"
        for key, invalid, what, fix in (
            ("image_id", image_indices < 0, "annotations whose image_id is not in images", add.format("images")),
            ("category_id", labels < 0, "annotations whose category_id is not in categories", add.format("categories")),
            ("bbox", np.isnan(boxes[:, 0]), "boxes that are not four finite numbers", not_a_box),
            ("area", invalid_areas, "areas that are not numbers", "correct or remove them"),
            ("iscrowd", invalid_crowd, "values of iscrowd that are not 0 or 1", "correct or remove them"),
        ):
            indices = np.flatnonzero(invalid)
            examples = (f"{locate(i)}: {key} {repr(columns[key][i])[:80]}" for i in indices[:NUM_EXAMPLES])
            issues.add("error", what, fix, examples, count=len(indices))
        positions = np.flatnonzero((image_indices >= 0) & (labels >= 0) & ~np.isnan(boxes[:, 0]))
        valid = slice(None) if len(positions) == len(rows) else positions  # avoids copies
        boxes, areas = boxes[valid], areas[valid]
        return Annotations(
            image_root=Path(self.image_root) if self.image_root is not None else image_root(file, files),
            names=list(names.values()),
            category_ids=list(names),
            ids=list(map(str, image_of_id)),
            files=files,
            locations=[f"image {id}" for id in image_of_id],
            sizes=np.array(sizes, np.int64).reshape(-1, 2),
            image_indices=image_indices[valid],
            boxes=boxes,
            labels=labels[valid],
            crowd=crowd[valid],
            areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
            coverage=_coverage(image_of_id, names, image_indices[valid], labels[valid], issues),
            frequencies=_frequencies(category_of_id, names),
            segmentations=[rows[index].get("segmentation") for index in positions],
            locate=lambda index: locate(positions[index]),
            box_format=XYWH,
            upright=self.upright,
        )


def _objects(document: Any, key: str, issues: Issues) -> list[dict[str, Any]]:
    rows = document.get(key) if isinstance(document, dict) else None
    if not isinstance(rows, list):
        found = f"the keys {sorted(document)}" if isinstance(document, dict) else f"a {type(document).__name__}"
        fix = "COCO json has lists of images, annotations and categories; a file of results has not"
        issues.add("error", "missing lists", fix, [f"no list of {key}, the file has {found}"])
        return []
    if {*map(type, rows)} <= {dict}:
        return rows
    invalid = [f"{key}[{index}]: {str(row)[:80]}" for index, row in enumerate(rows) if not isinstance(row, dict)]
    issues.add("error", "entries that are not objects", "remove them", invalid)
    return [row for row in rows if isinstance(row, dict)]


def _by_id(rows: Sequence[dict[str, Any]], key: str, names: Sequence[str], issues: Issues) -> dict[_Id, dict[str, Any]]:
    """Rows of `document[key]` by id; those without id, without any of `names`, or with a duplicate id are reported."""
    found: dict[_Id, dict[str, Any]] = {}
    for index, row in enumerate(rows):
        found_names = (row.get(name) for name in names)
        texts = [_text(name).strip() for name in found_names]
        if not isinstance(id := row.get("id"), (int, float, str)) or not any(texts):
            what, fix = f"{key} without id or {names[0]}", f"add both, id and {' or '.join(names)}"
        elif found.setdefault(id, row) is not row:
            what, fix = f"duplicate ids in {key}", "renumber them, and their annotations"
        else:
            continue
        issues.add("error", what, fix, [f"{key}[{index}]: {str(row)[:80]}"])
    return found


def _text(name: Any) -> str:
    """Return the name of a class or file, which may be a number; "" for anything else."""
    return str(name) if isinstance(name, (str, int, float)) and not isinstance(name, bool) else ""


def _unused_copies(names: Mapping[_Id, str], labels: np.ndarray) -> list[_Id]:
    """Return ids without boxes whose name another id has, as in exports of Roboflow; of unused ones the first stays."""
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    spare: list[_Id] = []
    kept = {name for name, count in zip(names.values(), counts, strict=True) if count}
    for (id, name), count in zip(names.items(), counts, strict=True):
        if not count and name in kept:
            spare.append(id)
        kept.add(name)
    return spare


def _coverage(
    images: Mapping[_Id, Mapping[str, Any]],
    names: Mapping[_Id, str],
    image_indices: np.ndarray,
    labels: np.ndarray,
    issues: Issues,
) -> np.ndarray | None:
    """Return `Annotations.coverage` if the images list classes as LVIS does, else None.

    An image is annotated for the classes of its boxes and of `neg_category_ids`, but only with some of the objects for
    those that are in `not_exhaustive_category_ids`, too.
    """
    if not any(_NEGATIVE in row for row in images.values()):
        return None

    def pairs(key: str) -> np.ndarray:
        lists = {id: row.get(key) or [] for id, row in images.items()}
        wrong = [f"image {id}: {own!r:.80}" for id, own in lists.items() if not _are_ids(own, names)]
        issues.add("error", f"{key} that are not lists of ids of categories", "correct or remove them", wrong)
        listed = [[] if wrong else own for own in lists.values()]
        found = _look_up([id for own in listed for id in own], names)
        return np.repeat(np.arange(len(listed)), list(map(len, listed))) * len(names) + found

    searched = np.unique(np.concatenate([image_indices * len(names) + labels, pairs(_NEGATIVE)]))
    coverage = np.where(np.isin(searched, pairs(_PARTIAL)), Coverage.SOME, Coverage.ALL)
    return np.column_stack([*np.divmod(searched, len(names)), coverage]).astype(np.int32)


def _are_ids(values: Any, names: Mapping[_Id, str]) -> bool:
    return isinstance(values, list) and all(isinstance(id, Hashable) and id in names for id in values)


def _frequencies(categories: Mapping[_Id, Mapping[str, Any]], names: Iterable[_Id]) -> list[str]:
    """Return `Annotations.frequencies`; empty unless all classes have one."""
    found = [_text(categories[id].get("frequency")) for id in names]
    return found if all(found) else []


def _look_up(ids: Sequence[Any], rows: Iterable[_Id]) -> np.ndarray:
    """[A] int64, the position of each id in `rows`; -1 for an unknown one."""
    positions = {id: position for position, id in enumerate(rows)}
    try:
        return np.fromiter(map(positions.get, ids, repeat(-1)), np.int64, len(ids))
    except TypeError:  # lists and objects cannot be hashed
        return _look_up([id if isinstance(id, Hashable) else None for id in ids], rows)


def _to_flags(values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """[A] bool flags, False where missing; [A] bool, which are given but not 0, 1, false or true."""
    try:
        if {*values} <= {0, 1, None}:
            return np.array(values, bool), np.zeros(len(values), bool)
    except TypeError:  # lists and objects cannot be hashed
        pass
    valid = [value is None or (isinstance(value, (int, float)) and value in (0, 1)) for value in values]
    flags = [bool(value) and known for value, known in zip(values, valid, strict=True)]
    return np.array(flags, bool), ~np.array(valid, bool)


def _to_areas(values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """[A] float64 areas, NaN where missing; [A] bool, which are given but not numbers."""
    try:
        areas = np.array(values, np.float64).reshape(len(values))
        if np.isfinite(areas).all():
            return areas, np.zeros(len(values), bool)
    except (TypeError, ValueError, OverflowError):
        pass
    areas = np.array([to_float(value) for value in values])
    return areas, np.isnan(areas) & np.array([value is not None for value in values], bool)

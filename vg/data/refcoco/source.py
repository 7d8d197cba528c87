"""RefCOCO, RefCOCO+, RefCOCOg and what was made of them: every referring expression is one sample, in any form."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from vg.data.images import image_key
from vg.data.refcoco.official import Counts, check_counts
from vg.data.refcoco.rows import (
    COLUMNS,
    LMMS,
    detect_format,
    expressions_of,
    image_name,
    image_of,
    image_size_of,
    referent_of,
    sample_id,
    samples_of,
)
from vg.data.refcoco.tables import open_table
from vg.data.source import Provenance, Task
from vg.errors import BadSampleError, DataError
from vg.settings import Settings
from vg.types import Sample

__all__ = ["Annotation", "Refcoco", "RefcocoConfig", "samples_of"]

PERSON = 1  # COCO's number of that category
_MIXED = {("val", 8811), ("test", 5000), ("val", 7573)}  # splits of lmms-lab/RefCOCO and RefCOCOg by number of rows


@dataclass
class RefcocoConfig(Settings):
    """RefCOCO, RefCOCO+, RefCOCOg, RefCOCO-M, Ref-L4, a review of these or gRefCOCO, recognised from the columns."""

    name: Literal["refcoco"] = "refcoco"
    path: str = "jxu124/refcoco"  # Hub id, local folder (save_to_disk, data files, refer toolbox), or one file
    split: str = "train"  # train, val, testA, testB; RefCOCOg has test instead of the last two
    image_root: str | None = None  # the folder of COCO's train2014 pictures, for annotations without pixels
    revision: str | None = None  # of a Hub data set
    partition: str | None = None  # unc, google or umd, where a refer toolbox folder has several refs(*).p
    dataset: str | None = None
    """Which one, where a place holds several: so its files or splits begin ("refcoco_unc"), or what its column
    `dataset` says; jxu124/refcoco-benchmark has refcoco_unc, refcoco_plus_unc, refcocog_umd and others."""

    @classmethod
    def miniature(cls, folder: Path) -> RefcocoConfig:
        """Write a tiny dataset (JSON lines) and return its settings, for tests."""
        from vg.data.synthetic.shapes import write_scenes  # which imports this module

        rows = [
            {"file_name": f"{image}.png", "ann_id": image, "sent": phrase, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for image, phrase, (x1, y1, x2, y2) in write_scenes(folder, "expression")
        ]
        (folder / "mini_val.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return cls(path=str(folder), split="val")

    def build(self) -> Refcoco:
        return Refcoco(self)


class Annotation(NamedTuple):
    """What is known of one expression without its picture."""

    id: str  # of its sample
    expression: str
    boxes: np.ndarray  # [N, 4] xyxy pixels
    picture: str  # see vg.data.source.HasImageKeys
    person: bool | None  # whether it names a person
    others: int | None  # things of the same class in the picture; where only described ones are known, those


class Refcoco:
    """The expressions of one split, in the order of the rows; pictures are read when a sample is loaded.

    The id of a sample is `<data set>/<split>/<object>/<number>`: the object is the row's `ann_id` or `question_id`, the
    number counts its expressions.

    Raises:
        DataError: nothing to read, or an official name with other counts than the official ones; see vg.data.
            refcoco_official.
    """

    def __init__(self, config: RefcocoConfig) -> None:
        table = open_table(config.path, config.split, config.partition, config.revision, config.dataset)
        self._schema = detect_format(table.columns, config.path)
        mixed = self._schema is LMMS and (table.split, len(table.rows)) in _MIXED
        if mixed:
            warnings.warn(
                f"{config.path} ({table.split}, {len(table.rows)} rows) mixes the UNC or UMD split with 5,000 other "
                "rows: results on it cannot be compared with published ones, and its pictures may be in the training "
                "split. Use testA/testB, or the validation split of jxu124's data sets",
                stacklevel=3,
            )
        self._image_root = Path(config.image_root) if config.image_root is not None else table.folder
        if self._image_root is None and not table.has_pixels:
            raise DataError(f"{config.path} has no pixels; set image_root to the folder of COCO's train2014 pictures")
        if self._image_root is not None and not self._image_root.is_dir():
            raise DataError(f"image_root {self._image_root} is not a folder; set it to the one that holds the pictures")
        self._path = config.path
        reviewed = "quality" in table.columns
        if reviewed:
            check_counts(table.dataset.removesuffix("_reviewed"), table.split, Counts(len(table.rows)))
            table = table.where([quality > 0 for quality in table.column("quality")])
        self._table = table.select(COLUMNS)

        seen: Counter[str] = Counter()  # expressions so far of each object
        rows, places, numbers = [], [], []
        keys, cells = table.column(self._schema.key), table.column(self._schema.expressions)
        for row, (key, cell) in enumerate(zip(keys, cells, strict=True)):
            for place in range(len(expressions_of(cell))):
                rows.append(row)
                places.append(place)
                numbers.append(seen[str(key)])
                seen[str(key)] += 1
        self.num_refs = len(seen)  # described objects
        self._rows = np.array(rows, np.int32)  # [E] of E expressions: the row it is in,
        self._places = np.array(places, np.int32)  # [E] its place in that row,
        self._numbers = np.array(numbers, np.int32)  # [E] and its number among the expressions of the same object
        name = table.dataset.removesuffix("_reviewed")
        strict = not (reviewed or mixed or "dataset" in table.columns)  # else it is known to be a version or a part
        partition, official = check_counts(name, table.split, Counts(len(rows), self.num_refs), strict)
        if reviewed or mixed:
            official = False
        task: Task = "generalized" if self._schema.boxes == "boxes" else "expressions"
        self.provenance = Provenance(table.dataset, table.split, task, partition, official)

    def __len__(self) -> int:
        """The number of expressions."""
        return len(self._rows)

    def load(self, index: int, epoch: int) -> Sample:
        """The sample of one expression; `epoch` changes nothing.

        Raises:
            BadSampleError: naming the data set, the row, the object and, if it is about the picture, the file.
        """
        number = int(self._rows[index])
        row = self._table.row(number)
        try:
            referent = referent_of(row, self._schema)
            id = sample_id(self.provenance.data, self.provenance.split, referent.key, int(self._numbers[index]))
            return referent.sample(image_of(row, self._image_root), int(self._places[index]), id)
        except BadSampleError as error:
            raise BadSampleError(
                f"{self._path} ({self.provenance.split}), row {number + 1} ({image_name(row)}): {error}"
            ) from error

    def image_sizes(self, epoch: int) -> np.ndarray:
        """[expressions, 2] (height, width), from the heads of the pictures; reads every one at the first call."""
        return self._sizes[self._rows]

    def image_keys(self) -> list[str]:
        light = self._table.select(("image_path", "file_name"))  # without the pixels
        names = [image_name(light.rows[row]) for row in range(len(light.rows))]
        keys = {name: image_key(name, self._image_root) for name in dict.fromkeys(names)}
        return [keys[names[row]] for row in self._rows.tolist()]

    def annotations(self) -> list[Annotation]:
        """All expressions in the order of the samples; reads no picture, and raises BadSampleError for a bad row."""
        light = self._table.select([column for column in COLUMNS if column != "image"])
        pictures = self.image_keys()
        rows = [light.rows[number] for number in range(len(light.rows))]
        referents = [referent_of(row, self._schema) for row in rows]
        objects = {
            (picture, rows[row].get("category_id"), referents[row].key)
            for row, picture in zip(self._rows, pictures, strict=True)
        }
        described = Counter((picture, category) for picture, category, _ in objects)
        annotations = []
        for row, place, number, picture in zip(self._rows, self._places, self._numbers, pictures, strict=True):
            category, others = rows[row].get("category_id"), rows[row].get("others")
            if others is None and category is not None:
                others = described[picture, category] - 1
            annotations.append(
                Annotation(
                    id=sample_id(self.provenance.data, self.provenance.split, referents[row].key, int(number)),
                    expression=referents[row].expressions[place],
                    boxes=np.array(referents[row].boxes, np.float32).reshape(-1, 4),
                    picture=picture,
                    person=None if category is None else category in (PERSON, "person"),
                    others=others,
                )
            )
        return annotations

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for column in (*self._schema.columns, "image_path", "file_name"):
            if column in self._table.columns:
                digest.update(json.dumps([column, self._table.column(column)], default=str).encode())
        return digest.hexdigest()

    @cached_property
    def _sizes(self) -> np.ndarray:
        """[rows, 2] (height, width)"""
        rows = (self._table.row(row) for row in range(len(self._table.rows)))
        return np.array([image_size_of(row, self._image_root) for row in rows], np.int64).reshape(-1, 2)

"""RefCOCO, RefCOCO+, RefCOCOg and their derivatives in all published formats: one sample per expression."""

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

PERSON = 1  # COCO's category id of persons
_MIXED = {("val", 8811), ("test", 5000), ("val", 7573)}  # (split, rows) of lmms-lab/RefCOCO and RefCOCOg


@dataclass
class RefcocoConfig(Settings):
    """RefCOCO, RefCOCO+, RefCOCOg, RefCOCO-M, Ref-L4, gRefCOCO or a review; the columns determine the format."""

    name: Literal["refcoco"] = "refcoco"
    path: str = "jxu124/refcoco"  # Hub id, local folder (save_to_disk, data files, refer toolbox), or one file
    split: str = "train"  # train, val, testA, testB; RefCOCOg has test instead of the last two
    image_root: str | None = None  # folder of COCO's train2014 images, for annotations without pixels
    revision: str | None = None  # of a Hub dataset
    partition: str | None = None  # split provider (unc, google, umd), if a refer toolbox folder has several refs(*).p
    dataset: str | None = None
    """One of several datasets at the path, by the prefix of its files or splits or the value of its column `dataset`:
    jxu124/refcoco-benchmark has refcoco_unc, refcoco_plus_unc, refcocog_umd and others."""

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
    """One expression with its annotation, but without its image; None where the data does not say."""

    id: str  # of its sample
    expression: str
    boxes: np.ndarray  # [N, 4] xyxy pixels
    image_key: str  # see vg.data.source.HasImageKeys
    person: bool | None  # whether the object is a person
    others: int | None  # other objects of the same category in the image; if unknown, only those with expressions


class Refcoco:
    """The expressions of one split in the order of the rows; an image is read when its sample is loaded.

    Sample ids are `<dataset>/<split>/<object>/<index>`: the object is the row's `ann_id` or `question_id`, the index
    counts its expressions.

    Raises:
        DataError: nothing to read, or the name is official but the counts are not; see vg.data.refcoco.official.
    """

    def __init__(self, config: RefcocoConfig) -> None:
        table = open_table(config.path, config.split, config.partition, config.revision, config.dataset)
        self._schema = detect_format(table.columns, config.path)
        mixed = self._schema is LMMS and (table.split, len(table.rows)) in _MIXED
        if mixed:
            warnings.warn(
                f"{config.path} ({table.split}, {len(table.rows)} rows) mixes the UNC or UMD split with 5,000 other "
                "rows: results on it cannot be compared with published ones, and its images may be in the training "
                "split. Use testA/testB, or the validation split of jxu124's datasets",
                stacklevel=3,
            )
        self._image_root = Path(config.image_root) if config.image_root is not None else table.folder
        if self._image_root is None and not table.has_pixels:
            raise DataError(f"{config.path} has no pixels; set image_root to the folder of COCO's train2014 images")
        if self._image_root is not None and not self._image_root.is_dir():
            raise DataError(f"image_root {self._image_root} is not a folder; set it to the folder of the images")
        self._path = config.path
        reviewed = "quality" in table.columns
        if reviewed:
            check_counts(table.dataset.removesuffix("_reviewed"), table.split, Counts(len(table.rows)))
            table = table.where([quality > 0 for quality in table.column("quality")])
        self._table = table.select(COLUMNS)

        seen: Counter[str] = Counter()  # expressions of an object so far
        rows, cell_indices, object_indices = [], [], []
        keys, cells = table.column(self._schema.key), table.column(self._schema.expressions)
        for row, (key, cell) in enumerate(zip(keys, cells, strict=True)):
            for cell_index in range(len(expressions_of(cell))):
                rows.append(row)
                cell_indices.append(cell_index)
                object_indices.append(seen[str(key)])
                seen[str(key)] += 1
        self.num_refs = len(seen)  # described objects
        self._rows = np.array(rows, np.int32)  # [E] row of an expression,
        self._cell_indices = np.array(cell_indices, np.int32)  # [E] its index in that row,
        self._object_indices = np.array(object_indices, np.int32)  # [E] and among all expressions of its object
        name = table.dataset.removesuffix("_reviewed")
        strict = not (reviewed or mixed or "dataset" in table.columns)  # these are known versions or subsets
        partition, official = check_counts(name, table.split, Counts(len(rows), self.num_refs), strict)
        if reviewed or mixed:
            official = False
        task: Task = "generalized" if self._schema.boxes == "boxes" else "expressions"
        self.provenance = Provenance(table.dataset, table.split, task, partition, official)

    def __len__(self) -> int:
        """Return the number of expressions."""
        return len(self._rows)

    def load(self, index: int, epoch: int) -> Sample:
        """Read the sample of one expression; `epoch` has no effect.

        Raises:
            BadSampleError: the message names the dataset, the row, the object and the image file.
        """
        row_index = int(self._rows[index])
        row = self._table.row(row_index)
        try:
            referent = referent_of(row, self._schema)
            id = sample_id(self.provenance.data, self.provenance.split, referent.key, int(self._object_indices[index]))
            return referent.sample(image_of(row, self._image_root), int(self._cell_indices[index]), id)
        except BadSampleError as error:
            raise BadSampleError(
                f"{self._path} ({self.provenance.split}), row {row_index + 1} ({image_name(row)}): {error}"
            ) from error

    def image_sizes(self, epoch: int) -> np.ndarray:
        """Return [expressions, 2] (height, width); the first call reads the header of every image."""
        return self._sizes[self._rows]

    def image_keys(self) -> list[str]:
        table = self._table.select(("image_path", "file_name"))  # without pixels
        names = [image_name(table.rows[row]) for row in range(len(table.rows))]
        keys = {name: image_key(name, self._image_root) for name in dict.fromkeys(names)}
        return [keys[names[row]] for row in self._rows.tolist()]

    def annotations(self) -> list[Annotation]:
        """Return the annotations of all samples without reading images; raise BadSampleError for a bad row."""
        table = self._table.select([column for column in COLUMNS if column != "image"])
        keys = self.image_keys()
        rows = [table.rows[row] for row in range(len(table.rows))]
        referents = [referent_of(row, self._schema) for row in rows]
        objects = {
            (key, rows[row].get("category_id"), referents[row].key) for row, key in zip(self._rows, keys, strict=True)
        }
        described = Counter((key, category) for key, category, _ in objects)
        annotations = []
        for row, cell, index, key in zip(self._rows, self._cell_indices, self._object_indices, keys, strict=True):
            category, others = rows[row].get("category_id"), rows[row].get("others")
            if others is None and category is not None:
                others = described[key, category] - 1
            annotations.append(
                Annotation(
                    id=sample_id(self.provenance.data, self.provenance.split, referents[row].key, int(index)),
                    expression=referents[row].expressions[cell],
                    boxes=np.array(referents[row].boxes, np.float32).reshape(-1, 4),
                    image_key=key,
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
    def _sizes(self) -> np.ndarray:  # [rows, 2] (height, width)
        rows = (self._table.row(row) for row in range(len(self._table.rows)))
        return np.array([image_size_of(row, self._image_root) for row in rows], np.int64).reshape(-1, 2)

"""RefCOCO, RefCOCO+, RefCOCOg and their derivatives in all published formats: one sample per expression."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vg.data.image_files import image_files, image_key
from vg.data.images import UNKNOWN_SIZE, image_size, read_image
from vg.data.refcoco.official import Counts, check_counts
from vg.data.refcoco.rows import (
    COLUMNS,
    LMMS,
    detect_format,
    expressions_of,
    image_name,
    image_source,
    referent_of,
    sample_id,
)
from vg.data.refcoco.tables import open_table
from vg.data.source import Provenance, Source, Task, row_key
from vg.data.synthetic.shapes import write_scenes
from vg.errors import BadSampleError, DataError
from vg.settings import Settings
from vg.types import Sample

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
    image_key: str  # see vg.data.source.Source.image_keys
    person: bool | None  # whether the object is a person
    num_others: int | None  # other objects of the same category in the image; if unknown, only those with expressions


class Refcoco(Source[Sample]):
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
        name, reviewed = table.dataset.removesuffix("_reviewed"), "quality" in table.columns
        if reviewed:
            check_counts(name, table.split, Counts(len(table.rows)))
            table = table.where("quality", lambda quality: quality > 0)
        self._table = table.select(COLUMNS)

        seen: Counter[str] = Counter()  # expressions of an object so far
        indices = []
        keys, cells = table.column(self._schema.key), table.column(self._schema.expressions)
        for row, (key, cell) in enumerate(zip(map(str, keys), cells, strict=True)):
            for index in range(len(expressions_of(cell))):
                indices.append((row, index, seen[key]))
                seen[key] += 1
        self.num_refs = len(seen)  # described objects
        # [E, 3] row of an expression, its index in that row, and its index among all expressions of its object
        self._indices = np.array(indices, np.int32).reshape(-1, 3)
        strict = not (reviewed or mixed or "dataset" in table.columns)  # these are known versions or subsets
        partition, official = check_counts(name, table.split, Counts(len(indices), self.num_refs), strict)
        if reviewed or mixed:
            official = False
        task: Task = "generalized" if self._schema.boxes == "boxes" else "expressions"
        self.provenance = Provenance(table.dataset, table.split, task, partition, official)

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, index: int, epoch: int) -> Sample:
        """Read the sample of one expression; a BadSampleError names the dataset, the row and the image file."""
        row_index, index_in_row, _ = self._indices[index].tolist()
        row = self._table.row(row_index)
        try:
            referent = referent_of(row, self._schema)
            image = read_image(*image_source(row, self._image_root))
            return referent.sample(image, index_in_row, self._id(referent.key, index))
        except BadSampleError as error:
            raise BadSampleError(
                f"{self._path} ({self.provenance.split}), row {row_index + 1} ({image_name(row)}): {error}"
            ) from error

    def _id(self, key: str, index: int) -> str:
        return sample_id(self.provenance.data, self.provenance.split, key, int(self._indices[index, 2]))

    def image_sizes(self, epoch: int) -> np.ndarray:
        """Return [expressions, 2] (height, width); the first call reads the header of every image."""
        return self._sizes[self._indices[:, 0]]

    def image_keys(self) -> list[str]:
        names = self._image_names()
        keys = {name: image_key(name, self._image_root) for name in dict.fromkeys(names) if name}
        return [keys.get(names[row], row_key(self.provenance, row)) for row in self._indices[:, 0].tolist()]

    def image_groups(self, epoch: int) -> np.ndarray:
        return np.unique(self.image_keys(), return_inverse=True)[1]

    def image_files(self) -> list[Path | None]:
        root = self._image_root
        if root is None or self._table.has_pixels:
            return [None] * len(self)
        files = image_files(self._image_names(), root)  # [rows]
        return [files[row] for row in self._indices[:, 0].tolist()]

    def image_bytes(self, index: int) -> bytes | None:
        source, _ = image_source(self._table.row(int(self._indices[index, 0])), self._image_root)
        return source.read_bytes() if isinstance(source, Path) else source

    def _image_names(self) -> list[str]:
        """Return the image file that each row names, "" if none, without reading pixels."""
        table = self._table
        columns = {"image": table.image_names()}
        columns |= {name: table.column(name) for name in ("image_path", "file_name") if name in table.columns}
        return [image_name(dict(zip(columns, cells, strict=True))) for cells in zip(*columns.values(), strict=True)]

    def sample_phrases(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the id and the expression of each sample."""
        keys = list(map(str, self._table.column(self._schema.key)))
        expressions = list(map(expressions_of, self._table.column(self._schema.expressions)))
        rows = enumerate(self._indices[:, :2].tolist())
        return [(self._id(keys[row], index), (expressions[row][index_in_row],)) for index, (row, index_in_row) in rows]

    def annotations(self) -> list[Annotation]:
        """Return the annotations of all samples without reading images; raise BadSampleError for a bad row."""
        rows = list(self._table.select([column for column in COLUMNS if column != "image"]).rows)
        referents = [referent_of(row, self._schema) for row in rows]
        keys, row_indices = self.image_keys(), self._indices[:, 0].tolist()
        objects = {
            (key, rows[row].get("category_id"), referents[row].key) for row, key in zip(row_indices, keys, strict=True)
        }
        described = Counter((key, category) for key, category, _ in objects)
        annotations = []
        for index, (row, index_in_row, _) in enumerate(self._indices.tolist()):
            category, num_others = rows[row].get("category_id"), rows[row].get("others")
            if num_others is None and category is not None:
                num_others = described[keys[index], category] - 1
            annotations.append(
                Annotation(
                    id=self._id(referents[row].key, index),
                    expression=referents[row].expressions[index_in_row],
                    boxes=referents[row].boxes,
                    image_key=keys[index],
                    person=None if category is None else category in (PERSON, "person"),
                    num_others=num_others,
                )
            )
        return annotations

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in (*self._schema.columns, "image_path", "file_name"):
            if name in self._table.columns:
                digest.update(json.dumps([name, self._table.column(name)], default=str).encode())
        return digest.hexdigest()

    @cached_property
    def _sizes(self) -> np.ndarray:  # [rows, 2] (height, width)
        rows = (self._table.row(row) for row in range(len(self._table.rows)))
        return np.array([_size(row, self._image_root) for row in rows], np.int64).reshape(-1, 2)


def _size(row: Mapping[str, Any], image_root: Path | None) -> tuple[int, int]:
    try:
        return image_size(*image_source(row, image_root))
    except BadSampleError:
        return UNKNOWN_SIZE

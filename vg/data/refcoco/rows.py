"""Reads the annotation and the image of one row of a published RefCOCO table."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vg.data.images import find_image
from vg.data.source import checked
from vg.errors import BadSampleError, DataError
from vg.types import Sample

_BOX_TOLERANCE = 1.0  # pixels between two formats of one box: both of its ends may be rounded to integers


class Schema(NamedTuple):
    """The meaning of the columns of a table."""

    expressions: str  # column with one expression or a list of them; identifies the schema
    box_format: Literal["xyxy", "xywh"]  # of the boxes, in pixels
    key: str  # column that identifies the object
    boxes: Literal["bbox", "boxes"] = "bbox"  # column with one box, or with a list of any length

    @property
    def columns(self) -> tuple[str, ...]:
        return self.expressions, self.key, self.boxes


LMMS = Schema("answer", "xywh", "question_id")  # lmms-lab/RefCOCO*, with pixels
SCHEMAS = (
    LMMS,
    Schema("captions", "xyxy", "ann_id"),  # jxu124/refcoco*, without pixels
    Schema("sent", "xywh", "ann_id"),  # one expression per row: JSON lines, joined and flattened formats
    Schema("caption", "xywh", "bbox_id"),  # JierunChen/Ref-L4, without pixels
    Schema("sent", "xywh", "ann_id", "boxes"),  # gRefCOCO: any number of objects per expression, including none
)
COLUMNS = (  # all columns that are read
    *dict.fromkeys(column for schema in SCHEMAS for column in schema.columns),
    *("kinds", "raw_anns", "image", "image_path", "file_name", "image_row", "category_id", "others"),
)


def detect_format(columns: Collection[str], where: str) -> Schema:
    """Return the schema of a table with these columns; raise DataError, naming `where`, if it is unknown."""
    for schema in SCHEMAS:
        if set(schema.columns) <= set(columns):
            return schema
    known = "; ".join(", ".join(schema.columns) for schema in SCHEMAS)
    raise DataError(
        f"{where}: the columns {sorted(columns)} are not a known RefCOCO schema; rename columns so that one of these "
        f"groups is complete: {known}"
    )


class Referent(NamedTuple):
    """The annotation in one row: an object, or in gRefCOCO any number of objects, with its expressions."""

    key: str
    boxes: np.ndarray  # [N, 4] float32, xyxy in pixels
    expressions: list[str]
    expression_types: list[str]  # parallel to expressions; "" if unknown

    def sample(self, image: np.ndarray, index: int, id: str) -> Sample:
        """Return the checked sample of the expression `index` with image [H, W, 3]; may raise BadSampleError."""
        phrase_ids = np.zeros(len(self.boxes), np.int64)
        return checked(
            Sample(id, image, (self.expressions[index],), self.boxes, phrase_ids, self.expression_types[index])
        )


def expressions_of(cell: object) -> list[str]:
    """Return the expressions in a cell of the expression column, "" for values that are not text.

    An empty cell counts as one expression: a bad sample is reported, a missing one would go unnoticed.
    """
    values = cell if isinstance(cell, list) and cell else [cell]
    return [value.strip() if isinstance(value, str) else "" for value in values]


def referent_of(row: Mapping[str, Any], schema: Schema) -> Referent:
    """Read the annotation of a row, but not its image; raises BadSampleError if a cell is unusable."""
    key = row.get(schema.key)
    if key is None:
        raise BadSampleError(f"{schema.key} is missing; every row needs one, because it identifies the object")
    expressions = expressions_of(row.get(schema.expressions))
    types = row.get("kinds") or [""] * len(expressions)
    if not isinstance(types, list) or len(types) != len(expressions):
        raise BadSampleError(f"{key}: kinds is {types!r}, expected a list with one per expression ({len(expressions)})")
    if schema.boxes == "boxes":
        if not isinstance(values := row.get("boxes"), list):
            raise BadSampleError(f"{key}: boxes is {values!r}, expected a list of boxes ([] if nothing is referred to)")
        boxes = [_to_xyxy(box, schema.box_format, f"{key}: a box") for box in values]
    else:
        boxes = [_to_xyxy(row.get("bbox"), schema.box_format, f"{key}: bbox")]
        if row.get("raw_anns") is not None:
            _check_box(row, schema, str(key), boxes[0])
    return Referent(str(key), np.array(boxes, np.float32).reshape(-1, 4), expressions, list(types))


def _check_box(row: Mapping[str, Any], schema: Schema, key: str, box: Sequence[float]) -> None:
    """Raise BadSampleError unless a box (xyxy) agrees with `raw_anns`, the COCO annotation (JSON, xywh)."""
    try:
        published = json.loads(row["raw_anns"])["bbox"]
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise BadSampleError(f"{key}: raw_anns is not a JSON object with a bbox ({error!r})") from error
    truth = _to_xyxy(published, "xywh", f"{key}: bbox of raw_anns")
    if np.abs(np.subtract(box, truth)).max() > _BOX_TOLERANCE:
        raise BadSampleError(
            f"{key}: bbox {row['bbox']}, read as {schema.box_format}, contradicts raw_anns, whose box is {published} "
            f"(x, y, width, height) = {list(truth)} (left, top, right, bottom); write bbox as {schema.box_format}"
        )


def _to_xyxy(value: Any, box_format: str, where: str) -> tuple[float, float, float, float]:
    try:
        x, y, right_or_width, bottom_or_height = (float(number) for number in value)
    except (TypeError, ValueError) as error:
        raise BadSampleError(
            f"{where} is {value!r}, expected four numbers ({box_format} in pixels); with the refer toolbox, use the "
            "instances.json that belongs to the refs file"
        ) from error
    if box_format == "xyxy":
        return x, y, right_or_width, bottom_or_height
    return x, y, x + right_or_width, y + bottom_or_height


def image_name(row: Mapping[str, Any]) -> str:
    """Return the image file that the row names, "" if none."""
    image = row.get("image")
    inside = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
    # file_name comes last: in some releases it contains the annotation id, and there is no such file.
    return str(row.get("image_path") or inside or row.get("file_name") or "")


def image_source(row: Mapping[str, Any], image_root: Path | None) -> tuple[Path | bytes, str]:
    """Return the image, its bytes or its file below `image_root`, and a name for messages, as read_image takes them.

    Raises:
        BadSampleError: no image, or no such file.
    """
    image, name = row.get("image"), image_name(row)
    pixels = image.get("bytes") if isinstance(image, Mapping) else image
    if isinstance(pixels, bytes):
        return pixels, name or "in the row"
    if not name:
        raise BadSampleError("no image: image, image_path and file_name are all empty; fill one of them")
    if image_root is None:
        raise BadSampleError(f"image {name} is not in the row; set image_root to the folder of the images")
    file = find_image(name, image_root)
    return file, str(file)


def sample_id(dataset: str, split: str, key: str, index: int) -> str:
    return f"{dataset}/{split}/{key}/{index}"

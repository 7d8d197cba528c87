"""One row of a table of referring expressions -> one sample per expression, whoever published the table."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vg.data.images import find_image, image_size, read_image
from vg.data.source import checked
from vg.errors import BadSampleError, DataError
from vg.types import Sample

_BOX_TOLERANCE = 1.0  # pixels between two spellings of one box: whole-number rounding of both its ends


@dataclass(frozen=True)
class Schema:
    """What the columns of a table mean."""

    expressions: str  # the column with one expression or with a list of them; it is what a schema is recognised by
    box_format: Literal["xyxy", "xywh"]  # of the column `bbox`, in pixels
    key: str  # the column that identifies the described object
    boxes: Literal["bbox", "boxes"] = "bbox"  # the column with its box, or with those of any number of objects

    @property
    def columns(self) -> tuple[str, ...]:
        return self.expressions, self.key, self.boxes


LMMS = Schema(
    "answer", "xywh", "question_id"
)  # lmms-lab/RefCOCO*, pixels inside; vg.data.synthetic.shapes draws such rows
SCHEMAS = (
    LMMS,
    Schema("captions", "xyxy", "ann_id"),  # jxu124/refcoco*, no pixels
    Schema("sent", "xywh", "ann_id"),  # one expression per row: json lines, and all forms that are joined or made flat
    Schema("caption", "xywh", "bbox_id"),  # JierunChen/Ref-L4, no pixels
    Schema("sent", "xywh", "ann_id", "boxes"),  # gRefCOCO: expressions that name any number of things, also none
)
COLUMNS = (  # all that is read of a row
    *dict.fromkeys(column for schema in SCHEMAS for column in schema.columns),
    *("kinds", "raw_anns", "image", "image_path", "file_name", "picture", "category_id", "others"),
)


def detect_format(columns: Collection[str], where: str) -> Schema:
    """The schema of a table with these columns; DataError, naming `where`, if it is none that we know."""
    for schema in SCHEMAS:
        if set(schema.columns) <= set(columns):
            return schema
    known = "; ".join(", ".join(schema.columns) for schema in SCHEMAS)
    raise DataError(
        f"{where}: the columns {sorted(columns)} are no known RefCOCO schema; rename columns so that one of these "
        f"sets is complete: {known}"
    )


@dataclass(frozen=True)
class Referent:
    """The annotation of one row: an object, or in gRefCOCO any number of them, and all that the row says about it."""

    key: str
    boxes: tuple[tuple[float, float, float, float], ...]  # xyxy in pixels
    expressions: tuple[str, ...]
    kinds: tuple[str, ...]  # parallel to expressions; "" where the row names none

    def sample(self, image: np.ndarray, number: int, id: str) -> Sample:
        """The checked sample of expression `number` on image [H, W, 3]; BadSampleError if it breaks a promise."""
        return checked(
            Sample(
                id=id,
                image=image,
                phrases=(self.expressions[number],),
                boxes=np.array(self.boxes, np.float32).reshape(-1, 4),  # [N, 4]
                phrase_ids=np.zeros(len(self.boxes), np.int64),
                expression_type=self.kinds[number],
            )
        )


def expressions_of(cell: object) -> list[str]:
    """The cell of the expression column as a list, one entry per expression; "" for what is not text.

    A cell without any still counts as one: it becomes a sample that cannot be loaded instead of vanishing.
    """
    values = cell if isinstance(cell, list) and cell else [cell]
    return [value.strip() if isinstance(value, str) else "" for value in values]


def referent_of(row: Mapping[str, Any], schema: Schema) -> Referent:
    """Read the annotation of a row; no pixels are touched.

    Raises:
        BadSampleError: the key or the box is missing or malformed, or the box contradicts `raw_anns`.
    """
    key = row.get(schema.key)
    if key is None:
        raise BadSampleError(f"{schema.key} is missing; it identifies the object, give every row one")
    expressions = expressions_of(row.get(schema.expressions))
    kinds = row.get("kinds") or [""] * len(expressions)
    if len(kinds) != len(expressions):
        raise BadSampleError(f"{key}: {len(kinds)} kinds for {len(expressions)} expressions; give one for each")
    return Referent(
        key=str(key),
        boxes=_boxes_of(row, schema, str(key)),
        expressions=tuple(expressions),
        kinds=tuple(kinds),
    )


def _boxes_of(row: Mapping[str, Any], schema: Schema, key: str) -> tuple[tuple[float, float, float, float], ...]:
    """xyxy pixels; `raw_anns`, where a table has it, is COCO's own annotation (JSON, xywh) and must agree."""
    if schema.boxes == "boxes":
        return tuple(_to_xyxy(box, schema.box_format, f"{key}: a box") for box in row["boxes"])
    box = _to_xyxy(row.get("bbox"), schema.box_format, f"{key}: bbox")
    if row.get("raw_anns") is None:
        return (box,)
    try:
        published = json.loads(row["raw_anns"])["bbox"]
    except (TypeError, KeyError, ValueError) as error:
        raise BadSampleError(f"{key}: raw_anns is not a JSON object with a bbox ({error!r})") from error
    truth = _to_xyxy(published, "xywh", f"{key}: bbox of raw_anns")
    if np.abs(np.subtract(box, truth)).max() > _BOX_TOLERANCE:
        raise BadSampleError(
            f"{key}: bbox {row['bbox']}, read as {schema.box_format}, contradicts raw_anns, whose box is {published} "
            f"(x, y, width, height) = {list(truth)} (left, top, right, bottom); write bbox as {schema.box_format}"
        )
    return (box,)


def _to_xyxy(value: Any, box_format: str, where: str) -> tuple[float, float, float, float]:
    try:
        x, y, right_or_width, bottom_or_height = (float(number) for number in value)
    except (TypeError, ValueError) as error:
        raise BadSampleError(
            f"{where} is {value!r}, expected four numbers ({box_format} in pixels); with the refer toolbox: take the "
            "instances.json that came with the refs file"
        ) from error
    if box_format == "xyxy":
        return x, y, right_or_width, bottom_or_height
    return x, y, x + right_or_width, y + bottom_or_height


def image_name(row: Mapping[str, Any]) -> str:
    """The file that the row names as its picture, "" if none."""
    image = row.get("image")
    inside = image.get("path") if isinstance(image, Mapping) else image if isinstance(image, str) else None
    # The file_name of RefCOCO's publishers can have the annotation's number in it and be no file: it comes last.
    return str(row.get("image_path") or inside or row.get("file_name") or "")


def image_of(row: Mapping[str, Any], image_root: Path | None) -> np.ndarray:
    """[H, W, 3] uint8 RGB: the pixels in the row's column `image`, else the file it names below `image_root`.

    Raises:
        BadSampleError: no picture, no such file or a damaged one; the message names the file.
    """
    return read_image(*_picture_of(row, image_root))


def image_size_of(row: Mapping[str, Any], image_root: Path | None) -> tuple[int, int]:
    """(height, width) in pixels of what `image_of` gives; raises as that does."""
    return image_size(*_picture_of(row, image_root))


def _picture_of(row: Mapping[str, Any], image_root: Path | None) -> tuple[Path | bytes | Image.Image, str]:
    """What to read the picture from, and what to call it."""
    image, name = row.get("image"), image_name(row)
    pixels = image.get("bytes") if isinstance(image, Mapping) else image
    if isinstance(pixels, bytes | Image.Image):
        return pixels, name or "in the row"
    if not name:
        raise BadSampleError("no picture: image, image_path and file_name are all empty; fill one of them")
    if image_root is None:
        raise BadSampleError(f"image {name} is not in the row; set image_root to the folder that holds the pictures")
    file = find_image(name, image_root)
    return file, str(file)


def samples_of(
    row: Mapping[str, Any], dataset: str = "refcoco", split: str = "train", image_root: Path | None = None
) -> list[Sample]:
    """One sample per expression of a row of any schema in `SCHEMAS`; they share the image, which is decoded once.

    Rows drawn by `vg.data.synthetic.shapes` have the schema of lmms-lab/RefCOCO*: `question_id`, `image` (PIL), `answer` (all
    expressions of the object), `bbox` [x, y, width, height] in pixels, and `kinds` (parallel to answer). Their samples
    have the ids `<dataset>/<split>/<question_id>/<number of the expression in the row>`.

    Raises:
        DataError: the columns are no known schema.
        BadSampleError: the row cannot be used; the message says what is wrong with it.
    """
    referent = referent_of(row, detect_format(row.keys(), f"{dataset} ({split})"))
    image = image_of(row, image_root)
    return [
        referent.sample(image, number, sample_id(dataset, split, referent.key, number))
        for number in range(len(referent.expressions))
    ]


def sample_id(dataset: str, split: str, key: str, number: int) -> str:
    return f"{dataset}/{split}/{key}/{number}"

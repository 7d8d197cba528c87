"""Tables of images and captions: JSON lines, CSV or parquet, a row per image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vg.data.expressions import IMAGE, read_rows
from vg.errors import DataError

SUFFIXES = (".jsonl", ".csv", ".parquet")


def read_table(file: Path, captions: str | None) -> Iterator[tuple[str, str | None]]:
    """Yield the image file and the caption of every row.

    Args:
        captions: column of the captions; in JSON lines and parquet also a key in it, such as "grounding.caption".

    Raises:
        DataError: the file cannot be read, has no such column, or a row has no image or a caption that is not text.
    """
    first = (captions or "").partition(".")[0]
    image = ""
    for location, row in _parquet_rows(file, first) if file.suffix == ".parquet" else read_rows(file):
        image = image or next((name for name in IMAGE if name in row), "")
        if captions and first not in row and first.lower() in row:  # `read_rows` has known names in lower case
            captions, first = captions.lower(), first.lower()
        if not image or (captions and first not in row):
            missing = f"{first} (--captions)" if image else f"{' or '.join(IMAGE)} (the image file)"
            raise DataError(f"{file}, {location}: no column {missing}; the columns are {', '.join(row)}")
        if not isinstance(name := row.get(image), str) or not name:
            raise DataError(f"{file}, {location}: {image} is {str(name)[:80]!r}, expected the name of an image file")
        yield name, text_at(row, captions, f"{file}, {location}") if captions else None


def text_at(row: Any, key: str, where: str) -> str | None:
    """Return the text of a key such as "grounding.caption", None if it is missing.

    Raises:
        DataError: the value is not text; the message begins with `where`.
    """
    for name in key.split("."):
        row = row.get(name) if isinstance(row, Mapping) else None
    if row is not None and not isinstance(row, str):
        raise DataError(f"{where}: {key} is {str(row)[:80]!r}, expected one caption, as text")
    return row


def _parquet_rows(file: Path, captions: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            used = [name for name in names if name in (*IMAGE, captions)]
            blocks = table.iter_batches(columns=used if {*used} & {*IMAGE} else names)  # all of them for the message
            rows = (row for block in blocks for row in block.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {file}: {error}") from error

"""The files of shards: WebDataset tar and parquet, in both of which images and lines are stored as they are.

    tar       KEY.jpg (or .png, ...) and KEY.json for every sample
    parquet   columns id, image (a `datasets` Image: bytes and path), width, height and annotation (the JSON line)

Samples are read by the positions of their bytes in the file, which are the same operation for both: parquet pages are
neither compressed nor encoded otherwise.
"""

from __future__ import annotations

import json
import mmap
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vg.data.shards.index import ROW, ShardFile, ShardFormat, file_entry
from vg.errors import DataError
from vg.files import replacing

COLUMNS = ("id", "image", "width", "height", "annotation")
_ROW_GROUP = 16  # samples; other readers decode a group to read one sample


class Entry(NamedTuple):
    """One sample as it is stored."""

    key: str  # name of its files in a tar; unique in the dataset
    id: str
    image: bytes  # an image file
    suffix: str  # ".jpg"
    line: bytes  # see vg.data.shards.lines
    size: tuple[int, int]  # (height, width) of the image in pixels
    image_number: int  # equal for samples of one image
    coco_id: int = -1  # of the image, from its key; -1: it is no image of COCO


def write_shard(file: Path, format: ShardFormat, entries: Iterable[Entry]) -> tuple[ShardFile, np.ndarray]:
    """Write one shard under a temporary name, and rename it; the same entries give the same bytes.

    Returns:
        The entry of the file for the index, and the rows of its samples: [samples] of ROW.
    """
    rows: list[tuple[int, ...]] = []
    with replacing(file, is_file=True) as partial:
        write = _write_tar if format == "tar" else _write_parquet
        for (image_start, line_start), entry in write(partial, entries):
            lengths = len(entry.image), len(entry.line)
            rows.append((image_start, line_start, *lengths, *entry.size, entry.image_number, entry.coco_id))
    return file_entry(file, len(rows)), np.array(rows, ROW)


Written = Iterator[tuple[tuple[int, int], Entry]]  # positions of image and line, and their sample


def _write_tar(path: Path, entries: Iterable[Entry]) -> Written:
    with path.open("wb") as file:
        for entry in entries:
            starts = [
                _add_member(file, f"{entry.key}{suffix}", content)
                for suffix, content in ((entry.suffix, entry.image), (".json", entry.line))
            ]
            yield (starts[0], starts[1]), entry
        end = file.tell() + 2 * tarfile.BLOCKSIZE
        file.write(bytes(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - file.tell()))


def _add_member(file: BinaryIO, name: str, content: bytes) -> int:
    """Append a file; return the position of its content."""
    member = tarfile.TarInfo(name)  # time 0, owner 0
    member.size = len(content)
    file.write(member.tobuf(tarfile.USTAR_FORMAT))
    start = file.tell()
    file.write(content)
    file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
    return start


def _write_parquet(path: Path, entries: Iterable[Entry]) -> Written:
    import pyarrow
    import pyarrow.parquet

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    types = (pyarrow.string(), image, pyarrow.int32(), pyarrow.int32(), pyarrow.string())
    features = {
        "id": {"dtype": "string", "_type": "Value"},
        "image": {"_type": "Image"},
        "width": {"dtype": "int32", "_type": "Value"},
        "height": {"dtype": "int32", "_type": "Value"},
        "annotation": {"dtype": "string", "_type": "Value"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema(zip(COLUMNS, types, strict=True), metadata)
    options: dict[str, Any] = {
        "compression": "none",
        "use_dictionary": False,
        "write_statistics": False,  # they would repeat whole images
        "data_page_version": "1.0",
    }
    written: list[Entry] = []
    with pyarrow.parquet.ParquetWriter(path, schema, **options) as writer:
        for group in _groups(entries):
            rows = [(e.id, {"bytes": e.image, "path": e.key + e.suffix}, *e.size[::-1], e.line.decode()) for e in group]
            columns = [pyarrow.array(column, type) for column, type in zip(zip(*rows, strict=True), types, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
            written += group
    yield from zip(_positions(path, written), written, strict=True)


def _groups(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    for entry in entries:
        group.append(entry)
        if len(group) == _ROW_GROUP:
            yield group
            group = []
    if group:
        yield group


def _positions(path: Path, entries: list[Entry]) -> Iterator[tuple[int, int]]:
    """Yield where the bytes of image and line of each sample are in a parquet file, which stores them after length."""
    import pyarrow.parquet

    if not entries:
        return
    metadata = pyarrow.parquet.read_metadata(path)
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    columns = names.index("image.bytes"), names.index("annotation")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            starts = [group.column(column).data_page_offset for column in columns]
            for entry in entries[number * _ROW_GROUP : number * _ROW_GROUP + group.num_rows]:
                found = []
                for i, value in enumerate((entry.image, entry.line)):
                    prefixed = len(value).to_bytes(4, "little") + value
                    found.append(content.find(prefixed, starts[i]) + 4)
                    if found[-1] == 3:
                        raise DataError(f"{path}: pyarrow has encoded values, use another version or --format tar")
                    starts[i] = found[-1] + len(value)
                yield found[0], found[1]


def check_columns(file: Path) -> None:
    """Raise DataError unless a parquet file has the columns of a shard."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(file).names
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not a parquet file ({error}); copy the shard again") from error
    if missing := [name for name in COLUMNS if name not in names]:
        raise DataError(
            f"{file} has no column {', '.join(missing)}, only {', '.join(names)}; write the shard again with vg shard"
        )

"""The index of a dataset in shards: index.json lists the shards, samples.npy has the position of every sample in them.

A folder of shards contains

    index.json      format and version, shards with samples, bytes and SHA-256, provenance, classes
    samples.npy     one row of ROW per sample, in the order of the shards; it is mapped, not read
    000000.tar      or .parquet: the shards, see vg.data.shards.containers
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from vg.data.detection.odvg_lines import LabelMap
from vg.data.source import Provenance
from vg.errors import DataError
from vg.files import replacing, sha256_of, write_json

ShardFormat: TypeAlias = Literal["tar", "parquet"]

VERSION = 1
INDEX, SAMPLES = "index.json", "samples.npy"
ROW = np.dtype(
    [
        ("image_start", "<i8"),  # position of the bytes of the image in the file of the shard
        ("line_start", "<i8"),  # and of those of the JSON line
        ("image_bytes", "<u4"),
        ("line_bytes", "<u4"),
        ("height", "<u4"),  # of the image, in pixels
        ("width", "<u4"),
        ("image", "<u4"),  # equal for samples of one image, which are neighbors
        ("coco_id", "<i8"),  # of the image, by which other datasets know it; -1 if its name has none
    ]
)


class ShardFile(NamedTuple):
    """One file of the dataset; `samples` is the number of samples in it."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of index.json."""

    format: ShardFormat
    shards: Sequence[ShardFile]
    table: ShardFile  # samples.npy
    provenance: Provenance
    classes: Sequence[str] | None  # names by label; None without lines of numbered classes
    category_ids: Sequence[Any] | None  # ids of the classes in result files, if they have any
    all_detections: bool  # every line has numbered classes
    skipped: int  # bad samples of the original dataset that were left out
    settings: Mapping[str, Any]  # what the shards were written from

    @cached_property
    def ends(self) -> np.ndarray:
        """[shards] int64, the index after the last sample of each shard."""
        return np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)

    @property
    def label_map(self) -> LabelMap | None:
        return None if self.classes is None else {label: (label, name) for label, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.shards) else 0

    def write(self, folder: Path) -> None:
        """Write index.json atomically; from then on the shards are complete."""
        write_json(folder / INDEX, self.to_json())

    def to_json(self) -> dict[str, Any]:
        own = {"table": self.table._asdict(), "shards": [shard._asdict() for shard in self.shards]}
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {"version": VERSION} | values | own | {"provenance": asdict(self.provenance)}

    @classmethod
    def parse(cls, content: bytes, where: str) -> Index:
        """Parse index.json.

        Raises:
            DataError: it is not an index, or one of another version; the message begins with `where`.
        """
        try:
            values = json.loads(content)
            version = values.pop("version")
            if version != VERSION:
                raise DataError(
                    f"{where} has version {version}, this vg reads version {VERSION}; write the shards again with "
                    "vg shard, or use the vg that wrote them"
                )
            shards = [ShardFile(**shard) for shard in values.pop("shards")]
            provenance, table = Provenance(**values.pop("provenance")), ShardFile(**values.pop("table"))
            index = cls(shards=shards, table=table, provenance=provenance, **values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            fix = "path is a folder that vg shard has written; copy its index.json again"
            raise DataError(f"{where} is not an index of shards ({error!r}); {fix}") from error
        for entry in (table, *shards):  # of which a cache writes copies
            pattern = re.escape(SAMPLES) if entry is table else rf"\d+\.{re.escape(str(index.format))}"
            if not re.fullmatch(pattern, str(entry.file), re.ASCII):
                raise DataError(
                    f"{where} names the file {entry.file!r}, which vg shard never writes; copy its index.json again"
                )
        return index


def map_rows(file: Path, index: Index) -> np.ndarray:
    """Map samples.npy: [samples] of ROW; raises DataError if it does not belong to the index."""
    try:
        rows = np.asarray(np.load(file, mmap_mode="r"))  # items of np.memmap are slower
    except (OSError, ValueError) as error:  # ValueError: not a .npy file, or a truncated one
        raise DataError(f"{file} cannot be read ({error}); copy it again, or write it with vg shard") from error
    if rows.dtype != ROW or rows.shape != (len(index),):
        found = f"{rows.dtype} {list(rows.shape)}"
        raise DataError(f"{file} does not belong to index.json, which has {len(index)} samples; it has {found}")
    return rows


def write_rows(folder: Path, rows: Iterable[np.ndarray], length: int) -> ShardFile:
    """Write samples.npy atomically and return its entry.

    Args:
        rows: the rows of the samples in the order of the shards: any number of [samples] of ROW.
        length: number of all rows.
    """
    with replacing(folder / SAMPLES, is_file=True) as partial, partial.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(ROW), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        for some in rows:
            file.write(some.astype(ROW, copy=False).tobytes())
    return file_entry(folder / SAMPLES, length)


def file_entry(file: Path, samples: int) -> ShardFile:
    """Return name, size and SHA-256 of a file."""
    return ShardFile(file.name, samples, file.stat().st_size, sha256_of(file))

"""The plan of the shards of a dataset, and the writing of one of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vg.data.detection.vocabulary import Vocabulary
from vg.data.image_files import COCO_KEY
from vg.data.images import read_image
from vg.data.shards.containers import Entry, write_shard
from vg.data.shards.index import ShardFile, ShardFormat
from vg.data.shards.lines import line_of
from vg.data.shards.source import Shards
from vg.data.source import Provenance, Source, checked
from vg.data.subset import Subset
from vg.errors import BadSampleError
from vg.files import read_json, write_bytes
from vg.types import Sample

logger = logging.getLogger(__name__)

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}  # by format of PIL


class Record(NamedTuple):
    """What is known of a finished shard before the index is written; a small file beside it."""

    shard: ShardFile
    skipped: int  # samples of the source, because they are bad
    detections: int  # lines of numbered classes
    rows: Sequence[Sequence[int]]  # of the index


@dataclass
class ShardJob:
    """What the processes need to write any shard."""

    source: Source[Sample]
    vocabulary: Vocabulary | None
    provenance: Provenance
    folder: Path
    format: ShardFormat
    skip: bool
    order: np.ndarray  # [samples] index in the source
    images: np.ndarray  # [samples] number of the image, ascending
    ends: np.ndarray  # [shards] index in `order` after the last sample
    files: Sequence[Path | None]  # [samples in the source] image files
    coco_ids: np.ndarray  # [samples in the source] of their images; -1: none

    @classmethod
    def of(cls, source: Source[Sample], folder: Path, format: ShardFormat, limit: int, skip: bool) -> ShardJob:
        """Plan all shards; see write_shards."""
        provenance, indices = source.provenance, np.arange(len(source))
        if isinstance(source, Subset):  # whose vocabulary and rows are those of its source
            indices = source.indices
            source = source.source
        groups = source.image_groups(0)
        groups = indices if groups is None else groups[indices]
        _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
        images = np.argsort(np.argsort(first))[inverse]  # numbered by their first sample
        order = np.argsort(images, kind="stable")
        images = images[order]
        image_ends = np.append(np.flatnonzero(np.diff(images)) + 1, len(images))
        ends = [0]
        while ends[-1] < len(images):
            wanted = min(ends[-1] + limit, len(images))
            after = int(np.searchsorted(image_ends, wanted, side="right"))  # the first image that ends later
            last = int(image_ends[after - 1]) if after else 0
            ends.append(last if last > ends[-1] else int(image_ends[after]))
        keys = source.image_keys() or [""] * len(source)
        vocabulary: Vocabulary | None = getattr(source, "vocabulary", None)
        return cls(
            source=source,
            vocabulary=vocabulary,
            provenance=provenance,
            folder=folder,
            format=format,
            skip=skip,
            order=indices[order],
            images=images,
            ends=np.array(ends[1:], np.int64),
            files=source.image_files(),
            coco_ids=np.array([_coco_id(key) for key in keys], np.int64),
        )

    def write(self, number: int) -> int:
        """Write a shard, and then its record, which marks it as finished."""
        start = int(self.ends[number - 1]) if number else 0
        positions = range(start, int(self.ends[number]))
        counts = {"skipped": 0, "detections": 0}
        file = self.folder / f"{number:06d}.{self.format}"
        shard, rows = write_shard(file, self.format, self._entries(positions, counts))
        record = Record(shard=shard, rows=rows.tolist(), **counts)
        write_bytes(
            record_file(self.folder, number), json.dumps(record._asdict() | {"shard": shard._asdict()}).encode()
        )
        return number

    def _entries(self, positions: range, counts: dict[str, int]) -> Iterator[Entry]:
        image, content, suffix = np.zeros((0, 0, 3), np.uint8), b"", ""  # the last one
        for position in positions:
            index = int(self.order[position])
            try:
                sample = self.source.load(index, 0)
                checked(sample)
                if not np.array_equal(sample.image, image):
                    content, suffix = image_file(sample.image, self._original(index))
                    image = sample.image
                is_detection = self.vocabulary is not None and sample.phrases is self.vocabulary.phrases
                key = f"{position:010d}"
                classes = self.vocabulary.names if self.vocabulary and is_detection else None
                line = line_of(sample, self._name(index) or key + suffix, classes)
            except BadSampleError as error:
                if not self.skip:
                    raise
                logger.warning("skipped a bad sample: %s", error)
                counts["skipped"] += 1
                continue
            counts["detections"] += is_detection
            number, coco_id = int(self.images[position]), int(self.coco_ids[index])
            yield Entry(key, sample.id, content, suffix, line, image.shape[:2], number, coco_id)

    def _name(self, index: int) -> str:
        """Return the name of the image of a sample of the source; empty if it is not known."""
        if (file := self.files[index]) is not None:
            return file.name
        if isinstance(self.source, Shards):
            return str(self.source.row(index)["filename"])
        return f"{coco_id:012d}.jpg" if (coco_id := self.coco_ids[index]) >= 0 else ""

    def _original(self, index: int) -> bytes | None:
        """Return the image file of a sample of the source, if it has one."""
        if (file := self.files[index]) is not None:
            return file.read_bytes()
        return self.source.image_bytes(index)


def _coco_id(key: str) -> int:
    number = key.removeprefix(COCO_KEY)
    return int(number) if key.startswith(COCO_KEY) and number.isdecimal() else -1


def image_file(image: np.ndarray, original: bytes | None) -> tuple[bytes, str]:
    """Return the bytes and the suffix of an image file with these pixels.

    Args:
        image: [H, W, 3] uint8, RGB.
        original: a file of the image, which is used unless it decodes to other pixels (those with an EXIF orientation
            may) or its format is uncommon. The result is a PNG then.
    """
    if original is not None:
        with Image.open(BytesIO(original)) as opened:
            suffix = SUFFIXES.get(opened.format or "")
        if suffix and np.array_equal(read_image(original, "that was loaded"), image):
            return original, suffix
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue(), ".png"


def record_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


def read_record(folder: Path, number: int) -> Record | None:
    """Return what is recorded of a shard; None if it is not finished, or its file is not of that size."""
    try:
        values = read_json(record_file(folder, number), dict)
        record = Record(ShardFile(**values.pop("shard")), **values)
        return record if (folder / record.shard.file).stat().st_size == record.shard.bytes else None
    except (OSError, KeyError, TypeError):
        return None

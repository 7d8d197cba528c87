"""The images that `vg label` labels, cut into shards that do not depend on who labels them."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from vg.data.image_files import list_images
from vg.data.images import find_image, read_image
from vg.data.shards.index import INDEX
from vg.data.shards.labels import digest_of
from vg.data.shards.source import Shards, ShardsConfig
from vg.errors import BadSampleError, ConfigError, DataError
from vg.files import MOST_LISTED
from vg.inference.arguments import check_count
from vg.labeling.tables import SUFFIXES, read_table, text_at

_SURROGATE = re.compile("[\ud800-\udfff]")  # characters that are not valid Unicode
_NUM_TOGETHER = 100_000  # rows that are converted to a block of columns at a time


class PlannedImage(NamedTuple):
    """An image that is not read yet."""

    name: str  # `filename` of its line
    read: Callable[[], np.ndarray]  # -> [H, W, 3] uint8, RGB; raises BadSampleError
    caption: str | None = None
    extra: Mapping[str, Any] = {}  # further keys of its line


class Plan(Protocol):
    """Images in shards."""

    digest: str  # of the names and captions of all images, in their order
    num_images: int

    def __len__(self) -> int:
        """Number of shards."""

    def size(self, shard: int) -> int:
        """Number of images of a shard."""

    def images(self, shard: int) -> list[PlannedImage]:
        """The images of a shard, in order; it is downloaded if it is not here."""

    def train_data(self, output: str) -> dict[str, str]:
        """Return the settings of a dataset of these images and the labels in a folder."""


class FilePlan:
    """Image files, in runs of `shard_size`; 100 bytes of memory for an image and its caption.

    Pixels are those that training reads: the EXIF orientation is not applied.

    Args:
        rows: name below `root` and caption of every image.
        skips: an image whose name or caption is not valid Unicode is one that cannot be read.

    Raises:
        DataError: there are no images, or without `skips` some whose name or caption is not valid Unicode.
    """

    def __init__(self, root: Path, rows: Iterator[tuple[str, str | None]], shard_size: int, skips: bool):
        self._root, self._shard_size = root, shard_size
        digest = hashlib.sha256()
        blocks, invalid = [], []
        while block := list(islice(rows, _NUM_TOGETHER)):
            digest.update(repr(block).encode("utf-8", "surrogatepass"))
            names, captions = zip(*block, strict=True)
            blocks.append(pa.table({"name": _packed(names), "caption": _packed(captions)}))
            invalid += [row[0] for row in block if any(map(_SURROGATE.search, filter(None, row)))]
        if invalid and not skips:
            shown = ", ".join(invalid[:MOST_LISTED]).encode(errors="backslashreplace").decode()
            more = ", ..." * (len(invalid) > MOST_LISTED)
            raise DataError(
                f"{root}: images whose name or caption is not valid Unicode: {shown}{more} ({len(invalid)} in all); "
                "correct them, or leave them out with --bad-images skip"
            )
        if not blocks:
            raise DataError(f"{root}: no images to label")
        self._table = pa.concat_tables(blocks)
        self.num_images, self.digest = len(self._table), digest.hexdigest()

    def __len__(self) -> int:
        return -(-self.num_images // self._shard_size)

    def size(self, shard: int) -> int:
        return min(self._shard_size, self.num_images - shard * self._shard_size)

    def images(self, shard: int) -> list[PlannedImage]:
        columns = self._table.slice(shard * self._shard_size, self._shard_size).to_pydict()
        rows = zip(_unpacked(columns["name"]), _unpacked(columns["caption"]), strict=True)
        return [PlannedImage(name, partial(_read, name, self._root, caption), caption) for name, caption in rows]

    def train_data(self, output: str) -> dict[str, str]:
        return {"name": "odvg", "path": output, "image_root": str(self._root)}


class ShardsPlan:
    """The images of a dataset in shards; an image of several samples is labeled once, with captions every sample.

    The line of an image has the `id` and the index (`sample`) of its first sample.

    Args:
        captions: key of the caption in the line of a sample.
    """

    def __init__(self, source: Shards, captions: str | None):
        self._source, self._captions = source, captions
        images = source.image_groups(0)  # [samples]
        first = np.ones(len(images), bool)
        first[1:] = np.diff(images) != 0
        self._samples = np.flatnonzero(first) if captions is None else np.arange(len(images))  # of every image
        self._ends = np.searchsorted(self._samples, source.shard_ends())  # [shards]
        self.num_images = len(self._samples)
        self.digest = digest_of(source.fingerprint(), captions)

    def __len__(self) -> int:
        return len(self._ends)

    def size(self, shard: int) -> int:
        return int(self._ends[shard] - (self._ends[shard - 1] if shard else 0))

    def images(self, shard: int) -> list[PlannedImage]:
        end = int(self._ends[shard])
        return [self._image(int(sample)) for sample in self._samples[end - self.size(shard) : end]]

    def train_data(self, output: str) -> dict[str, str]:
        return {"name": "shards", "path": self._source.path, "labels": output}

    def _image(self, sample: int) -> PlannedImage:
        row = self._source.row(sample)
        name = str(row["filename"])
        caption = text_at(row, self._captions, f"sample {row['id']}") if self._captions else None
        return PlannedImage(name, partial(self._read, sample, name), caption, {"id": row["id"], "sample": sample})

    def _read(self, sample: int, name: str) -> np.ndarray:
        return read_image(self._source.image_bytes(sample), name)


def _packed(texts: Sequence[str | None]) -> pa.Array:
    """Return texts as an array; not of strings, which cannot have the surrogates of names that are not UTF-8."""
    return pa.array([None if text is None else text.encode("utf-8", "surrogatepass") for text in texts], pa.binary())


def _unpacked(values: Sequence[bytes | None]) -> Iterator[Any]:
    return (None if value is None else value.decode("utf-8", "surrogatepass") for value in values)


def _read(name: str, root: Path, caption: str | None) -> np.ndarray:
    if caption and _SURROGATE.search(caption):  # `read_batches` checks the name
        raise BadSampleError(f"image {name}: its caption is not valid Unicode; correct it")
    file = find_image(name, root)
    return read_image(file, str(file))


def open_plan(
    data: str, captions: str | None, image_root: str | None, shard_size: int, bad_images: str = "error"
) -> Plan:
    """Open the images of a folder, of a pattern such as photos/*.jpg, of a table, or of a dataset in shards.

    An image of several rows of a table is labeled once, with captions every row.

    Args:
        captions: column of a table (vg.labeling.tables), or key in the lines of shards, with a caption of each image.
        image_root: folder of the images of a table; by default that of the table.
        shard_size: images of a shard, where the data has none.
        bad_images: "error" or "skip", for names and captions that are not valid Unicode.

    Raises:
        DataError: there are no images, a table cannot be read, or see `bad_images`.
        ConfigError: an option that this data does not have.
    """
    check_count(shard_size, "--shard-size")
    path, skips = Path(data), bad_images == "skip"
    if path.suffix in SUFFIXES and path.is_file():
        root = Path(image_root) if image_root is not None else path.resolve().parent
        if not root.is_dir():
            raise DataError(f"--image-root {root} is not a folder; it contains the images that {data} names")
        rows = read_table(path, captions)
        return FilePlan(root, rows if captions else iter(dict.fromkeys(rows)), shard_size, skips)
    if "://" in data or (path / INDEX).is_file():
        if image_root is not None:
            raise ConfigError(f"--image-root {image_root}: {data} has its images in shards; leave the option out")
        return ShardsPlan(ShardsConfig(path=data).build(), captions)
    for option, value in (("--captions", captions), ("--image-root", image_root)):
        if value is not None:
            raise ConfigError(f"{option} {value}: {data} is not a table that names images ({', '.join(SUFFIXES)})")
    if path.is_dir():
        root, names = path, list_images(path)
    elif glob.has_magic(data):
        root = Path(os.path.dirname(re.split(r"[*?[]", data)[0]))
        names = sorted(os.path.relpath(file, root) for file in glob.iglob(data, recursive=True) if os.path.isfile(file))
    else:
        problem = "is a single file" if path.exists() else "does not exist"
        raise DataError(
            f"{data} {problem}; expected a folder of images, a pattern such as 'photos/*.jpg', a table of images "
            f"({', '.join(SUFFIXES)}), or a dataset that vg shard has written"
        )
    if not names:
        raise DataError(f"{data} contains no images")
    return FilePlan(root, ((name, None) for name in names), shard_size, skips)

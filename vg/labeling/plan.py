"""The images that `vg label` labels, cut into shards that do not depend on who labels them."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from vg.data.images import find_image, list_images, read_image
from vg.errors import ConfigError, DataError
from vg.labeling.tables import SUFFIXES, read_table

_NUM_TOGETHER = 100_000  # rows that are converted to a block of columns at a time


class PlannedImage(NamedTuple):
    """An image that is not read yet."""

    name: str  # `filename` of its line
    read: Callable[[], np.ndarray]  # -> [H, W, 3] uint8, RGB; raises BadSampleError
    caption: str | None = None


class Plan(Protocol):
    """Images in shards."""

    image_root: str  # to train on the labels
    digest: str  # of the names and captions of all images, in their order
    num_images: int

    def __len__(self) -> int:
        """Number of shards."""

    def size(self, shard: int) -> int:
        """Number of images of a shard."""

    def images(self, shard: int) -> list[PlannedImage]:
        """The images of a shard, in order."""


class FilePlan:
    """Image files, in runs of `shard_size`; 100 bytes of memory for an image and its caption.

    Pixels are those that training reads: the EXIF orientation is not applied.

    Args:
        rows: name below `root` and caption of every image.
    """

    def __init__(self, root: Path, rows: Iterator[tuple[str, str | None]], shard_size: int):
        self.image_root = str(root)
        self._root, self._shard_size = root, shard_size
        digest = hashlib.sha256()
        blocks = []
        while block := list(islice(rows, _NUM_TOGETHER)):
            digest.update(repr(block).encode("utf-8", "surrogatepass"))
            names, captions = zip(*block, strict=True)
            try:
                columns = {"name": pa.array(names, pa.string()), "caption": pa.array(captions, pa.string())}
            except UnicodeEncodeError as error:
                raise DataError(f"{root}: {error.object!r} is not valid Unicode; rename it") from error
            blocks.append(pa.table(columns))
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
        names = zip(columns["name"], columns["caption"], strict=True)
        return [PlannedImage(name, partial(_read, name, self._root), caption) for name, caption in names]


def _read(name: str, root: Path) -> np.ndarray:
    file = find_image(name, root)
    return read_image(file, str(file))


def open_plan(data: str, captions: str | None, image_root: str | None, shard_size: int) -> Plan:
    """Open the images of a folder, of a pattern such as photos/*.jpg, or of a table, see vg.labeling.tables.

    Args:
        captions: column with a caption of each image.
        image_root: folder of the images of a table; by default that of the table.
        shard_size: images of a shard.

    Raises:
        DataError: there are no images, or a table cannot be read.
        ConfigError: an option that this data does not have.
    """
    if shard_size < 1:
        raise ConfigError(f"--shard-size {shard_size}: expected at least 1")
    path = Path(data)
    if path.suffix in SUFFIXES and path.is_file():
        root = Path(image_root) if image_root is not None else path.resolve().parent
        if not root.is_dir():
            raise DataError(f"--image-root {root} is not a folder; it contains the images that {data} names")
        return FilePlan(root, read_table(path, captions), shard_size)
    for option, value in (("--captions", captions), ("--image-root", image_root)):
        if value is not None:
            raise ConfigError(f"{option} {value}: {data} is not a table ({', '.join(SUFFIXES)}) that names images")
    if path.is_dir():
        root, names = path, list_images(path)
    elif glob.has_magic(data):
        root = Path(os.path.dirname(re.split(r"[*?[]", data)[0]))
        names = sorted(os.path.relpath(file, root) for file in glob.iglob(data, recursive=True) if os.path.isfile(file))
    else:
        raise DataError(
            f"{data} does not exist; it is a folder of images, a pattern such as 'photos/*.jpg', or a table of images "
            f"({', '.join(SUFFIXES)})"
        )
    if not names:
        raise DataError(f"{data} contains no images")
    return FilePlan(root, ((name, None) for name in names), shard_size)

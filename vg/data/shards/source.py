"""Samples of a dataset in shards, which vg shard writes, from a folder or a URL."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.vocabulary import Vocabulary, VocabularyConfig
from vg.data.image_files import COCO_KEY
from vg.data.shards.containers import check_columns
from vg.data.shards.index import INDEX, Index, map_rows
from vg.data.shards.lines import LineReader
from vg.data.shards.storage import open_storage
from vg.data.source import Source
from vg.errors import DataError
from vg.files import sha256_of
from vg.settings import Settings
from vg.types import Sample

_OPEN_FILES = 64  # shards that a process keeps open


@dataclass
class ShardsConfig(Settings):
    """Which shards to read."""

    name: Literal["shards"] = "shards"
    path: str = field(kw_only=True)
    """The folder that vg shard has written, or its URL: s3://, gs://, hf://, https:// and all others that fsspec opens,
    for which a package such as s3fs may be necessary."""
    cache: str | None = None
    """Folder for shards of a URL, which processes and datasets may share; ~/.cache/vg/shards by default."""
    cache_gb: Annotated[float, Field(gt=0)] = 100.0
    """Gigabytes (10^9 bytes) of shards that the cache may have; the least recently used ones are deleted. Downloads in
    progress may exceed it by one shard per process, and a process frees deleted ones when it opens another."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """For numbered classes, all of which are in the shards, see vg.data.detection.vocabulary."""
    captions: Literal["phrases", "whole"] = "phrases"
    """Prompt of a sample with a caption, see vg.data.detection.odvg."""
    labels: str | None = None
    """Folder of labels that vg label has written for these shards; they replace those in the shards."""

    @classmethod
    def miniature(cls, folder: Path) -> ShardsConfig:
        """Write a tiny dataset and return its settings, for tests."""
        from vg.data.shards.write import write_shards

        write_shards(OdvgConfig.miniature(folder), folder / "shards", samples_per_shard=3)
        return cls(path=str(folder / "shards"))

    def build(self) -> Shards:
        if self.labels is not None:
            from vg.data.shards.labels import LabeledShards

            return LabeledShards(self, self.labels)
        return Shards(self)


class Shards(Source[Sample]):
    """Samples in shards; nothing but the index is read before the first sample.

    A sample equals that of the dataset that was written, where settings of vocabulary and captions are equal.

    Raises:
        DataError: there are no shards, their index is of another version, or the vocabulary does not fit their classes.
    """

    def __init__(self, config: ShardsConfig) -> None:
        self.path = config.path
        self._storage = open_storage(config.path, config.cache, config.cache_gb)
        content = self._storage.read_index()
        self.index = self._parsed(Index.parse(content, f"{config.path.rstrip('/')}/{INDEX}"))
        self.provenance = self.index.provenance
        self._digest = hashlib.sha256(content).hexdigest()
        self.vocabulary: Vocabulary | None = None
        if self.index.classes is not None:
            self.vocabulary = Vocabulary(self.index.classes, config.vocabulary, config.path)
            if self.index.category_ids is not None:
                ids = [self.index.category_ids[label] for label in self.vocabulary.used]
                self.category_ids = dict(zip(self.vocabulary.phrases, ids, strict=True))
            if self.index.all_detections and config.vocabulary.negatives is None:
                self.num_classes = len(self.vocabulary.names)
        elif config.vocabulary != VocabularyConfig():
            unused = "vocabulary is not used: it is for numbered classes, of which these shards have none"
            warnings.warn(f"{config.path}: {unused}", stacklevel=3)
        self._reader = LineReader(config.path, self.index.label_map, self.vocabulary, config.captions == "whole")
        self._starts = np.concatenate([[0], self.index.ends])  # [shards + 1]
        self._open_locally()

    def _parsed(self, index: Index) -> Index:
        return index

    def _open_locally(self) -> None:
        self._rows = map_rows(self._storage.file(self.index.table), self.index)
        self._files: OrderedDict[int, _Descriptor] = OrderedDict()  # by number of the shard, last used last

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the map, which would be copied, and open files; a process with another start method opens them."""
        return {name: value for name, value in vars(self).items() if name not in ("_rows", "_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_locally()

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, index: int, epoch: int) -> Sample:
        """Return one sample; the epoch matters where the vocabulary samples phrases.

        Raises:
            BadSampleError: the message names the shard and the sample.
            DataError: a shard is missing, truncated or changed, or cannot be downloaded.
        """
        text, location = self._line(index)
        return self._reader.sample(self._reader.row(text, location), self.image_bytes(index), location, epoch, index)

    def row(self, index: int) -> dict[str, Any]:
        """Return the decoded line of a sample; raises as `load`."""
        return self._reader.row(*self._line(index))

    def shard_ends(self) -> np.ndarray:
        return self.index.ends

    def image_sizes(self, epoch: int) -> np.ndarray:
        return np.stack([self._rows["height"], self._rows["width"]], axis=1).astype(np.int64)

    def image_groups(self, epoch: int) -> np.ndarray:
        return self._rows["image"].astype(np.int64)

    def image_keys(self) -> list[str]:
        """Return the key of each image of COCO; other images are known to these shards only."""
        rows = self._rows
        pairs = zip(rows["coco_id"].tolist(), rows["image"].tolist(), strict=True)
        return [f"{self.own_key}{image}" if coco_id < 0 else f"{COCO_KEY}{coco_id}" for coco_id, image in pairs]

    @property
    def own_key(self) -> str:
        """What the keys of images that are known to these shards only begin with; the index of the image follows."""
        return f"shards/{self._digest[:12]}/"

    def fingerprint(self) -> str:
        """Return the SHA-256 of the index, which has that of every shard."""
        return self._digest

    def damaged_files(self) -> Iterator[str]:
        """Read all files and yield a message for each whose checksum is not that of the index, or that is missing."""
        for entry in (self.index.table, *self.index.shards):
            try:
                if sha256_of(self._storage.file(entry)) != entry.sha256:
                    yield f"{self._storage.location(entry)}: its SHA-256 is not that of {INDEX}"
            except DataError as error:
                yield str(error)

    def image_bytes(self, index: int) -> bytes:
        """Return the image file of a sample; raises as `load`."""
        return self._read(index, "image")[0]

    def _line(self, index: int) -> tuple[bytes, str]:
        """Return the line of a sample, and its location."""
        return self._read(index, "line")

    def _read(self, index: int, what: Literal["image", "line"]) -> tuple[bytes, str]:
        """Return the image file or the line of a sample in a shard, and its location."""
        image_start, line_start, image_bytes, line_bytes, *_ = self._rows[index].item()
        start, length = (image_start, image_bytes) if what == "image" else (line_start, line_bytes)
        number = int(np.searchsorted(self.index.ends, index, side="right"))
        location = f"{self._storage.location(self.index.shards[number])}, sample {index - self._starts[number]}"
        return self._file(number).read(length, start, location), location

    def _file(self, number: int) -> _Descriptor:
        """Return the open file of a shard."""
        file = self._files.pop(number, None)
        if file is None:
            file = self._open(number)
            for other, descriptor in list(self._files.items()):
                if descriptor.is_deleted():  # from the cache; it takes space on the disk as long as it is open
                    self._files.pop(other, None)
        self._files[number] = file
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def _open(self, number: int) -> _Descriptor:
        entry = self.index.shards[number]
        for _ in range(3):
            path = self._storage.file(entry)
            try:
                file = _Descriptor(path)
                if self.index.format == "parquet":
                    check_columns(path)
                return file
            except FileNotFoundError:  # another process has made room in the cache
                continue
            except OSError as error:
                raise DataError(f"the shard {path} cannot be read: {error.strerror}") from error
        raise DataError(
            f"{self._storage.location(entry)} was deleted from the cache three times before it could be opened; "
            "set a larger cache_gb"
        )


class _Descriptor:
    """An open file that processes and threads read by position; it is closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self._number = -1
        self._number = os.open(path, os.O_RDONLY)

    def read(self, length: int, start: int, location: str) -> bytes:
        """Read bytes; raises DataError with `location` if the file has less."""
        try:
            content = os.pread(self._number, length, start)
        except OSError as error:
            raise DataError(f"{location} cannot be read: {error.strerror}") from error
        if len(content) < length:
            raise DataError(f"{location} ends beyond the end of the file: the shard is truncated; copy it again")
        return content

    def is_deleted(self) -> bool:
        return os.fstat(self._number).st_nlink == 0

    def __del__(self) -> None:
        if self._number >= 0:
            os.close(self._number)

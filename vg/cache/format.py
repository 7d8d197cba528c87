"""Features of frozen encoders on disk: files, and the key that decides whether they can be used.

A cache is a folder of shards, each of which is written atomically:

    key.json                    all that the features depend on, see vg.cache.key
    images/00000.npy, .json     [256 images x V views, S, D] float16, and the annotations of these images; zeros follow
                                the tokens of an image that has fewer than S
    texts/00000.npy, .json      [tokens of 4,096 expressions, D] float16, and the expressions
    index.npz                   written last: sample -> image, expression, box; files of images; checksums

If the text encoder is trained, there are no texts and no entry `text` in key.json; such a run also uses the images of a
cache that has both, and a run with a frozen text encoder adds the texts to a cache without them.

The checksum of a row of features is compared when the row is first read, that of a .json file whenever it is read; zip
has its own.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vg.errors import CacheError
from vg.files import replacing

# Images and expressions per shard: more is more work lost on interruption, less is more open files.
FORMAT = {"version": 1, "images": 256, "expressions": 4096}
KEY, INDEX = "key.json", "index.npz"
INDEX_ENTRIES = (
    *("images", "sizes", "boxes", "texts", "bad", "grid", "grids", "files", "image_checksums"),
    *("ids", "types", "expressions"),
)
TEXT_ENTRIES = ("ends", "text_checksums")  # only with features of text

VERIFIED = -1  # instead of the checksum of features that have been compared with it
REPAIR = "`vg cache CONFIG` writes it again"


@dataclass(frozen=True)
class CacheFolder:
    """Paths of the features of one source in certain views."""

    path: Path
    key: Mapping[str, Any]  # all that the features depend on, as JSON values; "data" and "split" name the source
    num_images: int  # without their views
    files: Sequence[Path | None]  # of the images; None for images that are not files
    stored: Mapping[str, Any]  # the key when it was encoded: its paths may differ, or only one of the two have text
    trust: bool  # do not compare the files with those that were encoded

    @property
    def name(self) -> str:
        """Dataset and split for messages."""
        return f"{self.key['data']} ({self.key['split']})"

    @property
    def has_text(self) -> bool:
        """Whether features of text are needed, too; they may also exist if they are not needed."""
        return "text" in self.key

    @property
    def num_views(self) -> int:
        return len(self.key["views"])

    @property
    def images_per_shard(self) -> int:
        return int(self.key["format"]["images"])

    @property
    def texts_per_shard(self) -> int:
        return int(self.key["format"]["expressions"])

    @property
    def shards(self) -> list[range]:
        """The images of each image shard."""
        return _chunks(self.num_images, self.images_per_shard)

    def text_shards(self, num_texts: int) -> list[range]:
        """The expressions of each text shard."""
        return _chunks(num_texts, self.texts_per_shard)

    def image_features(self, shard: int) -> Path:
        return self.path / "images" / f"{shard:05d}.npy"

    def image_records(self, shard: int) -> Path:
        """Annotations of the images of a shard, see vg.cache.views.Record; written after their features."""
        return self.image_features(shard).with_suffix(".json")

    def text_features(self, shard: int) -> Path:
        return self.path / "texts" / f"{shard:05d}.npy"

    def text_records(self, shard: int) -> Path:
        """Expressions of a shard and the checksums of their features; written after the features."""
        return self.text_features(shard).with_suffix(".json")

    def missing_shards(self) -> list[int]:
        """Return the image shards that are not written yet."""
        return [shard for shard in range(len(self.shards)) if not self.image_records(shard).exists()]

    def missing_texts(self, expressions: Sequence[str]) -> list[int]:
        """Return the text shards that are not written, or of other expressions because samples have changed."""
        missing = []
        for shard, texts in enumerate(self.text_shards(len(expressions))):
            try:
                if read_records(self.text_records(shard))["expressions"] != expressions[texts.start : texts.stop]:
                    missing.append(shard)
            except CacheError:
                missing.append(shard)
        return missing


def checksum_of(features: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(features).data)


def verify(features: np.ndarray, checksum: int, path: Path) -> None:
    """Raise CacheError if features of a shard do not have their checksum."""
    if checksum != VERIFIED and checksum_of(features) != checksum:
        raise CacheError(f"{path}: the checksum of these features is wrong, the file is damaged; {REPAIR}")


def read_file(path: Path) -> Any:
    """Memory-map a shard (.npy) or read the index (.npz); raises CacheError."""
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        return content if isinstance(content, np.ndarray) else dict(content)
    except Exception as error:  # zipfile, zlib and numpy each have their own exceptions for damaged files
        raise CacheError(f"{path} cannot be read ({error}); {REPAIR}") from error


def read_index(folder: Path) -> dict[str, np.ndarray]:
    """Read the index of a cache, see vg.cache.build; raises CacheError if it is damaged or of another program."""
    path, index = folder / INDEX, read_file(folder / INDEX)
    entries: dict[str, np.ndarray] = index if isinstance(index, dict) else {}
    expected = (*INDEX_ENTRIES, *(TEXT_ENTRIES if "ends" in entries else ()))
    if lacking := [name for name in expected if name not in entries]:
        raise CacheError(f"{path} lacks {', '.join(lacking)}; {REPAIR}")
    return entries


def read_shard(path: Path, length: int) -> np.ndarray:
    """Memory-map the features of a shard; raises CacheError if they are not `length` rows."""
    array: np.ndarray = read_file(path)
    if array.dtype != np.float16 or len(array) != length:
        found = f"{len(array)} rows" + (f" of {array.dtype}" if array.dtype != np.float16 else "")
        raise CacheError(f"{path} has {found}, expected {length}; {REPAIR}")
    return array


def read_records(path: Path) -> Any:
    """Read a .json file that write_records wrote; raises CacheError."""
    try:
        values, _, written = path.read_text(encoding="utf-8").partition("\n")
        if written != _checksum_line(values):
            raise ValueError("its checksum is wrong")
        return json.loads(values)
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} cannot be read ({error}); {REPAIR}") from error


def write_records(path: Path, values: Any) -> None:
    """Write JSON in one line and its checksum in another."""
    line = json.dumps(values)
    write_file(path, f"{line}\n{_checksum_line(line)}".encode())


def write_file(path: Path, content: np.ndarray | Mapping[str, np.ndarray] | bytes) -> None:
    """Write a shard, an index or another file atomically; raises CacheError, which names the file."""
    try:
        with replacing(path, is_file=True) as partial, partial.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            elif isinstance(content, Mapping):
                np.savez(file, **content)  # type: ignore[arg-type]
            else:
                np.save(file, content)
    except OSError as error:
        raise CacheError(
            f"could not write the cache: {error}; if the disk is full, make room. `vg cache` continues where it stopped"
        ) from error


def _checksum_line(line: str) -> str:
    return f"{zlib.crc32(line.encode()):08x}\n"


def _chunks(total: int, size: int) -> list[range]:
    return [range(start, min(start + size, total)) for start in range(0, total, size)]

"""Features of frozen encoders on disk: files, and the key that decides whether they can be used.

A cache is a folder of shards, each of which is written atomically:

    key.json                    all that the features depend on; its digest is part of the name of the folder
    pictures/00000.npy, .json   [256 images x V views, S, D] float16, and the annotations of these images
    words/00000.npy             [tokens of 4,096 expressions, D] float16
    index.npz                   written last: sample -> image, expression, box
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vg.config import CacheConfig
from vg.data import DatasetConfig
from vg.data.source import HasFingerprint, HasImageKeys, Source
from vg.errors import CacheError
from vg.files import read_json
from vg.models.base import EncodableModel

# Images and expressions per shard: more is more work lost on interruption, less is more open files.
FORMAT = {"version": 1, "pictures": 256, "expressions": 4096}
KEY, INDEX = "key.json", "index.npz"


@dataclass(frozen=True)
class CacheFolder:
    """Paths of the features of one source in certain views."""

    root: Path  # of all caches
    key: Mapping[str, Any]  # all that the features depend on, as JSON values; "data" and "split" name the source
    num_images: int  # without their views

    @cached_property
    def path(self) -> Path:
        return self.root / f"{self._name}-{_digest(self.key)[:16]}"

    @property
    def name(self) -> str:
        """Dataset and split for messages."""
        return f"{self.key['data']} ({self.key['split']})"

    @property
    def _name(self) -> str:
        return re.sub(r"[^A-Za-z0-9]+", "_", f"{self.key['data']} {self.key['split']}").strip("_")

    @property
    def num_views(self) -> int:
        return len(self.key["views"])

    @property
    def images_per_shard(self) -> int:
        return int(self.key["format"]["pictures"])

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
        return self.path / "pictures" / f"{shard:05d}.npy"

    def image_records(self, shard: int) -> Path:
        """Annotations of the images of a shard, see vg.cache.views.Record; written after their features."""
        return self.image_features(shard).with_suffix(".json")

    def text_features(self, shard: int) -> Path:
        return self.path / "words" / f"{shard:05d}.npy"

    def missing_shards(self) -> list[int]:
        """Return the image shards that are not written yet."""
        return [shard for shard in range(len(self.shards)) if not self.image_records(shard).exists()]

    def check_complete(self) -> None:
        """Raise CacheError if this cache does not exist, is incomplete, or exists with another key only."""
        advice = "create it with `vg cache CONFIG` and the same overrides, or set data.cache=null"
        if (self.path / INDEX).exists():
            return
        if self.path.exists():
            total = len(self.shards)
            raise CacheError(
                f"the cache {self.path} is incomplete: {total - len(self.missing_shards())} of {total} image shards "
                f"are written; {advice}"
            )
        found = [read_json(file, dict) for file in sorted(self.root.glob(f"{self._name}-*/{KEY}"))]
        if not found:
            raise CacheError(f"{self.root} contains no features of {self.name}; {advice}")
        differences = sorted((_differences(self.key, key) for key in found), key=len)
        listed = "\n  ".join("; ".join(lines) for lines in differences[:3])
        raise CacheError(f"{self.root} contains features of {self.name} with another key:\n  {listed}\n{advice}")


def cache_folder(
    settings: DatasetConfig, source: Source, cache: CacheConfig, views: Sequence[str], model: EncodableModel
) -> CacheFolder:
    """Return the folder for the features of a source; raises ConfigError if an encoder is not frozen.

    The key must not change with names in the code: an entry that is renamed makes all existing caches stale.
    """
    key: dict[str, Any] = {
        "data": source.provenance.data,
        "split": source.provenance.split,
        "settings": asdict(settings),
        "samples": len(source),
        "annotations": source.fingerprint() if isinstance(source, HasFingerprint) else None,
        "pictures": _digest(list(source.image_keys())) if isinstance(source, HasImageKeys) else None,
        "views": list(views),
        "transform": {"name": type(model.image_spec).__name__, **asdict(model.image_spec)},
        **model.feature_key(),
        "format": dict(FORMAT),
    }
    return CacheFolder(Path(cache.folder), key, int(image_indices(source).max()) + 1)


def image_indices(source: Source) -> np.ndarray:
    """Return the index of the image of each sample, in order of first occurrence: [samples] int."""
    if not isinstance(source, HasImageKeys):
        return np.arange(len(source))
    indices: dict[str, int] = {}
    return np.array([indices.setdefault(key, len(indices)) for key in source.image_keys()], np.int64)


def read_file(path: Path, damaged: Path) -> Any:
    """Memory-map a shard (.npy) or read the index (.npz); raises CacheError, which advises to remove `damaged`."""
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        return content if isinstance(content, np.ndarray) else dict(content)
    except Exception as error:  # zipfile, zlib and numpy each have their own exceptions for damaged files
        raise CacheError(f"{path} cannot be read ({error}); remove {damaged} and run `vg cache` again") from error


def _chunks(total: int, size: int) -> list[range]:
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _differences(wanted: Any, found: Any, path: str = "") -> list[str]:
    """Return one line for each value in which two keys differ."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        names = dict.fromkeys([*wanted, *found])
        return [line for name in names for line in _differences(wanted.get(name), found.get(name), f"{path}{name}.")]
    wanted, found = (json.loads(json.dumps(value)) for value in (wanted, found))
    return [] if wanted == found else [f"{path[:-1]} is {wanted}, the cache has {found}"]

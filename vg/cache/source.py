"""Features of frozen encoders on disk: where they lie, and samples that have them in place of pixels and words.

A cache is a folder of parts, each of them written once and whole:

    key.json                    what the features depend on; a digest of it is in the name of the folder
    pictures/00000.npy, .json   [256 pictures x views, S, D] float16, and what is said about these pictures
    words/00000.npy             [tokens of 4,096 expressions, D] float16
    index.npz                   written last: who is where
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vg.data.features import FeatureSample
from vg.data.source import HasImageKeys, Source
from vg.errors import BadSampleError, CacheError

# Of pictures and expressions there are so many in one part: what a kill may cost, against the number of open files.
FORMAT = {"version": 1, "pictures": 256, "expressions": 4096}
KEY, INDEX = "key.json", "index.npz"
TEXTS = ("ids", "kinds", "expressions")  # parts of the index that are no arrays


@dataclass(frozen=True)
class CacheFolder:
    """Where the features of one source in some views lie.

    Args:
        root: the folder of all caches.
        key: what the features depend on, values that JSON knows; "data" and "split" are the name of the source.
        num_pictures: without their views.
    """

    root: Path
    key: Mapping[str, Any]
    num_pictures: int

    @cached_property
    def path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return self.root / f"{self._name}-{digest[:16]}"

    @property
    def _name(self) -> str:
        return re.sub(r"[^A-Za-z0-9]+", "_", f"{self.key['data']} {self.key['split']}").strip("_")

    @property
    def num_views(self) -> int:
        return len(self.key["views"])

    @property
    def part_size(self) -> int:
        """Pictures of one part."""
        return int(self.key["format"]["pictures"])

    @property
    def words_part_size(self) -> int:
        """Expressions of one part."""
        return int(self.key["format"]["expressions"])

    @property
    def parts(self) -> list[range]:
        """The pictures of each part."""
        starts = range(0, self.num_pictures, self.part_size)
        return [range(start, min(start + self.part_size, self.num_pictures)) for start in starts]

    def pictures(self, part: int) -> Path:
        """The features of a part of the pictures."""
        return self.path / "pictures" / f"{part:05d}.npy"

    def record(self, part: int) -> Path:
        """What is said about these pictures."""
        return self.pictures(part).with_suffix(".json")

    def words(self, part: int) -> Path:
        """The features of a part of the expressions."""
        return self.path / "words" / f"{part:05d}.npy"

    def missing(self) -> list[int]:
        """The parts of pictures that are not written yet; their record is written after their features."""
        return [part for part in range(len(self.parts)) if not self.record(part).exists()]

    def check_complete(self) -> None:
        """Raises CacheError: there is no such cache, one of something else, or only a part of it."""
        advice = "make it with `vg cache CONFIG` and the same overrides, or set data.cache=null"
        if (self.path / INDEX).exists():
            return
        if self.path.exists():
            total = len(self.parts)
            raise CacheError(
                f"the cache {self.path} is not finished, {total - len(self.missing())} of {total} parts of pictures "
                f"are there; {advice}"
            )
        what = f"{self.key['data']} ({self.key['split']})"
        others = [_differences(self.key, json.loads(file.read_text())) for file in self._others()]
        if not others:
            raise CacheError(f"{self.root} holds no features of {what}; {advice}")
        listed = "\n  ".join("; ".join(lines) for lines in sorted(others, key=len)[:3])
        raise CacheError(f"{self.root} holds features of {what}, but of others:\n  {listed}\n{advice}")

    def _others(self) -> list[Path]:
        return sorted(file for file in self.root.glob(f"{self._name}-*/{KEY}"))


def _differences(wanted: Any, found: Any, path: str = "") -> list[str]:
    """What two keys differ in, one line for each value."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        names = dict.fromkeys([*wanted, *found])
        return [line for name in names for line in _differences(wanted.get(name), found.get(name), f"{path}{name}.")]
    wanted, found = (json.loads(json.dumps(value)) for value in (wanted, found))
    return [] if wanted == found else [f"{path[:-1]} is {wanted}, the cache has {found}"]


class CachedSource:
    """The samples of a source, their features read from a cache; a vg.data.source.Source of FeatureSamples.

    Which view of a picture is shown depends on (seed, epoch, picture): all its samples see the same.

    Raises:
        CacheError: the cache is missing, stale, incomplete or damaged.
    """

    def __init__(self, source: Source, folder: CacheFolder, seed: int):
        folder.check_complete()
        self.source = source
        self.folder = folder
        self.seed = seed
        self.provenance = source.provenance
        self._index = _read_index(folder)
        self._texts = {name: json.loads(self._index[name].tobytes()) for name in TEXTS}
        self._ends = np.concatenate([[0], self._index["ends"]])  # [E + 1] token where each expression begins
        self._grid = (int(self._index["grid"][0]), int(self._index["grid"][1]))
        self._parts: dict[Path, np.ndarray] = {}  # opened so far
        self._check_parts()

    def __len__(self) -> int:
        return len(self._index["pictures"])

    def __getstate__(self) -> dict[str, Any]:  # a worker that is not forked opens the files itself
        return self.__dict__ | {"_parts": {}}

    def load(self, index: int, epoch: int) -> FeatureSample:
        """One sample; raises BadSampleError where the sample was bad when the features were made."""
        arrays = self._index
        if arrays["bad"][index]:
            raise BadSampleError(
                f"{self.provenance.data} ({self.provenance.split}), sample {index}: could not be used when its "
                f"features were made; mend it and remove {self.folder.path}, or set data.bad_samples=skip"
            )
        picture = int(arrays["pictures"][index])
        view = self._view(picture, epoch)
        part, place = divmod(picture, self.folder.part_size)
        number = int(arrays["words"][index, view])
        words_part, words_place = divmod(number, self.folder.words_part_size)
        first, start, end = self._ends[[number - words_place, number, number + 1]]  # tokens; first of the part
        return FeatureSample(
            id=self._texts["ids"][index],
            picture=(str(self.folder.path), picture * self.folder.num_views + view),
            image=self._open(self.folder.pictures(part))[place * self.folder.num_views + view],
            grid=self._grid,
            words=self._open(self.folder.words(words_part))[start - first : end - first],
            size=(int(arrays["sizes"][picture, view, 0]), int(arrays["sizes"][picture, view, 1])),
            expression=self._texts["expressions"][number],
            box=arrays["boxes"][index, view],
            expression_type=self._texts["kinds"][index],
        )

    def image_groups(self, epoch: int) -> np.ndarray:
        """[samples]; see vg.data.source.HasImageGroups."""
        return self._index["pictures"]

    def image_sizes(self, epoch: int) -> np.ndarray:
        """[samples, 2] (height, width); see vg.data.source.HasImageSizes."""
        pictures = self._index["pictures"]
        views = np.array([self._view(picture, epoch) for picture in range(self.folder.num_pictures)])
        return self._index["sizes"][pictures, views[pictures]]

    def image_keys(self) -> list[str]:
        """See vg.data.source.HasImageKeys; a source that knows no others has pictures of its own."""
        if isinstance(self.source, HasImageKeys):
            return self.source.image_keys()
        return [f"{self.folder.path}/{index}" for index in range(len(self))]

    def _view(self, picture: int, epoch: int) -> int:
        if self.folder.num_views == 1:
            return 0
        return int(np.random.default_rng((self.seed, epoch, picture)).integers(self.folder.num_views))

    def _open(self, path: Path) -> np.ndarray:
        if path not in self._parts:
            self._parts[path] = read_part(path)
        return self._parts[path]

    def _check_parts(self) -> None:
        """Whether every file is there and as long as the index says."""
        folder, last = self.folder, len(self._ends) - 1
        wanted = {folder.pictures(n): len(part) * folder.num_views for n, part in enumerate(folder.parts)}
        for n, first in enumerate(range(0, last, folder.words_part_size)):
            wanted[folder.words(n)] = int(self._ends[min(first + folder.words_part_size, last)] - self._ends[first])
        for path, length in wanted.items():
            if len(self._open(path)) != length:
                raise CacheError(
                    f"{path} has {len(self._open(path))} rows, {length} belong there; remove {self.folder.path} and "
                    "run `vg cache` again"
                )


def read_part(path: Path) -> np.ndarray:
    """A part, mapped into memory; raises CacheError where it is missing or damaged."""
    try:
        part: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{path} cannot be read ({error}); remove {path.parents[1]} and run `vg cache` again"
        ) from error
    return part


def _read_index(folder: CacheFolder) -> dict[str, np.ndarray]:
    try:
        with np.load(folder.path / INDEX, allow_pickle=False) as index:
            return dict(index)
    except Exception as error:  # zipfile, zlib and numpy report a damaged file in their ways
        raise CacheError(
            f"{folder.path / INDEX} cannot be read ({error}); remove it and run `vg cache` again"
        ) from error

"""Some samples of a dataset, and the two parts, without a common image, that a dataset is split into."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt

from vg.data import DatasetConfig
from vg.data.image_files import dataset_folder
from vg.data.shards.source import Shards
from vg.data.source import Loaded, Source, row_key
from vg.errors import DataError
from vg.settings import Settings
from vg.types import Sample


class Subset(Source[Loaded]):
    """Some samples of a source, in its order."""

    def __init__(self, source: Source[Loaded], indices: np.ndarray):
        self.source: Source[Loaded] = source
        self.indices = indices  # [kept samples] int, ascending
        self.provenance = source.provenance
        self.category_ids, self.num_classes = source.category_ids, source.num_classes
        self.frequencies = source.frequencies

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, epoch: int) -> Loaded:
        return self.source.load(int(self.indices[index]), epoch)

    def image_sizes(self, epoch: int) -> np.ndarray | None:
        sizes = self.source.image_sizes(epoch)
        return None if sizes is None else sizes[self.indices]

    def image_groups(self, epoch: int) -> np.ndarray | None:
        groups = self.source.image_groups(epoch)
        return None if groups is None else groups[self.indices]

    def image_keys(self) -> list[str] | None:
        keys = self.source.image_keys()
        return None if keys is None else [keys[index] for index in self.indices]

    def image_files(self) -> list[Path | None]:
        files = self.source.image_files()
        return [files[index] for index in self.indices]

    def shard_ends(self) -> np.ndarray:
        return np.searchsorted(self.indices, self.source.shard_ends())

    def sample_phrases(self) -> list[tuple[str, tuple[str, ...]]]:
        known = self.source.sample_phrases()
        return [known[index] for index in self.indices] if known else []


@dataclass
class SplitConfig(Settings):
    """One part of a dataset that has no validation split; the images of "train" and "val" are disjoint."""

    name: Literal["split"] = "split"
    dataset: DatasetConfig = field(kw_only=True)
    part: Literal["train", "val"] = field(kw_only=True)
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Of the images that is in "val", approximately: every image is drawn by itself, so it stays in its part when
    others are added or removed."""
    seed: NonNegativeInt = 0
    """Another seed selects other images."""

    def build(self) -> Part:
        """Read the dataset.

        Raises:
            DataError: see `dataset`; or it does not name its images, or has only one.
        """
        return Part(self)


class Part(Subset[Sample]):
    """The samples of one part.

    A hash of its name and the seed determines the part of an image. Only if a part would be empty, the image whose hash
    is next to the limit is in it.
    """

    def __init__(self, config: SplitConfig):
        source: Source[Sample] = config.dataset.build()
        if (keys := source.image_keys()) is None:
            raise DataError(f"{source.provenance} does not name its images, so it cannot be split by image")
        images = [*dict.fromkeys(keys)]
        if len(images) < 2:
            raise DataError(f"{source.provenance} has {len(images)} image; a training and a validation part need two")
        row = row_key(source.provenance, "")
        if unnamed := sum(key.startswith(row) for key in images):
            warnings.warn(
                f"{source.provenance}: {unnamed} of {len(images)} images have no name, so both parts may have copies "
                "of one image; add their names as a column file_name",
                stacklevel=3,
            )
        names = _names([key.removeprefix(row) for key in images], _location(config.dataset, source))
        drawn = sorted((_hash(config.seed, name), key) for name, key in zip(names, images, strict=True))
        count = sum(value < config.fraction for value, _ in drawn)
        val = {key for _, key in drawn[: min(max(1, count), len(drawn) - 1)]}
        wanted = config.part == "val"
        super().__init__(source, np.flatnonzero([(key in val) == wanted for key in keys]))
        share = config.fraction if wanted else 1 - config.fraction
        name = f"about {100 * share:g} % of {source.provenance.split} as {config.part}"
        self.provenance = replace(source.provenance, split=name, official=None)

    def fingerprint(self) -> str | None:
        whole = self.source.fingerprint()
        return None if whole is None else hashlib.sha256(whole.encode() + self.indices.tobytes()).hexdigest()


def _location(dataset: DatasetConfig, source: Source) -> str:
    """Return the beginning of the keys of the images of a dataset that changes when it is moved or written again."""
    if isinstance(source, Shards):
        return source.own_key
    root, path = getattr(dataset, "image_root", None), Path(getattr(dataset, "path", None) or ".")
    folder = Path(root) if root else path if path.is_dir() else dataset_folder(path)
    return f"{folder.resolve()}{os.sep}"


def _names(keys: Sequence[str], location: str) -> list[str]:
    """Return the names of images below their folder; for those that are elsewhere, below the folder of all of them."""
    names = [Path(key.removeprefix(location)).as_posix() for key in keys]
    elsewhere = [name for name in names if os.path.isabs(name)]
    if len({os.path.basename(name) for name in elsewhere}) == len(elsewhere):
        return [os.path.basename(name) if os.path.isabs(name) else name for name in names]
    common = os.path.commonpath(elsewhere)
    return [os.path.relpath(name, common) if os.path.isabs(name) else name for name in names]


def _hash(seed: int, name: str) -> float:
    """Return a number in 0..1."""
    digest = hashlib.sha256(json.dumps([seed, name]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

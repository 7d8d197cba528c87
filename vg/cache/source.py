"""Samples with features from a cache instead of pixels and words, and the batches of such samples."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vg import boxes as box_ops
from vg.cache.format import TEXT_ENTRIES, VERIFIED, CacheFolder, read_file, read_index, read_shard, verify
from vg.cache.images import changed_images
from vg.cache.key import check_complete
from vg.data.prompt import Expressions
from vg.data.source import Source
from vg.errors import BadSampleError, CacheError
from vg.models.base import largest_grid
from vg.types import EncodedBatch, EncodedSample, Features, Sample, Target, Text

logger = logging.getLogger(__name__)


class CachedSource(Source[EncodedSample]):
    """The samples of a source with features from its cache.

    The view of an image is a function of (seed, epoch, image), so all samples of an image have the same view.

    Raises:
        CacheError: the cache is missing, stale, incomplete or damaged; damaged features are found when they are first
            loaded.
    """

    def __init__(self, source: Source[Sample], folder: CacheFolder, seed: int):
        check_complete(folder)
        self.source = source
        self.folder = folder
        self.seed = seed
        self.provenance = source.provenance
        self.index = read_index(folder.path)
        self.texts = {name: json.loads(self.index[name].tobytes()) for name in ("ids", "types", "expressions")}
        old, new = (f"{name}/{folder.key['split']}/" for name in (folder.stored["data"], folder.key["data"]))
        if old != new:  # a sample id begins with the name of the dataset, which changes with that of its folder
            self.texts["ids"] = [new + id[len(old) :] if id.startswith(old) else id for id in self.texts["ids"]]
        if folder.has_text and "ends" not in self.index:
            raise CacheError(f"{folder.path} has no features of text, only of images; `vg cache CONFIG` adds them")
        ends, checksums = (self.index[name] if folder.has_text else np.zeros(0, np.int64) for name in TEXT_ENTRIES)
        self.ends = np.concatenate([[0], ends])  # [E + 1] first token of each expression; [1] if they are not needed
        self.grids = self.index["grids"]  # [images, V, 2]
        # Checksums of features that have not been loaded yet: [images, V] and [E].
        self._unverified = [self.index["image_checksums"], checksums]
        # All files are opened once, so a missing or shortened one is found before training.
        lengths = {folder.image_features(n): len(shard) * folder.num_views for n, shard in enumerate(folder.shards)}
        for n, shard in enumerate(folder.text_shards(len(self.ends) - 1)):
            lengths[folder.text_features(n)] = int(self.ends[shard.stop] - self.ends[shard.start])
        self._arrays = {path: read_shard(path, length) for path, length in lengths.items()}
        num_cells = math.prod(self.index["grid"].tolist())
        self.num_prefix = self.image_shape[0] - num_cells  # tokens before those of the grid
        if not folder.trust:
            self._compare_images()

    def _compare_images(self) -> None:
        folder, files = self.folder, self.folder.files
        changes = changed_images(files, self.index["files"])
        if changes.changed:
            names = ", ".join(str(files[image]) for image in changes.changed[:3])
            raise CacheError(
                f"{len(changes.changed)} of {len(files)} images of {folder.name} differ from those in the cache "
                f"{folder.path}: {names}{', ...' if len(changes.changed) > 3 else ''}; `vg cache CONFIG` encodes them "
                "again, data.cache.trust=true uses the old features"
            )
        if changes.missing:
            text = "%s of %s images of %s do not exist any more, so they are not compared with the cache"
            logger.info(text, f"{len(changes.missing):,}", f"{len(files):,}", folder.name)

    def __len__(self) -> int:
        return len(self.index["images"])

    def __getstate__(self) -> dict[str, Any]:  # a spawned worker opens the files itself
        return self.__dict__ | {"_arrays": {}}

    def load(self, index: int, epoch: int) -> EncodedSample:
        """Load one sample; raises BadSampleError if the sample was bad when the cache was written."""
        arrays = self.index
        image, view = self.locate(index, epoch)
        image_shard, image_row = divmod(image, self.folder.images_per_shard)
        text = int(arrays["texts"][index, view])
        row = image_row * self.folder.num_views + view
        features = self._features(self.folder.image_features(image_shard), row, self._unverified[0], (image, view))
        grid = int(self.grids[image, view, 0]), int(self.grids[image, view, 1])
        return EncodedSample(
            id=self.texts["ids"][index],
            image_key=(str(self.folder.path), image * self.folder.num_views + view),
            image=features[: self.num_prefix + math.prod(grid)],
            grid=grid,
            text=self._text(text) if self.folder.has_text else None,
            size=(int(arrays["sizes"][image, view, 0]), int(arrays["sizes"][image, view, 1])),
            phrase=self.texts["expressions"][text],
            box=arrays["boxes"][index, view],
            expression_type=self.texts["types"][index],
        )

    def _text(self, text: int) -> np.ndarray:
        """Return the features of an expression, [T, D] float16."""
        shard, row = divmod(text, self.folder.texts_per_shard)
        first, start, end = self.ends[[text - row, text, text + 1]]  # tokens; the first one of the shard
        tokens = slice(start - first, end - first)
        return self._features(self.folder.text_features(shard), tokens, self._unverified[1], text)

    def locate(self, index: int, epoch: int) -> tuple[int, int]:
        """Return the indices of the image and the view of a sample; raises as `load`."""
        if self.index["bad"][index]:
            raise BadSampleError(
                f"{self.folder.name}, sample {index}: was unusable when the cache was written; fix it and remove "
                f"{self.folder.path}, or set data.bad_samples=skip"
            )
        image = int(self.index["images"][index])
        return image, self._view(image, epoch)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Tokens S and channels D of the features of an image."""
        _, tokens, channels = self._arrays[self.folder.image_features(0)].shape
        return tokens, channels

    @property
    def text_width(self) -> int:
        """Channels of the features of an expression."""
        return int(self._arrays[self.folder.text_features(0)].shape[1])

    @property
    def num_bytes(self) -> int:
        """Size of all features."""
        return sum(array.nbytes for array in self._arrays.values())

    def image_shard(self, shard: int) -> np.ndarray:
        """Read all features of a shard, [images x V, S, D] float16, and compare their checksums."""
        path, images = self.folder.image_features(shard), self.folder.shards[shard]
        array = np.array(self._arrays[path])
        for row, checksum in zip(array, self._unverified[0][images.start : images.stop].flat, strict=True):
            verify(row, checksum, path)
        return array

    def text_shard(self, shard: int) -> np.ndarray:
        """Read the features of all expressions of a shard, [tokens, D] float16, and compare their checksums."""
        path, texts = self.folder.text_features(shard), self.folder.text_shards(len(self.ends) - 1)[shard]
        array = np.array(self._arrays[path])
        ends = self.ends[texts.start + 1 : texts.stop] - self.ends[texts.start]
        for row, checksum in zip(np.split(array, ends), self._unverified[1][texts.start : texts.stop], strict=True):
            verify(row, checksum, path)
        return array

    def image_groups(self, epoch: int) -> np.ndarray:
        return self.index["images"]

    def image_sizes(self, epoch: int) -> np.ndarray:
        images = self.index["images"]
        views = np.array([self._view(image, epoch) for image in range(self.folder.num_images)])
        return self.index["sizes"][images, views[images]]

    def image_keys(self) -> list[str] | None:
        return self.source.image_keys()

    def sample_phrases(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the phrases of the source; in a flipped view, "left" and "right" are swapped."""
        return self.source.sample_phrases()

    def _view(self, image: int, epoch: int) -> int:
        return _drawn_view(self.seed, epoch, image, self.folder.num_views)

    def _features(
        self, path: Path, rows: int | slice, unverified: np.ndarray, index: int | tuple[int, int]
    ) -> np.ndarray:
        """Read features of a shard; the first time, compare their checksum, which is `unverified[index]`."""
        if path not in self._arrays:
            self._arrays[path] = read_file(path)
        features: np.ndarray = self._arrays[path][rows]
        if unverified[index] != VERIFIED:
            verify(features, unverified[index], path)
            unverified[index] = VERIFIED
        return features


@lru_cache(maxsize=1 << 17)  # drawing takes longer than all else, and the samples of an image share their view
def _drawn_view(seed: int, epoch: int, image: int, num_views: int) -> int:
    return int(np.random.default_rng((seed, epoch, image)).integers(num_views)) if num_views > 1 else 0


def collate_encoded(samples: Sequence[EncodedSample], texts: Expressions | None = None) -> EncodedBatch:
    """Make a batch in which samples with the same view of an image share its features.

    Args:
        texts: tokenizes the phrases, if features of images only are cached.
    """
    images = {sample.image_key: sample for sample in samples}
    indices = {key: index for index, key in enumerate(images)}
    image_ids = [indices[sample.image_key] for sample in samples]
    text: Tensor | Text
    if texts is None:
        stored = [sample.text for sample in samples if sample.text is not None]
        lengths = torch.tensor([len(features) for features in stored])
        text, mask = torch.from_numpy(_padded(stored)), torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    else:
        tokens = texts.arrays([sample.phrase for sample in samples], [sample.id for sample in samples]).tensors()
        text, mask = tokens, tokens.mask
    grid, grids = largest_grid([sample.grid for sample in images.values()])
    features = Features(
        image=torch.from_numpy(_padded([sample.image for sample in images.values()])),  # [B, S, D]
        grid=grid,
        text=text,  # [R, T, D], or tokens [R, T]
        text_mask=mask,  # [R, T]
        image_ids=torch.tensor(image_ids),
        max_per_image=max(Counter(image_ids).values()),
        grids=grids,
    )
    targets = []
    for sample in samples:
        boxes = box_ops.from_pixels(torch.from_numpy(sample.box).unsqueeze(0), sample.size)  # [1, 4]
        phrase_ids = torch.zeros(1, dtype=torch.long)
        targets.append(Target(sample.id, sample.size, (sample.phrase,), boxes, phrase_ids, sample.expression_type))
    return EncodedBatch(features, targets)


def _padded(features: Sequence[np.ndarray]) -> np.ndarray:
    """Stack features [S, D] float16, with zeros after those that are shorter than the longest."""
    longest = max(map(len, features))
    if all(len(x) == longest for x in features):
        return np.stack(features)
    stacked = np.zeros((len(features), longest, features[0].shape[1]), np.float16)
    for row, x in zip(stacked, features, strict=True):
        row[: len(x)] = x
    return stacked

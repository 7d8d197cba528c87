"""Samples with features from a cache instead of pixels and words, and the batches of such samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vg import boxes as box_ops
from vg.cache.format import INDEX, CacheFolder, read_file
from vg.data.source import HasImageKeys, Source
from vg.errors import BadSampleError, CacheError
from vg.types import EncodedBatch, EncodedSample, Features, Sample, Target


class CachedSource:
    """The samples of a source with features from its cache, as a vg.data.source.Source[EncodedSample].

    The view of an image is a function of (seed, epoch, image), so all samples of an image have the same view.

    Raises:
        CacheError: the cache is missing, stale, incomplete or damaged.
    """

    def __init__(self, source: Source[Sample], folder: CacheFolder, seed: int):
        folder.check_complete()
        self.source = source
        self.folder = folder
        self.seed = seed
        self.provenance = source.provenance
        self._index: dict[str, np.ndarray] = read_file(folder.path / INDEX, damaged=folder.path / INDEX)
        self._texts = {name: json.loads(self._index[name].tobytes()) for name in ("ids", "kinds", "expressions")}
        self._ends = np.concatenate([[0], self._index["ends"]])  # [E + 1] first token of each expression
        self._grid = (int(self._index["grid"][0]), int(self._index["grid"][1]))
        self._arrays: dict[Path, np.ndarray] = {}  # opened files

        # All files are opened once, so a missing or shortened one is found before training.
        lengths = {folder.image_features(n): len(shard) * folder.num_views for n, shard in enumerate(folder.shards)}
        for n, shard in enumerate(folder.text_shards(len(self._ends) - 1)):
            lengths[folder.text_features(n)] = int(self._ends[shard.stop] - self._ends[shard.start])
        for path, length in lengths.items():
            if len(self._open(path)) != length:
                raise CacheError(
                    f"{path} has {len(self._open(path))} rows, expected {length}; remove {folder.path} and run "
                    "`vg cache` again"
                )

    def __len__(self) -> int:
        return len(self._index["pictures"])

    def __getstate__(self) -> dict[str, Any]:  # a spawned worker opens the files itself
        return self.__dict__ | {"_arrays": {}}

    def load(self, index: int, epoch: int) -> EncodedSample:
        """Load one sample; raises BadSampleError if the sample was bad when the cache was written."""
        arrays = self._index
        if arrays["bad"][index]:
            raise BadSampleError(
                f"{self.folder.name}, sample {index}: was unusable when the cache was written; fix it and remove "
                f"{self.folder.path}, or set data.bad_samples=skip"
            )
        image = int(arrays["pictures"][index])
        view = self._view(image, epoch)
        image_shard, image_row = divmod(image, self.folder.images_per_shard)
        text = int(arrays["words"][index, view])
        text_shard, text_row = divmod(text, self.folder.texts_per_shard)
        first, start, end = self._ends[[text - text_row, text, text + 1]]  # tokens; the first one of the shard
        return EncodedSample(
            id=self._texts["ids"][index],
            image_key=(str(self.folder.path), image * self.folder.num_views + view),
            image=self._open(self.folder.image_features(image_shard))[image_row * self.folder.num_views + view],
            grid=self._grid,
            text=self._open(self.folder.text_features(text_shard))[start - first : end - first],
            size=(int(arrays["sizes"][image, view, 0]), int(arrays["sizes"][image, view, 1])),
            phrase=self._texts["expressions"][text],
            box=arrays["boxes"][index, view],
            expression_type=self._texts["kinds"][index],
        )

    def image_groups(self, epoch: int) -> np.ndarray:
        return self._index["pictures"]

    def image_sizes(self, epoch: int) -> np.ndarray:
        images = self._index["pictures"]
        views = np.array([self._view(image, epoch) for image in range(self.folder.num_images)])
        return self._index["sizes"][images, views[images]]

    def image_keys(self) -> list[str]:
        """Return the keys of the source; if it has none, all are different."""
        if isinstance(self.source, HasImageKeys):
            return self.source.image_keys()
        return [f"{self.folder.path}/{index}" for index in range(len(self))]

    def _view(self, image: int, epoch: int) -> int:
        if self.folder.num_views == 1:
            return 0
        return int(np.random.default_rng((self.seed, epoch, image)).integers(self.folder.num_views))

    def _open(self, path: Path) -> np.ndarray:
        if path not in self._arrays:
            self._arrays[path] = read_file(path, damaged=self.folder.path)
        return self._arrays[path]


def collate_encoded(samples: Sequence[EncodedSample]) -> EncodedBatch:
    """Make a batch in which samples with the same view of an image share its features."""
    images = {sample.image_key: sample.image for sample in samples}
    indices = {key: index for index, key in enumerate(images)}
    lengths = [len(sample.text) for sample in samples]
    text = np.zeros((len(samples), max(lengths), samples[0].text.shape[1]), np.float16)  # [R, T, D]
    for row, sample in zip(text, samples, strict=True):
        row[: len(sample.text)] = sample.text
    features = Features(
        image=torch.from_numpy(np.stack(list(images.values()))),  # [B, S, D]
        grid=samples[0].grid,
        text=torch.from_numpy(text),
        text_mask=torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1),  # [R, T]
        image_ids=torch.tensor([indices[sample.image_key] for sample in samples]),
    )
    targets = []
    for sample in samples:
        boxes = box_ops.from_pixels(torch.from_numpy(sample.box).unsqueeze(0), sample.size)  # [1, 4]
        phrase_ids = torch.zeros(1, dtype=torch.long)
        targets.append(Target(sample.id, sample.size, (sample.phrase,), boxes, phrase_ids, sample.expression_type))
    return EncodedBatch(features, targets)

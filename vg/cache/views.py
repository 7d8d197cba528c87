"""The images of a source in the views that a cache stores, with the annotations of all their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from vg.cache.images import files_of, identity, image_indices
from vg.data.augment import AugmentConfig
from vg.data.collate import Collator
from vg.data.source import Source, checked
from vg.errors import BadSampleError, DataError
from vg.types import Sample

Record = dict[str, Any]  # annotations of an image as JSON values: samples, bad, ids, kinds, views; identity of its file


class ImageViews(Dataset[tuple[Record, Tensor]]):
    """Image index -> its record, and its views [V, 3, H, W] as model input.

    Args:
        views: see CacheConfig; crops are a function of the image and the position in this list.
        skip: list bad samples in the record instead of raising BadSampleError.
    """

    def __init__(self, source: Source[Sample], views: Sequence[str], collate: Collator, skip: bool):
        self.source = source
        self.views = [AugmentConfig(flip="flip" in view, crop="crop" in view).build() for view in views]
        self.collate = collate
        self.skip = skip
        images = image_indices(source)  # [samples]
        self.files = files_of(source, images)
        order = np.argsort(images, kind="stable")
        self.samples = np.split(order, np.cumsum(np.bincount(images))[:-1])  # per image: indices of its samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, image: int) -> tuple[Record, Tensor]:
        indices, samples, bad = [], [], []
        file = identity(self.files[image])
        for index in self.samples[image].tolist():
            try:
                samples.append(self._load(index))
                indices.append(index)
            except BadSampleError:
                if not self.skip:
                    raise
                bad.append(index)
        merged = _merged(samples)
        views = [
            augment(merged, (0, position, image)) if augment and samples else merged
            for position, augment in enumerate(self.views)
        ]
        record = {
            "file": file,
            "samples": indices,
            "bad": bad,
            "ids": [sample.id for sample in samples],
            "kinds": [sample.expression_type for sample in samples],
            "views": [
                {"size": view.image.shape[:2], "boxes": view.boxes.tolist(), "phrases": view.phrases} for view in views
            ],
        }
        return record, self.collate.images(views)[0]

    def _load(self, index: int) -> Sample:
        sample = checked(self.source.load(index, 0))
        if len(sample.phrases) != 1 or len(sample.boxes) != 1:
            raise DataError(
                f"{sample.id} has {len(sample.phrases)} phrases and {len(sample.boxes)} boxes; a feature cache is for "
                "models that predict one box for one expression"
            )
        self.collate.texts([sample])  # otherwise too long a text would only be found after all images are encoded
        return sample


def _merged(samples: Sequence[Sample]) -> Sample:
    """Merge the samples of an image: box n and phrase n are those of sample n; a black pixel without samples."""
    if not samples:
        return Sample("", np.zeros((1, 1, 3), np.uint8), (), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    first = samples[0]
    for other in samples:
        if other.image.shape != first.image.shape:
            raise DataError(
                f"{first.id} and {other.id} have the same image key but sizes {first.image.shape[:2]} and "
                f"{other.image.shape[:2]}; give their images different file names"
            )
    return replace(
        first,
        phrases=tuple(sample.phrases[0] for sample in samples),
        boxes=np.concatenate([sample.boxes for sample in samples]),  # [N, 4]
        phrase_ids=np.arange(len(samples)),
    )

"""The pictures of a source one by one, each with all that is said about it, in the views that a cache keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from vg.data.augment import AugmentConfig
from vg.data.collate import Collator
from vg.data.source import HasImageKeys, Source, checked
from vg.errors import BadSampleError, DataError
from vg.types import Sample

VIEWS = {
    "plain": AugmentConfig(),
    "flip": AugmentConfig(flip=1),
    "crop": AugmentConfig(crop=1),
    "flip_crop": AugmentConfig(flip=1, crop=1),
}

Record = dict[str, Any]  # what `describe` gives: values that JSON knows, for a file beside the features


def image_indices(source: Source) -> np.ndarray:
    """[samples] int: pictures are counted in the order in which they come first."""
    if not isinstance(source, HasImageKeys):
        return np.arange(len(source))
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in source.image_keys()], np.int64)


class Pictures(Dataset[tuple[Record, Tensor]]):
    """Picture number -> what is said about it, and its views [V, 3, H, W] as the model takes them.

    Args:
        views: names of VIEWS; crops differ by picture and by place in this list.
        skip: bad samples are noted in the record instead of raising BadSampleError.
    """

    def __init__(self, source: Source, views: Sequence[str], collate: Collator, skip: bool):
        self.source = source
        self.views = [VIEWS[view].build() for view in views]
        self.collate = collate
        self.skip = skip
        numbers = image_indices(source)  # [samples]
        order = np.argsort(numbers, kind="stable")
        self.samples = np.split(order, np.cumsum(np.bincount(numbers))[:-1])  # of each picture, the indices

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[Record, Tensor]:
        indices, samples, bad = [], [], []
        for index in self.samples[number].tolist():
            try:
                samples.append(self._load(index))
                indices.append(index)
            except BadSampleError:
                if not self.skip:
                    raise
                bad.append(index)
        record = {
            "samples": indices,
            "bad": bad,
            "ids": [sample.id for sample in samples],
            "kinds": [sample.expression_type for sample in samples],
        }
        picture = _together(samples)
        views = [
            augment(picture, (0, place, number)) if augment and samples else picture
            for place, augment in enumerate(self.views)
        ]
        record["views"] = [
            {"size": view.image.shape[:2], "boxes": view.boxes.tolist(), "phrases": view.phrases} for view in views
        ]
        return record, self.collate.images(views)[0]

    def _load(self, index: int) -> Sample:
        sample = checked(self.source.load(index, 0))
        if len(sample.phrases) != 1 or len(sample.boxes) != 1:
            raise DataError(
                f"{sample.id} has {len(sample.phrases)} phrases and {len(sample.boxes)} boxes; a cache of features is "
                "for models that find one box for one expression"
            )
        self.collate.texts([sample])  # else a text that is too long would be found after all pictures are encoded
        return sample


def _together(samples: Sequence[Sample]) -> Sample:
    """The samples of one picture as one, box n and phrase n being those of sample n; a black dot if there are none."""
    if not samples:
        return Sample("", np.zeros((1, 1, 3), np.uint8), (), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    first = samples[0]
    for other in samples:
        if other.image.shape != first.image.shape:
            raise DataError(
                f"{first.id} and {other.id} show the same picture in two sizes, {first.image.shape[:2]} and "
                f"{other.image.shape[:2]}; give them file names of their own"
            )
    return replace(
        first,
        phrases=tuple(sample.phrases[0] for sample in samples),
        boxes=np.concatenate([sample.boxes for sample in samples]),  # [N, 4]
        phrase_ids=np.arange(len(samples)),
    )

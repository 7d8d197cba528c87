"""The images of a source in the views that a cache stores, with the annotations of all their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from vg.cache.images import files_of, identity, image_indices
from vg.data.augment import AugmentConfig
from vg.data.collate import Collator
from vg.data.images import normalization, padded
from vg.data.shared_images import joined
from vg.data.source import Source, checked
from vg.errors import BadSampleError, DataError
from vg.movable import Movable
from vg.types import Sample

_BLACK_PIXEL = Sample("", np.zeros((1, 1, 3), np.uint8), (), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))

Record = dict[str, Any]  # annotations of an image as JSON values: samples, bad, ids, types, views; identity of its file


class ImageViews(Dataset[tuple[Record, Tensor]]):
    """Image index -> its record, and its views [V, 3, H, W] uint8 in sizes of the model, padded, not normalized.

    Args:
        views: see CacheConfig; crops are a function of the image and the position in this list.
        skip: list bad samples in the record instead of raising BadSampleError.
    """

    def __init__(self, source: Source[Sample], views: Sequence[str], collate: Collator, skip: bool):
        self.source = source
        self.views = [AugmentConfig(flip="flip" in view, crop="crop" in view).build() for view in views]
        self.collate = collate
        self.normalization = normalization(collate.image_spec)
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
        whole = joined(samples) if samples else _BLACK_PIXEL
        views = [
            augment(whole, (0, position, image)) if augment and samples else whole
            for position, augment in enumerate(self.views)
        ]
        record = {
            "file": file,
            "samples": indices,
            "bad": bad,
            "ids": [sample.id for sample in samples],
            "types": [sample.expression_type for sample in samples],
            "views": [
                {"size": view.image.shape[:2], "boxes": view.boxes.tolist(), "phrases": view.phrases} for view in views
            ],
        }
        images = [view.image for view in views]
        return record, torch.from_numpy(padded(images, self._sizes(record)))

    def _sizes(self, record: Record) -> list[tuple[int, int]]:
        """Return the (height, width) to which each view is resized."""
        return [self.collate.image_spec.resized(*view["size"]) for view in record["views"]]

    def batch(self, items: Sequence[tuple[Record, Tensor]]) -> ViewBatch:
        """Make a batch of items: the `collate_fn` of a DataLoader."""
        records, sizes = [record for record, _ in items], [size for record, _ in items for size in self._sizes(record)]
        height, width = np.max(sizes, axis=0).tolist()
        missing = [(0, width - images.shape[3], 0, height - images.shape[2]) for _, images in items]
        images = torch.cat([F.pad(x, pad) if any(pad) else x for (_, x), pad in zip(items, missing, strict=True)])
        return ViewBatch(records, images, tuple(sizes), torch.from_numpy(self.normalization))

    def _load(self, index: int) -> Sample:
        sample = checked(self.source.load(index, 0))
        if len(sample.phrases) != 1 or len(sample.boxes) != 1:
            raise DataError(
                f"{sample.id} has {len(sample.phrases)} phrases and {len(sample.boxes)} boxes; a feature cache is for "
                "models and data of one box for one expression: train without data.cache"
            )
        self.collate.texts([sample])  # otherwise too long a text would only be found after all images are encoded
        return sample


@dataclass(frozen=True)
class ViewBatch(Movable):
    """Some images in all views, as they come from data workers; on a GPU by way of page-locked memory."""

    records: list[Record]
    images: Tensor  # [images x V, 3, H, W] uint8; padding right of and below an image smaller than H x W
    sizes: tuple[tuple[int, int], ...]  # [images x V] (height, width) without padding
    normalization: Tensor  # [2, 3, 1, 1] float32, mean and standard deviation of pixels in 0..255

    def normalized(self) -> Tensor:
        """Return the images as model input, [images x V, 3, H, W] float32."""
        mean, std = self.normalization
        return self.images.float().sub_(mean).div_(std)

"""Images that are in both training and evaluation data: detect, report and optionally remove them from training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Generic

import numpy as np

from vg.data.mixture import Mixture, sources_of
from vg.data.source import HasImageKeys, Loaded, Source, phrases_of, with_image_groups, with_image_sizes
from vg.errors import DataError


def without_overlap(train: Source[Loaded], evaluations: Sequence[Source], drop: bool) -> Source[Loaded]:
    """Return the training source, if `drop` without the samples whose image is also in an evaluation source.

    RefCOCO, RefCOCO+ and RefCOCOg all use images of COCO train2014, so the training split of one contains images of the
    test splits of another. Images are identified by their COCO id in the file name, otherwise by their path; generated
    images are never shared. Every overlap causes a warning.

    Raises:
        DataError: no training sample is left.
    """
    if isinstance(train, Mixture):
        sources = [without_overlap(source, evaluations, drop) for source in train.sources]
        return Mixture(sources, train.weights, train.seed)
    if not isinstance(train, HasImageKeys):
        return train
    keys = train.image_keys()
    shared = np.zeros(len(keys), bool)  # [samples]
    for evaluation in (source for mixture in evaluations for source in sources_of(mixture)):
        if isinstance(evaluation, HasImageKeys):
            evaluated = set(evaluation.image_keys())
            overlap = np.array([key in evaluated for key in keys], bool)
            shared |= overlap
            if overlap.any():
                warnings.warn(
                    f"{overlap.sum()} of {len(train)} training samples of {train.provenance} have "
                    f"{len(evaluated & set(keys))} of the {len(evaluated)} images that {evaluation.provenance} is "
                    "evaluated on; "
                    + ("they are dropped from training" if drop else "data.drop_overlap=true drops them from training"),
                    stacklevel=2,
                )
    if not drop or not shared.any():
        return train
    if shared.all():
        raise DataError(
            f"{train.provenance}: every image is also in the evaluation data; take another split, or set "
            "data.drop_overlap=false"
        )
    return Subset(train, np.flatnonzero(~shared))


class Subset(Generic[Loaded]):
    """Some samples of a source, in its order."""

    def __init__(self, source: Source[Loaded], indices: np.ndarray):
        self.source: Source[Loaded] = source
        self.indices = indices  # [kept samples] int
        self.provenance = source.provenance

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, epoch: int) -> Loaded:
        return self.source.load(int(self.indices[index]), epoch)

    def image_sizes(self, epoch: int) -> np.ndarray:
        return with_image_sizes(self.source).image_sizes(epoch)[self.indices]

    def image_groups(self, epoch: int) -> np.ndarray:
        return with_image_groups(self.source).image_groups(epoch)[self.indices]

    def sample_phrases(self) -> list[tuple[str, tuple[str, ...]]]:
        known = phrases_of(self.source)
        return [known[index] for index in self.indices] if known else []

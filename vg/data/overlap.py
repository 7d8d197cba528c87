"""Pictures that are in the training data and in the evaluation data: they are found, told, and left out if asked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from vg.data.mixture import Mixture
from vg.data.source import HasImageGroups, HasImageKeys, HasImageSizes, Source
from vg.errors import DataError
from vg.types import Sample


def without_overlap(train: Source, evaluations: Sequence[Source], drop: bool) -> Source:
    """The training source, if `drop` without the samples whose picture is also in an evaluation source.

    RefCOCO, RefCOCO+ and RefCOCOg all show pictures of COCO train2014, so that the training split of one has pictures
    of the test splits of another. Pictures are told apart by COCO's number in the file name, else by their path;
    sources that draw their pictures have none to share. Warns of every overlap.

    Raises:
        DataError: nothing would be left.
    """
    if isinstance(train, Mixture):
        parts = [without_overlap(part, evaluations, drop) for part in train.parts]
        return Mixture(parts, train.weights, train.seed)
    if not isinstance(train, HasImageKeys):
        return train
    keys = train.image_keys()
    shared = np.zeros(len(keys), bool)  # [samples]
    for evaluation in evaluations:
        for part in evaluation.parts if isinstance(evaluation, Mixture) else [evaluation]:
            if isinstance(part, HasImageKeys):
                judged = set(part.image_keys())
                here = np.array([key in judged for key in keys], bool)
                shared |= here
                if here.any():
                    _warn(train, part, int(here.sum()), len(judged & set(keys)), len(judged), drop)
    if not drop or not shared.any():
        return train
    if shared.all():
        raise DataError(
            f"{train.provenance.data} ({train.provenance.split}): every picture is also in the evaluation data; "
            "take another split, or set data.drop_overlap=false"
        )
    return Subset(train, np.flatnonzero(~shared))


def _warn(train: Source, evaluation: Source, samples: int, pictures: int, judged: int, drop: bool) -> None:
    one, other = train.provenance, evaluation.provenance
    warnings.warn(
        f"{samples} of {len(train)} training samples of {one.data} ({one.split}) show {pictures} of the {judged} "
        f"pictures that {other.data} ({other.split}) is evaluated on; "
        + ("they are left out of training" if drop else "data.drop_overlap=true leaves them out of training"),
        stacklevel=3,
    )


class Subset:
    """Some samples of a source, in its order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source = source
        self.indices = indices  # [kept samples] int
        self.provenance = source.provenance

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, epoch: int) -> Sample:
        return self.source.load(int(self.indices[index]), epoch)

    def image_sizes(self, epoch: int) -> np.ndarray:
        if not isinstance(self.source, HasImageSizes):
            raise DataError(f"{self.provenance.data} does not know how large its pictures are")
        return self.source.image_sizes(epoch)[self.indices]

    def image_groups(self, epoch: int) -> np.ndarray:
        if not isinstance(self.source, HasImageGroups):
            raise DataError(f"{self.provenance.data} does not know which samples show the same picture")
        return self.source.image_groups(epoch)[self.indices]

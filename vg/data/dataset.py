"""From a source to what a DataLoader reads: samples that were checked and augmented, the same in every run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch.utils.data import Dataset

from vg.data.augment import Augment
from vg.data.features import FeatureSample
from vg.data.source import Source, checked
from vg.errors import BadSampleError, DataError
from vg.types import Sample, Text

logger = logging.getLogger(__name__)

BadSamples = Literal["error", "skip"]


class GroundingDataset(Dataset[Sample | FeatureSample]):
    """Samples of a source.

    Whatever is random depends on (seed, epoch, index) only: neither workers nor a resumed run change it.

    Args:
        bad_samples: "error" raises BadSampleError for a sample that cannot be used; "skip" warns, counts it, and gives
            the next good one instead (its id is the same both times, so that metrics count it once).
        texts: what will make text of samples, if a sample whose phrases it refuses is to be skipped as well.
    """

    def __init__(
        self,
        source: Source,
        augment: Augment | None = None,
        seed: int = 0,
        bad_samples: BadSamples = "error",
        texts: Callable[[Sequence[Sample]], Text] | None = None,
    ):
        if len(source) == 0:
            raise DataError(f"{source.provenance} holds no samples")
        self.source = source
        self.augment = augment
        self.seed = seed
        self.skip = bad_samples == "skip"
        self.texts = texts
        # Shared memory: the workers of a DataLoader write, the main process counts.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self.bad = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # [samples] skipped at least once
        self._unreadable = torch.zeros_like(self.bad).share_memory_()  # [samples] and not to be tried again

    def begin_epoch(self, epoch: int) -> None:
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample | FeatureSample:
        for candidate in (*range(index, len(self)), *range(index)) if self.skip else (index,):
            if self._unreadable[candidate]:
                continue
            try:
                sample = self._load(candidate)
            except BadSampleError as error:
                if not self.skip:
                    raise
                self._unreadable[candidate] = True
                self._count(candidate, error)
                continue
            if self.skip and self.texts and isinstance(sample, Sample):
                try:
                    self.texts([sample])  # else it is made once, for the whole batch, which would stop there
                except BadSampleError as error:  # in this epoch: in another one its phrases may be others
                    self._count(candidate, error)
                    continue
            return sample
        raise DataError(f"{self.source.provenance}: every sample is bad; the warnings above name the reasons")

    def _load(self, index: int) -> Sample | FeatureSample:
        epoch = int(self._epoch[0])
        sample = self.source.load(index, epoch)
        if isinstance(sample, FeatureSample):  # was checked before it was encoded, and has its views for augmentation
            return sample
        sample = checked(sample)
        return self.augment(sample, seed=(self.seed, epoch, index)) if self.augment else sample

    def _count(self, index: int, error: BadSampleError) -> None:
        if not self.bad[index]:
            self.bad[index] = True
            logger.warning("skipped a bad sample: %s", error)

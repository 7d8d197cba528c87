"""From a source to a Dataset for a DataLoader: samples that are checked and augmented, the same in every run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, groupby
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch.utils.data import Dataset

from vg.data.augment import Augment
from vg.data.collate import Collator
from vg.data.images import decoded_once
from vg.data.mixture import Mixture, sources_of
from vg.data.shared_images import joined, separated
from vg.data.source import Loaded, Source, checked, image_groups_of
from vg.errors import BadSampleError, DataError
from vg.types import Batch, EncodedBatch, EncodedSample, Sample

logger = logging.getLogger(__name__)

BadSamples = Literal["error", "skip"]
_NUM_LISTED = 10  # samples with phrases that are too long


class SourceDataset(Dataset[Loaded]):
    """Samples of a source as they are.

    Randomness depends on (seed, epoch, index) only, so neither workers nor resuming change it.

    Args:
        collate: makes a batch of samples: the `collate_fn` of a DataLoader.
        bad_samples: "error" raises BadSampleError for an unusable sample; "skip" warns, counts it, and returns the next
            good one instead (metrics count the duplicate once, by its id).
    """

    def __init__(
        self,
        source: Source[Loaded],
        collate: Callable[[Sequence[Loaded]], Batch | EncodedBatch] | None = None,
        bad_samples: BadSamples = "error",
    ):
        if len(source) == 0:
            raise DataError(f"{source.provenance} has no samples")
        self.source: Source[Loaded] = source
        self.collate: Callable[[Sequence[Loaded]], Batch | EncodedBatch] | None = collate
        self.skip = bad_samples == "skip"
        # Shared memory: the workers of a DataLoader write, the main process reads.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        length = sum(map(len, sources_of(source)))  # an epoch of a mixture may have fewer samples, or more
        self.bad = torch.zeros(length, dtype=torch.bool).share_memory_()  # [samples] skipped at least once
        self._unreadable = torch.zeros_like(self.bad).share_memory_()  # [samples] bad in every epoch

    def begin_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Loaded:
        epoch = int(self._epoch)
        if not self.skip:
            return self._load(index, epoch)
        for candidate in chain(range(index, len(self)), range(index)):
            number = self.source.number(candidate, epoch) if isinstance(self.source, Mixture) else candidate
            if self._unreadable[number]:
                continue
            sample = None
            try:
                sample = self._load(candidate, epoch)
                self._check_text(sample)
                return sample
            except BadSampleError as error:
                self._unreadable[number] = sample is None  # its phrases may differ in another epoch
                if not self.bad[number]:
                    self.bad[number] = True
                    logger.warning("skipped a bad sample: %s", error)
        raise DataError(f"{self.source.provenance}: every sample is bad; the warnings above name the reasons")

    def _load(self, index: int, epoch: int) -> Loaded:
        return self.source.load(index, epoch)

    def _check_text(self, sample: Loaded) -> None:
        """Raise BadSampleError if the collate function would refuse the phrases."""


class GroundingDataset(SourceDataset[Sample]):
    """Samples of a source after validation and augmentation; further arguments as in SourceDataset.

    Args:
        share_images: give samples of one image in a batch the same array, which the collator passes on once. With
            augmentation, consecutive samples share it, and the source must have `image_groups`.

    Raises:
        BadSampleError: phrases that the source lists (`sample_phrases`) exceed the token limit of the model.
        DataError: see `share_images`.
    """

    def __init__(
        self,
        source: Source[Sample],
        augment: Augment | None = None,
        seed: int = 0,
        bad_samples: BadSamples = "error",
        collate: Collator | None = None,
        share_images: bool = False,
    ):
        super().__init__(source, collate, bad_samples)
        self.share_images = share_images
        self.augment = augment
        self.seed = seed
        self._groups: tuple[int, np.ndarray] | None = None  # epoch, and an id of the image of each sample
        if share_images and augment:
            self._groups = 0, image_groups_of(source, 0)
        self.texts = collate and collate.texts
        for part in sources_of(source):
            self._check_lengths(part)

    def _check_lengths(self, source: Source[Sample]) -> None:
        """Find samples whose phrases do not fit the model before any image is read; raise BadSampleError or skip them.

        The samples of a mixture are skipped when they are loaded.
        """
        phrases = source.sample_phrases() if self.texts else []
        problems = self.texts.problems(phrases) if self.texts and phrases else {}
        if not problems:
            return
        listed = "\n  ".join([*list(problems.values())[:_NUM_LISTED], *["..."] * (len(problems) > _NUM_LISTED)])
        found = f"{source.provenance}: the model cannot take {len(problems)} of {len(phrases)} samples:\n  {listed}"
        if not self.skip:
            raise BadSampleError(f"{found}\ndata.bad_samples=skip (--bad-samples skip of a suite) leaves them out")
        logger.warning("skipped: %s", found)
        if source is self.source:
            self.bad[list(problems)] = self._unreadable[list(problems)] = True

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Load the samples of a batch; a DataLoader calls this."""
        if self._groups is None:
            with decoded_once() if self.share_images else nullcontext():
                return [self[index] for index in indices]
        epoch = int(self._epoch)
        if self._groups[0] != epoch:
            self._groups = epoch, image_groups_of(self.source, epoch)
        samples: list[Sample] = []
        for _, group in groupby(indices, self._groups[1].__getitem__):
            samples += self._of_one_image(list(group), epoch)
        return samples

    def _of_one_image(self, indices: Sequence[int], epoch: int) -> list[Sample]:
        try:
            with decoded_once():
                unchanged = [self._unchanged(index, epoch) for index in indices]
            whole = joined(unchanged)
            samples = separated(self._augmented(whole), unchanged)
            if self.skip and self.texts:
                self.texts(samples)
        except BadSampleError:
            if not self.skip:
                raise
            return [self[index] for index in indices]  # without the bad ones
        return samples

    def _load(self, index: int, epoch: int) -> Sample:
        return self._augmented(self._unchanged(index, epoch))

    def _unchanged(self, index: int, epoch: int) -> Sample:
        return replace(checked(super()._load(index, epoch)), seed=(self.seed, epoch, index))

    def _augmented(self, sample: Sample) -> Sample:
        return self.augment(sample, sample.seed) if self.augment and sample.seed else sample

    def _check_text(self, sample: Sample) -> None:
        if self.texts:  # otherwise the collator would raise for the whole batch
            self.texts([sample])


RunDataset: TypeAlias = SourceDataset[Sample] | SourceDataset[EncodedSample]  # with pixels, or with cached features

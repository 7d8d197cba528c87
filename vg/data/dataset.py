"""From a source to what a DataLoader reads: samples that were checked and augmented, the same in every run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from vg.data.augment import Augment
from vg.data.features import FeatureSample
from vg.data.source import BadSampleError, DataError, Grouped, Measured, Source, checked
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


class EpochSampler(Sampler[int]):
    """A new order of all indices for every epoch, a function of (seed, epoch) alone."""

    def __init__(self, length: int, seed: int):
        self.length = length
        self.seed = seed
        self.epoch = 0

    def begin_epoch(self, epoch: int) -> None:  # not `set_epoch`: Accelerate would call that with a count of its own
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class Together(EpochSampler):
    """As above, but samples of one picture stand together in groups of at most `most`, so that a batch can share it.

    Args:
        source: a vg.data.source.Grouped.

    Raises:
        DataError: the source does not know which samples show the same picture.
    """

    def __init__(self, source: Source, seed: int, most: int):
        if not isinstance(source, Grouped):
            raise DataError(f"{source.provenance.data} does not know which samples show the same picture")
        super().__init__(len(source), seed)
        self.source = source
        self.most = most

    def __iter__(self) -> Iterator[int]:
        order = np.array(list(super().__iter__()), np.int64)  # [samples]
        pictures = self.source.pictures(self.epoch)[order]
        order = order[np.argsort(pictures, kind="stable")]  # picture by picture, in random order within each
        _, first, counts = np.unique(np.sort(pictures), return_index=True, return_counts=True)
        place = np.arange(len(order)) - np.repeat(first, counts)  # [samples] among those of the same picture
        groups = np.cumsum(place % self.most == 0) - 1  # [samples]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rank = torch.randperm(int(groups[-1]) + 1, generator=generator).numpy()  # [groups]
        return iter(order[np.argsort(rank[groups], kind="stable")].tolist())


class SimilarShapes(EpochSampler):
    """As above, and every `group` indices in a row have pictures of similar aspect, so that a batch needs less padding.

    An order is cut into stretches, each is sorted by aspect and cut into groups, and the groups are shuffled. What does
    not fill a group comes last and is drawn before anything is sorted: left out (`drop_last`), it is a fair sample.

    Args:
        group: samples of one step of all processes: batch size x processes.

    Raises:
        DataError: the source does not know the sizes of its pictures.
    """

    STRETCH = 64  # groups that are sorted together: more are more alike, fewer mix better

    def __init__(self, source: Source, seed: int, group: int):
        if not isinstance(source, Measured):
            raise DataError(
                f"{source.provenance.data} does not know how large its pictures are, so they stay ungrouped"
            )
        super().__init__(len(source), seed)
        self.source = source
        self.group = group

    def __iter__(self) -> Iterator[int]:
        order = torch.tensor(list(super().__iter__()), dtype=torch.long)  # [samples]
        sizes = torch.as_tensor(self.source.sizes(self.epoch))  # [samples, 2]
        aspects = sizes[:, 1] / sizes[:, 0]
        filled = self.length - self.length % self.group
        stretches = order[:filled].split(self.STRETCH * self.group)
        ordered = [stretch[aspects[stretch].argsort(stable=True)] for stretch in stretches]
        groups = (
            torch.cat(ordered).view(-1, self.group) if ordered else order[:0].view(-1, self.group)
        )  # [groups, group]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = groups[torch.randperm(len(groups), generator=generator)]
        return iter([*groups.flatten().tolist(), *order[filled:].tolist()])

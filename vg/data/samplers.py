"""The order of training samples: a function of (seed, epoch) only, so a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from vg.data.source import HasImageGroups, HasImageSizes, Source
from vg.errors import DataError


class EpochSampler(Sampler[int]):
    """A new permutation of all indices in every epoch."""

    def __init__(self, length: int, seed: int):
        self.length = length
        self.seed = seed
        self.epoch = 0

    def begin_epoch(self, epoch: int) -> None:  # not `set_epoch`: Accelerate would call it with its own counter
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class ImageGroupedSampler(EpochSampler):
    """Samples of the same image in groups of at most `group_size`, so that a batch can share it; groups are shuffled.

    Raises:
        DataError: the source does not implement vg.data.source.HasImageGroups.
    """

    def __init__(self, source: Source, seed: int, group_size: int):
        if not isinstance(source, HasImageGroups):
            raise DataError(
                f"{source.provenance.data} does not group its samples by image, as "
                "data.cache.expressions_per_image above 1 needs"
            )
        super().__init__(len(source), seed)
        self.source = source
        self.group_size = group_size

    def __iter__(self) -> Iterator[int]:
        order = np.array(list(super().__iter__()), np.int64)  # [samples]
        images = self.source.image_groups(self.epoch)[order]
        order = order[np.argsort(images, kind="stable")]  # sorted by image, in random order within each
        _, first, counts = np.unique(np.sort(images), return_index=True, return_counts=True)
        index_in_image = np.arange(len(order)) - np.repeat(first, counts)  # [samples]
        groups = np.cumsum(index_in_image % self.group_size == 0) - 1  # [samples]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rank = torch.randperm(int(groups[-1]) + 1, generator=generator).numpy()  # [groups]
        return iter(order[np.argsort(rank[groups], kind="stable")].tolist())


class AspectRatioGroupedSampler(EpochSampler):
    """Groups of `group_size` consecutive samples whose images have similar aspect ratios, so batches need less padding.

    A permutation is cut into chunks, each chunk is sorted by aspect ratio and cut into groups, and the groups are
    shuffled. The incomplete last group is split off before sorting: dropping it (`drop_last`) does not bias the data.

    Args:
        group_size: samples of one step of all processes: batch size x processes.

    Raises:
        DataError: the source does not implement vg.data.source.HasImageSizes.
    """

    CHUNK = 64  # groups that are sorted together: larger chunks are more uniform, smaller ones mix better

    def __init__(self, source: Source, seed: int, group_size: int):
        if not isinstance(source, HasImageSizes):
            raise DataError(f"{source.provenance.data} provides no image sizes, which data.group_by_aspect_ratio needs")
        super().__init__(len(source), seed)
        self.source = source
        self.group_size = group_size

    def __iter__(self) -> Iterator[int]:
        order = torch.tensor(list(super().__iter__()), dtype=torch.long)  # [samples]
        sizes = torch.as_tensor(self.source.image_sizes(self.epoch))  # [samples, 2]
        aspects = sizes[:, 1] / sizes[:, 0]
        grouped = self.length - self.length % self.group_size
        chunks = order[:grouped].split(self.CHUNK * self.group_size)
        sorted_chunks = [chunk[aspects[chunk].argsort(stable=True)] for chunk in chunks]
        groups = torch.cat([*sorted_chunks, order[:0]]).view(-1, self.group_size)  # [groups, group_size]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = groups[torch.randperm(len(groups), generator=generator)]
        return iter([*groups.flatten().tolist(), *order[grouped:].tolist()])

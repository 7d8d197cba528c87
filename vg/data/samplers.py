"""The order of training samples: a function of (seed, epoch) only, so a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from vg.data.source import Source, with_image_groups, with_image_sizes


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

    def permutation(self, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(length, generator=generator)

    def __iter__(self) -> Iterator[int]:
        return iter(self.permutation(self.length).tolist())


class ImageGroupedSampler(EpochSampler):
    """Samples of the same image in groups of at most `group_size`, so that a batch can share it; groups are shuffled.

    Raises DataError unless the source implements vg.data.source.HasImageGroups.
    """

    def __init__(self, source: Source, seed: int, group_size: int):
        super().__init__(len(source), seed)
        self.source = with_image_groups(source)
        self.group_size = group_size

    def __iter__(self) -> Iterator[int]:
        order = self.permutation(self.length).numpy()  # [samples]
        images = self.source.image_groups(self.epoch)[order]
        order = order[np.argsort(images, kind="stable")]  # sorted by image, in random order within each
        _, first, counts = np.unique(np.sort(images), return_index=True, return_counts=True)
        index_in_image = np.arange(len(order)) - np.repeat(first, counts)  # [samples]
        groups = np.cumsum(index_in_image % self.group_size == 0) - 1  # [samples]
        rank = self.permutation(int(groups[-1]) + 1).numpy()  # [groups]
        return iter(order[np.argsort(rank[groups], kind="stable")].tolist())


class AspectRatioGroupedSampler(EpochSampler):
    """Groups of `group_size` consecutive samples whose images have similar aspect ratios, so batches need less padding.

    A permutation is cut into chunks, each chunk is sorted by aspect ratio and cut into groups, and the groups are
    shuffled. The incomplete last group is split off before sorting: dropping it (`drop_last`) does not bias the data.

    Raises DataError unless the source implements vg.data.source.HasImageSizes.

    Args:
        group_size: samples of one step of all processes: batch size x processes.
    """

    CHUNK = 64  # groups that are sorted together: larger chunks are more uniform, smaller ones mix better

    def __init__(self, source: Source, seed: int, group_size: int):
        super().__init__(len(source), seed)
        self.source = with_image_sizes(source)
        self.group_size = group_size

    def __iter__(self) -> Iterator[int]:
        order = self.permutation(self.length)  # [samples]
        sizes = torch.as_tensor(self.source.image_sizes(self.epoch))  # [samples, 2]
        aspects = sizes[:, 1] / sizes[:, 0]
        grouped = self.length - self.length % self.group_size
        chunks = order[:grouped].split(self.CHUNK * self.group_size)
        sorted_chunks = [chunk[aspects[chunk].argsort(stable=True)] for chunk in chunks]
        groups = torch.cat([*sorted_chunks, order[:0]]).view(-1, self.group_size)  # [groups, group_size]
        groups = groups[self.permutation(len(groups))]
        return iter([*groups.flatten().tolist(), *order[grouped:].tolist()])

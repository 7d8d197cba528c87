"""The order of training samples: a function of (seed, epoch) alone, so that a resumed run repeats it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from vg.data.source import HasImageGroups, HasImageSizes, Source
from vg.errors import DataError


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


class ImageGroupedSampler(EpochSampler):
    """As above, but samples of one picture stand together in groups of at most `most`, so that a batch can share it.

    Args:
        source: a vg.data.source.HasImageGroups.

    Raises:
        DataError: the source does not know which samples show the same picture.
    """

    def __init__(self, source: Source, seed: int, most: int):
        if not isinstance(source, HasImageGroups):
            raise DataError(f"{source.provenance.data} does not know which samples show the same picture")
        super().__init__(len(source), seed)
        self.source = source
        self.most = most

    def __iter__(self) -> Iterator[int]:
        order = np.array(list(super().__iter__()), np.int64)  # [samples]
        pictures = self.source.image_groups(self.epoch)[order]
        order = order[np.argsort(pictures, kind="stable")]  # picture by picture, in random order within each
        _, first, counts = np.unique(np.sort(pictures), return_index=True, return_counts=True)
        place = np.arange(len(order)) - np.repeat(first, counts)  # [samples] among those of the same picture
        groups = np.cumsum(place % self.most == 0) - 1  # [samples]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rank = torch.randperm(int(groups[-1]) + 1, generator=generator).numpy()  # [groups]
        return iter(order[np.argsort(rank[groups], kind="stable")].tolist())


class AspectRatioGroupedSampler(EpochSampler):
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
        if not isinstance(source, HasImageSizes):
            raise DataError(
                f"{source.provenance.data} does not know how large its pictures are, so they stay ungrouped"
            )
        super().__init__(len(source), seed)
        self.source = source
        self.group = group

    def __iter__(self) -> Iterator[int]:
        order = torch.tensor(list(super().__iter__()), dtype=torch.long)  # [samples]
        sizes = torch.as_tensor(self.source.image_sizes(self.epoch))  # [samples, 2]
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

"""The order of training samples: a function of (seed, epoch) that can be read from any position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch.utils.data import Sampler

from vg.data.order import BlockOrder
from vg.data.source import Source, image_groups_of, image_sizes_of

BLOCK = 16  # shards that are shuffled together: more mix better, fewer are read more sequentially


class EpochSampler(Sampler[int]):
    """A new permutation of all indices in every epoch; of a source in shards, samples are shuffled inside blocks."""

    alignment = 1  # blocks end at multiples of it; the samples after that are arranged with the next block

    def __init__(self, source: Source, seed: int):
        self.source = source
        self.length = len(source)
        self.shard_ends = source.shard_ends()
        self.seed = seed
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> None:
        """Select an epoch, and the positions in its order to read; not named `set_epoch`, which Accelerate calls."""
        self.epoch = epoch
        self.start, self.stop = start, self.length if stop is None else stop

    def __len__(self) -> int:
        return self.stop - self.start

    def permutation(self, length: int, block: int = 0) -> np.ndarray:
        seed = self.seed * 1_000_003 + self.epoch + (block << 40)
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed % 2**64)).numpy()

    def arrangement(self) -> Callable[[np.ndarray, int], np.ndarray]:
        """Return a function of the shuffled samples of a block, and its number, that returns them in their order."""
        return lambda indices, block: indices

    def __iter__(self) -> Iterator[int]:
        order, arrange = BlockOrder(self.shard_ends, self.permutation, BLOCK), self.arrangement()
        ends = order.ends // self.alignment * self.alignment  # [blocks]
        ends[-1] = self.length
        position = self.start
        while position < self.stop:
            block = int(np.searchsorted(ends, position, side="right"))
            start, end = int(ends[block - 1]) if block else 0, int(ends[block])
            yield from arrange(order[start:end], block)[position - start : self.stop - start].tolist()
            position = end


class ImageGroupedSampler(EpochSampler):
    """Samples of the same image in groups of at most `group_size`, so that a batch can share it; groups are shuffled.

    Raises DataError if the source has no `image_groups`.
    """

    def __init__(self, source: Source, seed: int, group_size: int):
        super().__init__(source, seed)
        image_groups_of(source, 0)  # raises before the training begins
        self.group_size = group_size

    def arrangement(self) -> Callable[[np.ndarray, int], np.ndarray]:
        return partial(self._grouped, image_groups_of(self.source, self.epoch))

    def _grouped(self, image_groups: np.ndarray, order: np.ndarray, block: int) -> np.ndarray:
        images = image_groups[order]  # [samples]
        order = order[np.argsort(images, kind="stable")]  # sorted by image, in random order within each
        _, first, counts = np.unique(np.sort(images), return_index=True, return_counts=True)
        index_in_image = np.arange(len(order)) - np.repeat(first, counts)  # [samples]
        groups = np.cumsum(index_in_image % self.group_size == 0) - 1  # [samples]
        rank = self.permutation(int(groups[-1]) + 1, block)  # [groups]
        return order[np.argsort(rank[groups], kind="stable")]


class AspectRatioGroupedSampler(EpochSampler):
    """Groups of `group_size` consecutive samples whose images have similar aspect ratios, so batches need less padding.

    A block is cut into chunks, each chunk is sorted by aspect ratio and cut into groups, and the groups are shuffled.
    The incomplete last group of a block belongs to the next one; that of the last block is split off before sorting, so
    dropping it does not bias the data.

    Raises DataError if the source has no `image_sizes`.

    Args:
        group_size: samples of one optimizer step, in all processes and accumulated batches.
    """

    CHUNK = 64  # groups that are sorted together: larger chunks are more uniform, smaller ones mix better

    def __init__(self, source: Source, seed: int, group_size: int):
        super().__init__(source, seed)
        image_sizes_of(source, 0)  # raises before the training begins
        self.alignment = group_size

    def arrangement(self) -> Callable[[np.ndarray, int], np.ndarray]:
        sizes = image_sizes_of(self.source, self.epoch)  # [samples, 2]
        return partial(self._grouped, torch.as_tensor(sizes[:, 1]) / torch.as_tensor(sizes[:, 0]))

    def _grouped(self, aspects: torch.Tensor, indices: np.ndarray, block: int) -> np.ndarray:
        order = torch.from_numpy(indices)  # [samples]
        grouped = len(order) - len(order) % self.alignment
        chunks = order[:grouped].split(self.CHUNK * self.alignment)
        sorted_chunks = [chunk[aspects[chunk].argsort(stable=True)] for chunk in chunks]
        groups = torch.cat([*sorted_chunks, order[:0]]).view(-1, self.alignment)  # [groups, group_size]
        groups = groups[torch.from_numpy(self.permutation(len(groups), block))]
        return torch.cat([groups.flatten(), order[grouped:]]).numpy()

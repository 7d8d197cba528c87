"""A permutation of samples in shards that reads few shards at a time and can start anywhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

KEPT = 64  # shards whose samples are listed in memory


class BlockOrder:
    """A permutation in which the samples of a block, which is a few random shards, follow each other.

    Blocks are made when they are needed: starting in the middle only counts the samples before, and the memory is that
    of a few blocks. With one block, it is a permutation of all samples.

    Args:
        shard_ends: index after the last sample of each shard: [shards] int, ascending.
        permutation: returns a permutation of `length` numbers for (length, number), always the same one; it is called
            with the numbers of the blocks, and with the number of blocks for the order of the shards.
        shards_per_block: the last block may have fewer.
    """

    def __init__(
        self, shard_ends: np.ndarray, permutation: Callable[[int, int], np.ndarray], shards_per_block: int = 1
    ):
        self.permutation = permutation
        self.shards_per_block = shards_per_block
        first = np.arange(0, len(shard_ends), shards_per_block)  # [blocks] position of its first shard
        self._shards = permutation(len(shard_ends), len(first))
        self._starts, self._sizes = np.append(0, shard_ends[:-1]), np.diff(shard_ends, prepend=0)  # [shards]
        # [blocks] position after its last sample
        self.ends: np.ndarray = np.cumsum(np.add.reduceat(self._sizes[self._shards], first))
        self._blocks: dict[int, np.ndarray] = {}

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Return the indices of the samples at some positions, [samples] int; a slice needs a start and a stop."""
        first, last = np.searchsorted(self.ends, [positions.start, positions.stop - 1], side="right").tolist()
        offset = int(self.ends[first - 1]) if first else 0
        blocks = [self._block(number) for number in range(first, last + 1)]
        indices = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)  # which copies
        return indices[positions.start - offset : positions.stop - offset]

    def _block(self, number: int) -> np.ndarray:
        """Return the indices of the samples of a block, shuffled."""
        if number not in self._blocks:
            if len(self._blocks) * self.shards_per_block >= KEPT:
                del self._blocks[next(iter(self._blocks))]
            shards = np.sort(self._shards[number * self.shards_per_block :][: self.shards_per_block])
            ranges = zip(self._starts[shards].tolist(), self._sizes[shards].tolist(), strict=True)
            indices = np.concatenate([np.arange(start, start + size) for start, size in ranges])
            self._blocks[number] = indices[self.permutation(len(indices), number)]
        return self._blocks[number]

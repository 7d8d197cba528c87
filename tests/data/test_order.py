"""Orders of samples: what they were without shards, and few shards at a time with them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest

from vg.data import samplers
from vg.data.mixture import Mixture
from vg.data.order import BlockOrder
from vg.data.samplers import AspectRatioGroupedSampler, EpochSampler, ImageGroupedSampler
from vg.data.source import Provenance, Source
from vg.data.subset import Subset
from vg.types import Sample


class Plain(Source[Sample]):
    """A source without shards; several samples share an image."""

    def __init__(self, length: int, groups: int = 4) -> None:
        self.provenance = Provenance("plain", "train")
        self.length = length
        self.groups = groups

    def __len__(self) -> int:
        return self.length

    def load(self, index: int, epoch: int) -> Sample:
        raise NotImplementedError

    def image_sizes(self, epoch: int) -> np.ndarray:
        index = np.arange(self.length)
        return np.stack([10 + index * 7 % 5, 10 + index * 3 % 7], axis=1)

    def image_groups(self, epoch: int) -> np.ndarray:
        return (np.arange(self.length) * 5 + epoch) % self.groups


class Sharded(Plain):
    """Shards of different lengths, one of which is empty."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sum(sizes), groups=3)
        self.sizes = sizes

    def shard_ends(self) -> np.ndarray:
        return np.cumsum(self.sizes)


SIZES = [5, 1, 4, 0, 7, 3, 6, 2, 5, 4, 8]  # 45 samples


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "BLOCK", 3)


def every_sampler(source: Source) -> list[EpochSampler]:
    return [EpochSampler(source, 1), ImageGroupedSampler(source, 1, 2), AspectRatioGroupedSampler(source, 1, 4)]


def test_orders_without_shards_do_not_change_with_the_code() -> None:
    """A resumed run continues in the order in which it began."""
    plain = Plain(22)
    mixture = Mixture([Plain(9), Plain(5, 3), Plain(4, 2)], [0.7, 1.6, 2], seed=4)
    images = [
        [1, 9, 2, 6, 13, 17, 4, 16, 20, 0, 10, 18, 14, 15, 7, 11, 19, 3, 8, 12, 5, 21],
        [6, 9, 13, 11, 8, 3, 5, 2, 10, 7, 18, 20, 21, 19, 17, 15, 12, 4, 1, 0, 14, 16],
    ]
    for source, by_image in zip((plain, mixture), images, strict=True):
        found = []
        for sampler in every_sampler(source):
            sampler.begin_epoch(3)
            found.append(list(sampler))
        assert found[0] == [8, 13, 12, 4, 11, 17, 10, 5, 21, 19, 18, 2, 15, 7, 6, 14, 16, 20, 1, 9, 3, 0]
        assert found[1] == by_image
        assert sorted(found[2]) == list(range(22))
    assert [mixture.locate(index, 3)[:2] for index in range(6)] == [(0, 7), (0, 3), (0, 4), (0, 0), (0, 1), (0, 8)]
    assert mixture.image_groups(3).tolist() == [
        *(0, 0, 1, 1, 2, 1, 3, 4, 5, 3, 4),
        *(6, 7, 6, 8, 9, 8, 9, 10, 11, 10, 11),
    ]


def test_image_sizes_are_those_of_the_images_that_are_loaded() -> None:
    """A source in its second pass of an epoch may return another view of an image."""

    class Views(Plain):
        def image_sizes(self, epoch: int) -> np.ndarray:
            return super().image_sizes(epoch) + epoch

    sources = [Views(9), Views(5)]
    mixture = Mixture(sources, [0.7, 1.6])
    located = [mixture.locate(index, 3) for index in range(len(mixture))]
    sizes = [sources[number].image_sizes(epoch)[index].tolist() for number, index, epoch in located]
    assert mixture.image_sizes(3).tolist() == sizes


def test_a_block_has_the_samples_of_a_few_shards() -> None:
    source, shards = Sharded(SIZES), np.repeat(np.arange(len(SIZES)), SIZES)
    sampler = EpochSampler(source, seed=1)
    orders = []
    for epoch in range(4):
        sampler.begin_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(45))
        orders.append(order)
        blocks, start = [], 0
        while start < 45:  # the longest runs of samples from at most three shards
            stop = max(stop for stop in range(start + 1, 46) if len(set(shards[order[start:stop]])) <= 3)
            blocks.append(order[start:stop])
            start = stop
        assert len(blocks) <= 4
        assert any(block != sorted(block) for block in blocks)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("is_mixture", [False, True])
def test_an_order_can_start_and_stop_anywhere(number: int, is_mixture: bool) -> None:
    source = Mixture([Sharded(SIZES), Plain(20)], [1.5, 1]) if is_mixture else Sharded(SIZES)
    sampler = every_sampler(source)[number]
    for epoch in range(2):
        sampler.begin_epoch(epoch)
        whole = list(sampler)
        assert sorted(whole) == list(range(len(source)))
        for start in range(len(source)):
            sampler.begin_epoch(epoch, start, min(start + 7, len(source)))
            assert list(sampler) == whole[start : start + 7]
            assert len(sampler) == len(whole[start : start + 7])


def test_groups_reach_across_blocks_and_have_similar_images() -> None:
    source = Sharded([20] * 30)
    sampler = AspectRatioGroupedSampler(source, seed=0, group_size=8)
    for epoch in range(2):
        sampler.begin_epoch(epoch)
        order = np.array(list(sampler))
        assert sorted(order) == list(range(600))
        sizes = source.image_sizes(epoch)[order]
        spreads = np.ptp((sizes[:, 1] / sizes[:, 0]).reshape(-1, 8), axis=1)
        assert np.median(spreads) < 0.15, "groups in random order have 0.6"


def test_images_of_a_block_are_grouped() -> None:
    source = Sharded([6] * 12)
    sampler = ImageGroupedSampler(source, seed=0, group_size=2)
    images = source.image_groups(0)[list(sampler)].reshape(-1, 2)
    assert (images[:, 0] == images[:, 1]).all()


def test_a_partial_pass_reads_few_shards() -> None:
    """A tenth of the samples is a tenth of the shards, and another one in the next epoch."""
    source = Sharded([10] * 50)
    mixture = Mixture([source], [0.1])
    shards, seen = [], []
    for epoch in range(10):
        indices = [mixture.locate(index, epoch)[1] for index in range(len(mixture))]
        assert len(set(indices)) == 50
        shards.append({index // 10 for index in indices})
        seen += indices
    assert {len(chosen) for chosen in shards} == {5}
    assert sorted(seen) == list(range(500))
    assert mixture.shard_ends().tolist() == [10, 20, 30, 40, 50]


def test_shards_of_sources_that_consist_of_others() -> None:
    sharded = Sharded(SIZES)
    kept = np.flatnonzero(np.arange(45) % 3 != 0)
    subset = Subset(sharded, kept)
    bounds = [0, *subset.shard_ends().tolist()]
    shards = np.repeat(np.arange(len(SIZES)), SIZES)[kept]
    assert [shards[a:b].tolist() for a, b in itertools.pairwise(bounds)] == [
        shards[shards == shard].tolist() for shard in range(len(SIZES))
    ]
    plain = Subset(Plain(30), np.arange(20))
    assert plain.shard_ends().tolist() == [20]
    assert Mixture([plain] * 20).shard_ends().tolist() == [400]
    # Shards of both passes, and ranges of their mean length, ceil(45 / 11) = 5, of the rest and of the source without.
    mixture = Mixture([sharded, Plain(12)], [2.2, 1])
    ends = np.cumsum(SIZES)
    assert mixture.shard_ends().tolist() == [*ends, *(ends + 45), 95, 99, 104, 109, 111]


def test_ten_million_samples_take_the_memory_of_a_block() -> None:
    """Starting in the middle lists the samples of one block only."""
    ends = np.arange(1, 10_001) * 1000
    listed = []

    def permutation(length: int, number: int) -> np.ndarray:
        listed.append(length)
        return np.random.default_rng(number).permutation(length)

    start = time.perf_counter()
    order = BlockOrder(ends, permutation, shards_per_block=16)
    assert len(np.unique(order[7_000_000:7_001_000])) == 1000
    assert time.perf_counter() - start < 1
    assert listed == [10_000, 16_000]

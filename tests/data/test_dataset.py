"""From a source to samples: randomness depends on (seed, epoch, index) only, and bad samples are handled."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from vg.data.augment import AugmentConfig
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.data.mixture import Mixture
from vg.data.samplers import AspectRatioGroupedSampler, EpochSampler
from vg.data.source import Provenance, Source
from vg.data.subset import Subset
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import BadSampleError, DataError
from vg.models.encoders import load_tokenizer
from vg.models.settings import TextEncoderConfig
from vg.types import Sample, StretchedImage, TextSpec


@dataclass
class Indices(Source[Sample]):
    """Samples whose pixels and ids are their index; some are unusable."""

    length: int
    bad: frozenset[int] = frozenset()
    epochs: list[int] = field(default_factory=list)
    provenance: Provenance = Provenance("indices", "test")  # noqa: RUF009 - frozen

    def __len__(self) -> int:
        return self.length

    def load(self, index: int, epoch: int) -> Sample:
        self.epochs.append(epoch)
        right = 0 if index in self.bad else 8
        return Sample(
            id=f"indices/{index}",
            image=np.full((10, 10, 3), index, np.uint8),
            phrases=(f"index {index}",),
            boxes=np.array([[0, 0, right, 8]], np.float32),
            phrase_ids=np.zeros(1, np.int64),
        )


def ids(samples: Sequence[Sample]) -> list[int]:
    return [int(sample.id.removeprefix("indices/")) for sample in samples]


def test_samples_carry_what_their_random_choices_depend_on() -> None:
    data = GroundingDataset(Indices(5), AugmentConfig(flip=0.5).build(), seed=7)
    data.begin_epoch(3)
    assert [data[index].seed for index in (1, 4)] == [(7, 3, 1), (7, 3, 4)]


def test_a_bad_sample_is_an_error_that_names_it() -> None:
    data = GroundingDataset(Indices(5, frozenset({2})))
    assert ids([data[1], data[3]]) == [1, 3]
    with pytest.raises(BadSampleError, match=r"sample indices/2: box .* has no area"):
        data[2]
    with pytest.raises(BadSampleError, match="indices/2"):
        list(DataLoader(data, batch_size=None, num_workers=1))


def test_bad_samples_are_skipped_counted_and_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    source = Indices(5, frozenset({2, 3, 4}))
    data = GroundingDataset(source, bad_samples="skip")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert ids([data[index] for index in range(5)]) == [0, 1, 0, 0, 0], "the next good one"
    assert data.bad.tolist() == [False, False, True, True, True]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "skipped a bad sample: sample indices/2: box [0.0, 0.0, 0.0, 8.0]" in messages[0]
    assert len(source.epochs) == 3 + 3 * 5, "a bad sample is not read again"


def test_bad_samples_of_a_mixture_are_those_of_its_datasets(caplog: pytest.LogCaptureFixture) -> None:
    """Because an index in a mixture is another sample in another epoch."""
    mixture = Mixture([Indices(8, frozenset({3})), Indices(4)], weights=[0.5, 1.0])

    def epoch_of(data: GroundingDataset, epoch: int) -> list[str]:
        data.begin_epoch(epoch)
        return [data[index].id for index in range(len(data))]

    data = GroundingDataset(mixture, bad_samples="skip")
    for epoch in range(6):
        resumed = GroundingDataset(mixture, bad_samples="skip")
        assert epoch_of(data, epoch) == epoch_of(resumed, epoch)
    assert len(data.bad) == 8 + 4, "more than an epoch has"
    assert data.bad.nonzero().tolist() == [[3]]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 + 3, "of one dataset, and of the three resumed ones whose epoch has the sample"


def test_the_next_good_sample_is_found_without_a_list_of_all() -> None:
    data = GroundingDataset(Indices(100_000, frozenset({7})), bad_samples="skip")
    tracemalloc.start()
    assert ids([data[7]]) == [8]
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_workers_share_bad_samples_with_the_main_process() -> None:
    data = GroundingDataset(Indices(9, frozenset({1, 7, 8})), bad_samples="skip")
    found = list(DataLoader(data, batch_size=None, num_workers=2))
    assert ids(found) == [0, 2, 2, 3, 4, 5, 6, 0, 0]
    assert data.bad.nonzero().flatten().tolist() == [1, 7, 8]


@pytest.mark.parametrize("delimiters", [(), (".",)], ids=["one expression", "many phrases"])
def test_phrases_that_fit_into_no_prompt_are_skipped(delimiters: tuple[str, ...]) -> None:
    class Worded(Indices):
        """Samples of which one has too many words in the second epoch."""

        def load(self, index: int, epoch: int) -> Sample:
            phrase = "red thing " * 20 if (index, epoch) == (1, 1) else "red thing"
            return replace(super().load(index, epoch), phrases=(phrase,))

    tokenizer = load_tokenizer(TextEncoderConfig(architecture={"model_type": "bert"}))
    collate = Collator(StretchedImage(8, 8), TextSpec(tokenizer, 16, delimiters))
    data = GroundingDataset(Worded(3), bad_samples="skip", collate=collate)
    for epoch, expected in enumerate(([0, 1, 2], [0, 2, 2], [0, 1, 2], [0, 1, 2])):
        data.begin_epoch(epoch)
        assert ids([data[index] for index in range(3)]) == expected, "also in a run that is resumed here"
    assert data.bad.tolist() == [False, True, False]
    with pytest.raises(BadSampleError, match=r"indices/1.*tokens"):
        collate.texts([Worded(3).load(1, 1)])


class Described(Indices):
    """Samples whose phrases are known without their images; every third one has too many words."""

    def sample_phrases(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(f"indices/{n}", ("red thing " * 20 if n % 3 == 1 else "red thing",)) for n in range(self.length)]


@pytest.mark.parametrize("delimiters", [(), (".",)], ids=["one expression", "many phrases"])
def test_lengths_are_checked_before_any_sample_is_read(
    delimiters: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(TextEncoderConfig(architecture={"model_type": "bert"}))
    collate = Collator(StretchedImage(8, 8), TextSpec(tokenizer, 16, delimiters))
    subset = Subset(Described(9), np.array([0, 1, 2, 4]))
    for source in (subset, Mixture([Indices(2), subset])):
        with pytest.raises(BadSampleError, match=r"indices/4: .* tokens") as caught:
            GroundingDataset(source, collate=collate)
        assert str(caught.value).startswith("indices (test): the model cannot take 2 of 4 samples")
        assert "data.bad_samples=skip" in str(caught.value)
        assert "indices/1: " in str(caught.value)
    data = GroundingDataset(subset, bad_samples="skip", collate=collate)
    assert data.bad.tolist() == [False, True, False, True]
    assert ids([data[index] for index in range(4)]) == [0, 2, 2, 0]
    (message,) = [record.getMessage() for record in caplog.records if record.name == "vg.data.dataset"]
    assert message.startswith("skipped: indices (test): the model cannot take 2 of 4 samples")
    assert subset.source.epochs == [0, 0, 0, 0], "bad samples are not read"
    GroundingDataset(Subset(Indices(2), np.array([0])), collate=collate)


def test_only_bad_samples_are_an_error() -> None:
    data = GroundingDataset(Indices(3, frozenset({0, 1, 2})), bad_samples="skip")
    with pytest.raises(DataError, match="every sample is bad; the warnings above name the reasons"):
        data[1]
    with pytest.raises(DataError, match="has no samples"):
        GroundingDataset(Indices(0))


def test_the_same_sample_whatever_the_number_of_workers() -> None:
    augment = AugmentConfig(flip=0.5, color=0.3, crop=0.5).build()
    data = GroundingDataset(ShapesConfig(size=12, image_size=64).build(), augment, seed=3)

    def load_epoch(epoch: int, workers: int) -> list[Sample]:
        data.begin_epoch(epoch)
        return list(DataLoader(data, batch_size=None, num_workers=workers))

    def same(a: list[Sample], b: list[Sample]) -> list[bool]:
        return [
            np.array_equal(x.image, y.image) and x.phrases == y.phrases and np.array_equal(x.boxes, y.boxes)
            for x, y in zip(a, b, strict=True)
        ]

    first = load_epoch(0, workers=0)
    assert all(same(first, load_epoch(0, workers=2)))
    assert all(same(first, load_epoch(0, workers=1)))
    assert not any(same(first, load_epoch(1, workers=0)))
    assert all(same(first, load_epoch(0, workers=0)))


def test_the_augmentation_changes_with_seed_epoch_and_index() -> None:
    def images(seed: int, epoch: int) -> list[bytes]:
        data = GroundingDataset(Fixed(), AugmentConfig(color=0.5).build(), seed)
        data.begin_epoch(epoch)
        return [data[index].image.tobytes() for index in range(4)]

    drawn = images(0, 0) + images(0, 1) + images(1, 0)
    assert len(set(drawn)) == len(drawn)
    assert images(0, 1) == drawn[4:8]


class Fixed(Indices):
    """The same image at every index."""

    def __init__(self) -> None:
        super().__init__(4)

    def load(self, index: int, epoch: int) -> Sample:
        return super().load(100, epoch)


def test_persistent_workers_get_the_next_epoch() -> None:
    source = ShapesConfig(size=6, image_size=64).build()
    data = GroundingDataset(source)
    loader = DataLoader(data, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 2):
        data.begin_epoch(epoch)
        for index, sample in enumerate(loader):
            assert np.array_equal(sample.image, source.load(index, epoch).image)


def test_epoch_sampler() -> None:
    sampler = EpochSampler(Indices(50), seed=1)
    orders = []
    for epoch in range(3):
        sampler.begin_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(50))
        torch.rand(3)  # the global generator has no effect
        assert list(sampler) == orders[-1]
    assert len({tuple(order) for order in orders}) == 3
    other = EpochSampler(Indices(50), seed=2)
    assert list(other) != orders[0]
    assert len(other) == 50


class Shaped(Indices):
    """Images of three shapes in random order."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        random = np.random.default_rng(0)
        self.shapes = np.array([(480, 640), (640, 480), (300, 900)])[random.integers(3, size=length)]

    def image_sizes(self, epoch: int) -> np.ndarray:
        return self.shapes


def test_similar_aspect_ratios_are_grouped() -> None:
    source = Shaped(1000)
    sampler = AspectRatioGroupedSampler(source, seed=1, group_size=8)
    orders = []
    for epoch in range(3):
        sampler.begin_epoch(epoch)
        order = list(sampler)
        assert list(sampler) == order
        assert sorted(order) == list(range(1000))
        aspects = (source.shapes[order, 1] / source.shapes[order, 0]).reshape(-1, 8)
        assert (aspects != aspects[:, :1]).any(axis=1).sum() <= 2 * 2, "in a chunk of 64 groups, 2 have two shapes"
        assert len({tuple(row) for row in aspects[:10].tolist()}) > 1, "groups are shuffled"
        orders.append(order)
    assert orders[0] != orders[1]
    other = AspectRatioGroupedSampler(source, seed=2, group_size=8)
    assert list(other) != orders[0]


def test_the_incomplete_group_is_last_and_unbiased() -> None:
    source = Shaped(67)
    sampler = AspectRatioGroupedSampler(source, seed=0, group_size=8)
    rest = set()
    for epoch in range(60):
        sampler.begin_epoch(epoch)
        order = list(sampler)
        assert len(sampler) == len(order) == 67
        rest.update(order[64:])
    assert len(rest) > 50
    assert sorted(AspectRatioGroupedSampler(Shaped(3), seed=0, group_size=8)) == [0, 1, 2], "fewer than a group"


def test_aspect_ratio_grouping_needs_image_sizes() -> None:
    for source in (Indices(5), Subset(Indices(5), np.arange(3)), Mixture([Shaped(5), Indices(5)])):
        with pytest.raises(DataError, match="indices provides no image sizes"):
            AspectRatioGroupedSampler(source, seed=0, group_size=2)


def test_what_a_source_does_not_implement_is_unknown() -> None:
    for source in (Indices(5), Subset(Indices(9), np.arange(5))):
        assert source.image_sizes(0) is source.image_groups(0) is source.image_keys() is source.fingerprint() is None
        assert source.category_ids is source.num_classes is source.image_bytes(0) is None
        assert source.image_files() == [None] * 5
        assert source.shard_ends().tolist() == [5]
        assert [*source.sample_phrases(), *source.damaged_files()] == []
    with pytest.raises(TypeError, match="abstract method"):
        Source()


def test_batches_of_all_processes_have_one_shape() -> None:
    """Accelerate distributes whole batches to the processes in turn, so those of one step are adjacent."""
    source = Shaped(640)
    batches = BatchSampler(AspectRatioGroupedSampler(source, seed=0, group_size=2 * 4), batch_size=4, drop_last=True)
    shards = [list(BatchSamplerShard(batches, num_processes=2, process_index=process)) for process in range(2)]
    mixed = [
        len({tuple(source.shapes[index]) for index in one + other}) > 1 for one, other in zip(*shards, strict=True)
    ]
    assert len(mixed) == 80
    assert sum(mixed) <= 2 * 2

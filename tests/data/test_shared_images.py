"""Expressions of one image in a batch share its augmentation and its array."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.cache.feature_data import cached_config, write_encoders, write_expressions
from vg.data import images
from vg.data.dataset import GroundingDataset
from vg.data.samplers import ImageGroupedSampler
from vg.data.shared_images import joined, separated
from vg.data.source import image_groups_of
from vg.data.synthetic.shapes import ShapesConfig
from vg.datasets import evaluation_dataset, training_dataset
from vg.errors import ConfigError, DataError
from vg.training.data import training_sampler
from vg.types import Batch, Caption, Sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_expressions(tmp_path)
    write_encoders(tmp_path)
    return tmp_path


def test_separated_samples_equal_those_that_were_joined() -> None:
    source = ShapesConfig(size=6, expressions_per_scene=3, view="expression").build()
    samples = [source.load(index, 0) for index in range(3)]
    whole = joined(samples)
    assert whole.phrases == tuple(sample.phrases[0] for sample in samples)
    for sample, part in zip(samples, separated(whole, samples), strict=True):
        assert part.image is whole.image
        assert (part.id, part.phrases, part.expression_type) == (sample.id, sample.phrases, sample.expression_type)
        np.testing.assert_array_equal(part.boxes, sample.boxes)
        np.testing.assert_array_equal(part.phrase_ids, sample.phrase_ids)


@pytest.mark.parametrize(
    ("more", "what"),
    [({"crowd": np.zeros(1, bool)}, "crowd regions"), ({"caption": Caption("star", (((0, 4),),))}, "a whole caption")],
)
def test_samples_that_are_more_than_expressions_are_refused(more: dict[str, Any], what: str) -> None:
    sample = ShapesConfig(size=1).build().load(0, 0)
    with pytest.raises(DataError, match=f"has {what}, with which it cannot share its image"):
        joined([sample, replace(sample, **more)])


def batches_of(folder: Path, shared: int, **data: Any) -> tuple[Any, list[Batch]]:
    config = cached_config(folder, None, data={"batch_size": 6, "expressions_per_image": shared} | data)
    torch.manual_seed(0)
    model = config.model.build().eval()
    dataset = training_dataset(config, model, [])
    sampler = training_sampler(config, dataset.source)
    loader = DataLoader(dataset, 6, sampler=sampler, collate_fn=dataset.collate)
    return model, [batch.to("cpu") for batch in loader]


def test_a_batch_encodes_an_image_once(folder: Path) -> None:
    model, batches = batches_of(folder, 3)
    assert [len(batch.images) for batch in batches] == [2, 2, 1]
    assert [len(batch) for batch in batches] == [6, 6, 3]
    assert [batch.max_per_image for batch in batches] == [3, 3, 3]
    _, separate = batches_of(folder, 1)
    single = {target.id: (batch, i) for batch in separate for i, target in enumerate(batch.targets)}
    for batch in batches:
        output = model(batch)
        for row, target in enumerate(batch.targets):
            other, other_row = single[target.id]
            assert torch.equal(other.targets[other_row].boxes, target.boxes)
            torch.testing.assert_close(model(other).boxes[other_row], output.boxes[row], atol=1e-6, rtol=0)


@pytest.mark.parametrize("shared", [1, 3])
def test_an_image_is_decoded_once_for_its_expressions(
    shared: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = [], images.image_to_rgb
    monkeypatch.setattr(images, "image_to_rgb", lambda image, name: decoded.append(name) or decode(image, name))
    _, batches = batches_of(folder, shared)
    assert sum(len(batch) for batch in batches) == 15
    assert len(decoded) == 15 // shared


def test_an_evaluation_encodes_an_image_once_per_batch(folder: Path) -> None:
    config = cached_config(folder, None)
    torch.manual_seed(0)
    model = config.model.build().eval()
    data = evaluation_dataset(config.data.train, config.data, model)
    separate = GroundingDataset(data.source, collate=data.collate)
    images_of = image_groups_of(data.source, 0)
    for indices in (range(6), range(6, 15)):
        shared, single = (
            dataset.collate(dataset.__getitems__(indices)).to("cpu") for dataset in (data, separate) if dataset.collate
        )
        assert len(shared.images) == len({*images_of[list(indices)].tolist()}) < len(single.images) == len(indices)
        assert [target.id for target in shared.targets] == [target.id for target in single.targets]
        torch.testing.assert_close(model(shared).boxes, model(single).boxes, atol=1e-6, rtol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_expressions_of_an_image_are_augmented_together(folder: Path, workers: int) -> None:
    source = cached_config(folder, None).data.train.build()
    settings = cached_config(folder, None, data={"augment": {"flip": 0.5, "crop": 0.5}}).data.augment
    data = GroundingDataset(source, settings.build(), share_images=True)
    sampler = ImageGroupedSampler(source, 0, 3)
    flipped = set()
    for epoch in range(4):
        data.begin_epoch(epoch)
        sampler.begin_epoch(epoch)
        for group in DataLoader(data, 3, sampler=sampler, collate_fn=list, num_workers=workers):
            first, *remaining = group
            assert all(other.image is first.image for other in remaining)
            originals = {sample.id: sample for sample in (source.load(index, epoch) for index in range(len(source)))}
            for sample in group:
                assert sample.phrases[0] in (original(originals, sample), mirrored_words(original(originals, sample)))
                flipped.add(sample.phrases[0] == original(originals, sample))
    assert flipped == {True, False}


def original(originals: dict[str, Sample], sample: Sample) -> str:
    return originals[sample.id].phrases[0]


def mirrored_words(phrase: str) -> str:
    return phrase.replace("left", "*").replace("right", "left").replace("*", "right")


def test_a_bad_sample_of_an_image_is_skipped(folder: Path) -> None:
    (folder / "data" / "train3.png").write_bytes(b"not an image")
    _, batches = batches_of(folder, 3, bad_samples="skip")
    ids = [target.id for batch in batches for target in batch.targets]
    assert len(ids) == 15
    assert len(set(ids)) == 12  # three are replaced by others


def test_grouping_by_image_and_by_aspect_ratio_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"grouped by image \(expressions_per_image\) or by aspect ratio"):
        cached_config(folder, None, data={"expressions_per_image": 2, "group_by_aspect_ratio": True})

"""What every member of the union `vg.data.DatasetConfig` promises, tested on a miniature that it writes itself."""

from __future__ import annotations

import pickle
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import TypeAdapter

from vg.data import DatasetConfig
from vg.data.check import diagnose, to_json, to_text
from vg.data.mixture import Mixture
from vg.data.source import Source, Task, checked
from vg.errors import DataError
from vg.types import Sample

MEMBERS = get_args(get_args(DatasetConfig)[0])


@pytest.fixture(scope="module", params=MEMBERS, ids=lambda member: member.name)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings of a miniature dataset."""
    member = request.param
    if not hasattr(member, "miniature"):
        pytest.fail(
            f"{member.__module__}.{member.__name__} needs a classmethod miniature(folder: Path): write a dataset of a "
            "few small images to the folder and return settings for it (vg.data.synthetic.shapes.write_scenes draws "
            "images with phrases and boxes)"
        )
    settings = member.miniature(tmp_path_factory.mktemp(member.name))
    assert type(settings) is member
    return settings


@pytest.fixture
def source(config: Any) -> Source:
    return config.build()


def load_all(source: Source, epoch: int = 0) -> list[Sample]:
    return [source.load(index, epoch) for index in range(len(source))]


def assert_equal(samples: list[Sample], expected: list[Sample]) -> None:
    assert len(samples) == len(expected)
    for one, other in zip(samples, expected, strict=True):
        np.testing.assert_equal(asdict(one), asdict(other))


def test_settings_are_selected_by_name(config: Any) -> None:
    assert TypeAdapter(DatasetConfig).validate_python(asdict(config)) == config


def test_samples_are_valid(source: Source) -> None:
    samples = load_all(source)
    assert 0 < len(samples) <= 20, "a miniature has a few samples"
    assert sum(len(sample.boxes) for sample in samples) > 0
    for sample in samples:
        np.testing.assert_equal(asdict(checked(sample)), asdict(sample))
        height, width = sample.image.shape[:2]
        assert (sample.boxes >= 0).all()
        assert (sample.boxes <= [width, height, width, height]).all()
        assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()


def test_ids_are_unique_and_the_same_in_every_epoch(source: Source) -> None:
    ids = [sample.id for sample in load_all(source)]
    assert len(set(ids)) == len(ids)
    assert [sample.id for sample in load_all(source, epoch=1)] == ids


@pytest.mark.parametrize("epoch", [0, 3])
def test_samples_depend_on_index_and_epoch_only(config: Any, source: Source, epoch: int) -> None:
    expected = load_all(source, epoch)
    load_all(source, epoch + 1)
    assert_equal(load_all(source, epoch)[::-1], expected[::-1])
    assert_equal(load_all(config.build(), epoch), expected)


def test_provenance_is_filled(source: Source) -> None:
    provenance = source.provenance
    assert provenance.data
    assert provenance.split
    assert provenance.task in get_args(Task)
    assert provenance.official in (None, False), "a miniature is not an official split"
    if provenance.task == "expressions":
        assert all(len(sample.phrases) == 1 and len(sample.boxes) <= 1 for sample in load_all(source))


def test_optional_members_agree_with_the_samples(config: Any, source: Source) -> None:
    samples = load_all(source)
    assert isinstance(source, Source), "its base class has the members that it does not implement"
    if (sizes := source.image_sizes(0)) is not None:
        assert sizes.tolist() == [list(sample.image.shape[:2]) for sample in samples]
    for keys in (source.image_keys(), source.image_groups(0)):
        if keys is None:
            continue
        assert len(keys) == len(samples)
        for key in set(keys):
            images = [sample.image for sample, other in zip(samples, keys, strict=True) if other == key]
            assert all(np.array_equal(image, images[0]) for image in images)
    if type(source).image_files is not Source.image_files:
        assert [file is not None and file.is_file() for file in source.image_files()] == [True] * len(samples)
        assert source.fingerprint(), "vg shard and feature caches cannot notice changed annotations"
    assert source.fingerprint() == config.build().fingerprint()
    if source.category_ids is not None:
        assert {phrase for sample in samples for phrase in sample.phrases} <= source.category_ids.keys()


def test_worker_processes_load_the_same_samples(source: Source) -> None:
    expected = load_all(source)
    assert_equal(load_all(pickle.loads(pickle.dumps(source))), expected)


def test_vg_check_finds_no_error(config: Any) -> None:
    diagnosis = diagnose({"train": config}, max_tokens=256)
    assert to_json(diagnosis)["errors"] == 0, to_text(diagnosis)


def test_a_mixture_of_a_dataset_with_itself(config: Any) -> None:
    source = config.build()
    mixture = Mixture([source, config.build()])
    samples, mixed = load_all(source), load_all(mixture)
    assert len(mixed) == 2 * len(samples)
    for one, other in zip(mixed, samples + samples, strict=True):
        assert one.id.endswith(other.id)
        np.testing.assert_equal(asdict(one) | {"id": ""}, asdict(other) | {"id": ""})


@pytest.mark.parametrize("name", ["coco", "odvg", "voc", "yolo", "csv"])
def test_a_relative_path_is_explained_where_it_does_not_exist(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # not where the run was started, whose settings have the path
    with pytest.raises(DataError, match=rf"pets/set \(relative to {re.escape(str(tmp_path))}, where the command runs"):
        TypeAdapter(DatasetConfig).validate_python({"name": name, "path": "pets/set"}).build()

"""Parts of a dataset without a validation split."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from tests.data.detection.detection_files import write_image
from vg.data import CocoConfig, CsvConfig, OdvgConfig, RefcocoConfig, ShapesConfig, VocConfig, YoloConfig
from vg.data.check import diagnose
from vg.data.images import UNKNOWN_SIZE
from vg.data.mixture import SourceConfig
from vg.data.source import Provenance, Source
from vg.data.subset import Part, SplitConfig
from vg.errors import DataError


class Named(Source):
    """A dataset without a fingerprint, and its settings."""

    provenance = Provenance("named", "all")

    def __init__(self, images: list[str]):
        self.images = images

    def build(self) -> Named:
        return self

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int, epoch: int) -> Any:
        raise NotImplementedError

    def image_keys(self) -> list[str]:
        return self.images


def parts_of(images: list[str]) -> tuple[Part, Part]:
    train, val = (Part(SplitConfig(dataset=Named(images), part=part)) for part in ("train", "val"))  # type: ignore
    return train, val


def parts(dataset: Any, **settings: Any) -> tuple[Part, Part]:
    train, val = (SplitConfig(dataset=dataset, part=part, **settings) for part in ("train", "val"))
    assert TypeAdapter(SourceConfig).validate_python(asdict(train)) == train
    return train.build(), val.build()


@pytest.mark.parametrize("member", [CocoConfig, CsvConfig, VocConfig, YoloConfig])
def test_parts_share_no_image_and_lose_no_sample(tmp_path: Path, member: Any) -> None:
    dataset = member.miniature(tmp_path)
    train, val = parts(dataset, fraction=0.25)
    keys = [set(part.image_keys()) for part in (train, val)]
    assert not keys[0] & keys[1]
    assert all(keys)
    assert keys[0] | keys[1] == set(dataset.build().image_keys())
    assert len(train) + len(val) == len(dataset.build())
    assert val.category_ids == dataset.build().category_ids
    assert val.provenance.split.startswith("about 25 % of ")
    for part in (train, val):  # so that a feature cache notices a replaced image
        assert [str(file) for file in part.image_files()] == part.image_keys()


@pytest.mark.parametrize("member", [CsvConfig, RefcocoConfig, YoloConfig])
def test_unreadable_images_have_a_size_for_grouping(tmp_path: Path, member: Any) -> None:
    """Loading such a sample raises or skips it; see data.bad_samples."""
    dataset = member.miniature(tmp_path)
    intact = dataset.build().image_sizes(0)
    damaged = next(file for file in dataset.build().image_files() if file)
    damaged.write_bytes(b"damaged")
    sizes = dataset.build().image_sizes(0)
    changed = (sizes != intact).any(axis=1)
    assert changed.tolist() == [file == damaged for file in dataset.build().image_files()]
    assert set(map(tuple, sizes[changed].tolist())) == {UNKNOWN_SIZE}


def test_the_seed_selects_the_images(tmp_path: Path) -> None:
    dataset = CocoConfig.miniature(tmp_path)
    drawn = [parts(dataset, seed=seed)[1].image_keys() for seed in range(8)]
    assert parts(dataset, seed=3)[1].image_keys() == drawn[3]
    assert len(set(map(tuple, drawn))) > 1
    assert len(parts(dataset, fraction=0.001)[1]) == len(parts(dataset, fraction=0.999)[0]) == 1


def test_an_image_stays_in_its_part_when_others_are_added_or_removed() -> None:
    """A model that was trained on some of the images would otherwise be evaluated on them."""
    images = [f"{index}.jpg" for index in range(1000)]
    train, val = (set(part.image_keys()) for part in parts_of(images[:800]))
    assert 130 < len(val) < 190
    for changed in (images, images[400:], sorted(images[:800])):
        now = [set(part.image_keys()) for part in parts_of(changed)]
        assert not now[0] & val
        assert not now[1] & train


@pytest.mark.parametrize("member", [CocoConfig, CsvConfig, OdvgConfig, RefcocoConfig, VocConfig, YoloConfig])
def test_an_image_stays_in_its_part_when_the_folder_moves(tmp_path: Path, member: Any) -> None:
    (tmp_path / "first").mkdir()
    dataset = member.miniature(tmp_path / "first")
    drawn = [parts(dataset, seed=seed)[1].image_keys() for seed in range(4)]
    (tmp_path / "first").rename(tmp_path / "second")
    strings = {name: value for name, value in asdict(dataset).items() if isinstance(value, str)}
    moved = replace(dataset, **{name: value.replace("/first", "/second") for name, value in strings.items()})
    again = [parts(moved, seed=seed)[1].image_keys() for seed in range(4)]
    assert again == [[key.replace("/first", "/second") for key in keys] for keys in drawn]


def test_images_outside_of_the_dataset_are_told_by_their_file_names(tmp_path: Path) -> None:
    first, second = ([f"{tmp_path}/{folder}/{index}.jpg" for index in range(20)] for folder in "ab")
    names = [[Path(key).name for key in parts_of(images)[1].image_keys()] for images in (first, second)]
    assert names[0] == names[1]


@pytest.mark.parametrize("annotations", ["", "annotations"])
@pytest.mark.parametrize("linked", [False, True])
def test_equal_names_in_many_folders(annotations: str, linked: bool, tmp_path: Path) -> None:
    """Such as the frames of many videos."""
    images = tmp_path / "elsewhere" if linked else tmp_path / "data" / "images"
    for number in range(40):
        write_image(images / str(number) / "rgb.png", 4, 4)
    (file := tmp_path / "data" / annotations / "all.json").parent.mkdir(parents=True, exist_ok=True)
    if linked:
        (tmp_path / "data" / "images").symlink_to(images)
    rows = [{"id": n, "file_name": f"images/{n}/rgb.png", "height": 4, "width": 4} for n in range(40)]
    file.write_text(json.dumps({"images": rows, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}))
    train, val = parts(CocoConfig(path=str(file)))
    assert len(train) + len(val) == 40
    assert 2 <= len(val) <= 16


def test_datasets_that_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not name its images"):
        parts(ShapesConfig(size=4))
    config = CsvConfig.miniature(tmp_path)
    lines = Path(config.path).read_text().splitlines()
    Path(config.path).write_text("\n".join(lines[:2]))
    with pytest.raises(DataError, match="has 1 image; a training and a validation part need two"):
        parts(config)


def test_a_part_has_a_fingerprint_if_its_dataset_has_one(tmp_path: Path) -> None:
    dataset = CocoConfig.miniature(tmp_path)
    train, val = (pickle.loads(pickle.dumps(part)) for part in parts(dataset))
    assert train.fingerprint() != val.fingerprint()
    assert train.fingerprint() == parts(dataset)[0].fingerprint()
    file = Path(dataset.path)
    file.write_text(file.read_text().replace('"bbox": [36.0, ', '"bbox": [37.0, ', 1))
    assert train.fingerprint() != parts(dataset)[0].fingerprint()
    assert parts_of(["a", "b"])[0].fingerprint() is None, "a feature cache would trust its annotations"


def test_both_parts_are_checked_as_one(tmp_path: Path) -> None:
    configs = {
        "train": SplitConfig(dataset=CocoConfig.miniature(tmp_path), part="train"),
        "eval": SplitConfig(dataset=CocoConfig.miniature(tmp_path), part="val"),
    }
    diagnosis = diagnose(configs, max_tokens=64)
    assert [(dataset.name, len(dataset.annotations.ids)) for dataset in diagnosis.datasets] == [("train", 4)]

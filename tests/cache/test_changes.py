"""A cache notices replaced images and damaged features, and is still found when its data or encoders have moved."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cache.feature_data import cached_config, write_encoders, write_expressions
from vg.cache.build import build_cache
from vg.config import RunConfig
from vg.data.dataset import RunDataset
from vg.data.detection.coco import CocoConfig
from vg.data.detection.odvg import OdvgConfig
from vg.data.detection.voc import VocConfig
from vg.data.expressions import CsvConfig
from vg.datasets import training_dataset
from vg.errors import CacheError
from vg.models.rec.model import RecModel
from vg.training.trainer import Trainer

SETTINGS = [  # that keys of all caches have
    (CsvConfig(path="x"), {"name", "path", "vocabulary"}),
    (CocoConfig(path="x"), {"name", "path", "min_side", "vocabulary"}),
    (OdvgConfig(path="x"), {"name", "path", "captions", "vocabulary"}),
    (VocConfig(path="x"), {"name", "path", "vocabulary"}),
]


@pytest.mark.parametrize(("config", "names"), SETTINGS, ids=lambda value: getattr(value, "name", ""))
def test_new_settings_of_datasets_are_null_by_default(config: Any, names: set[str]) -> None:
    """A cache that was written without a setting is found, because a missing one equals null."""
    assert {name for name, value in asdict(config).items() if value is not None} == names


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in each batch that is encoded; black ones only measure sizes."""
    encode, counts = RecModel.encode_images, []

    def counting(self: RecModel, images: Any) -> Any:
        counts.extend([len(images)] if images.any() else [])
        return encode(self, images)

    monkeypatch.setattr(RecModel, "encode_images", counting)
    return counts


def cached_data(config: RunConfig) -> RunDataset:
    return training_dataset(config, config.model.build(), evaluations=[])


def load_all(config: RunConfig) -> list[Any]:
    data = cached_data(config)
    return [data[index] for index in range(len(data))]


def assert_equals_a_new_cache(config: RunConfig, folder: Path) -> None:
    """Compare all samples with those of a cache that is written from scratch."""
    new = cached_config(folder, {"folder": str(folder / "new")})
    new.data.train, new.data.bad_samples = config.data.train, config.data.bad_samples
    build_cache(new)
    for one, other in zip(load_all(config), load_all(new), strict=True):
        assert (one.id, one.phrase, one.size, one.box.tolist()) == (
            other.id,
            other.phrase,
            other.size,
            other.box.tolist(),
        )
        np.testing.assert_allclose(one.image.astype(float), other.image.astype(float), atol=1e-3)
        np.testing.assert_allclose(one.text.astype(float), other.text.astype(float), atol=1e-3)


def times(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def cache_of(folder: Path, split: str = "train") -> Path:
    (found,) = (folder / "cache").glob(f"*_{split}-*")
    return found


def replace_image(folder: Path, name: str = "train3.png", size: tuple[int, int] = (100, 90)) -> None:
    Image.fromarray(np.random.default_rng(7).integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / "data" / name)


def test_a_replaced_image_is_noticed_and_only_its_shard_is_encoded_again(folder: Path, encoded: list[int]) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    load_all(config)
    replace_image(folder)
    with pytest.raises(CacheError, match=r"1 of 5 images .*train3\.png.*`vg cache CONFIG`.*data\.cache\.trust=true"):
        Trainer(config)
    trusting = cached_config(folder, {"trust": True})
    assert len(load_all(trusting)) == 15

    encoded.clear()
    before = times(folder / "cache")
    build_cache(config)
    assert sum(encoded) == 2  # images 2 and 3 share a shard
    written = {file.name for file, time in times(folder / "cache").items() if before.get(file) != time}
    assert written == {"00001.npy", "00001.json", "index.npz"}
    assert {sample.size for sample in load_all(config)} >= {(100, 90)}
    assert_equals_a_new_cache(config, folder)


def test_an_image_of_the_same_size_in_bytes_is_compared_by_content(folder: Path, encoded: list[int]) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    file = folder / "data" / "train1.png"
    content = file.read_bytes()
    os.utime(file, ns=(1, 1))  # touched
    load_all(config)
    file.write_bytes(content[:-30] + bytes(30))
    with pytest.raises(CacheError, match=r"1 of 5 images .*train1\.png"):
        load_all(config)
    file.write_bytes(content)
    load_all(config)
    encoded.clear()
    build_cache(config)  # stores the new time
    assert not encoded
    file_times = [json.loads(file.read_text().partition("\n")[0]) for file in cache_of(folder).glob("images/*.json")]
    assert file.stat().st_mtime_ns in {record["file"][1] for records in file_times for record in records}


def test_a_cache_is_used_without_its_images(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    for file in (folder / "data").glob("*.png"):
        file.unlink()
    with caplog.at_level(logging.INFO):
        Trainer(config).fit()
    assert "5 of 5 images of data (train) do not exist any more" in caplog.text
    build_cache(config)


def move_data(folder: Path) -> dict[str, Any]:
    (folder / "data").rename(folder / "elsewhere")
    return {"data": {name: {"path": str(folder / "elsewhere"), "split": split} for name, split in SPLITS.items()}}


def move_images(folder: Path) -> dict[str, Any]:
    (folder / "images").mkdir()
    for file in (folder / "data").glob("*.png"):
        shutil.move(file, folder / "images")
    sources = {"path": str(folder / "data"), "image_root": str(folder / "images")}
    return {"data": {name: sources | {"split": split} for name, split in SPLITS.items()}}


def copy_images(folder: Path) -> dict[str, Any]:
    """Without their times of modification."""
    sections = move_images(folder)
    for file in (folder / "images").iterdir():
        os.utime(file)
    return sections


def move_encoders(folder: Path) -> dict[str, Any]:
    (folder / "encoders").mkdir()
    for name in ("vision", "text"):
        (folder / name).rename(folder / "encoders" / name)
    vocabulary = cached_config(folder / "encoders", None).model.text.tokenizer  # type: ignore[union-attr]
    shutil.copy(vocabulary, folder / "encoders")
    text = {"id": str(folder / "encoders/text"), "tokenizer": str(folder / "encoders" / Path(vocabulary).name)}
    return {"model": {"vision": {"id": str(folder / "encoders/vision")}, "text": text}}


def move_cache(folder: Path) -> dict[str, Any]:
    (folder / "cache").rename(folder / "features")
    return {"data": {"cache": {"folder": str(folder / "features")}}}


SPLITS = {"train": "train", "eval": "val"}
Move = Callable[[Path], dict[str, Any]]  # moves a folder and returns sections of the new configuration
MOVES: list[Move] = [move_data, move_images, copy_images, move_encoders, move_cache]


def moved_config(folder: Path, sections: dict[str, Any]) -> RunConfig:
    for name in SPLITS:
        if name in sections.get("data", {}):
            sections["data"][name]["name"] = "refcoco"
    return cached_config(folder, {}, **sections)


@pytest.mark.parametrize("move", MOVES)
def test_a_moved_folder_keeps_its_cache(
    folder: Path, encoded: list[int], move: Callable[[Path], dict[str, Any]]
) -> None:
    build_cache(cached_config(folder, {}))
    encoded.clear()
    config = moved_config(folder, move(folder))
    Trainer(config).fit()
    build_cache(config)
    assert not encoded
    live = config.data.train.build()
    assert [sample.id for sample in load_all(config)] == [live.load(index, 0).id for index in range(15)]
    assert len(list(Path(config.data.cache.folder).iterdir())) == 2  # type: ignore[union-attr]


def test_a_moved_folder_with_other_content_needs_a_new_cache(folder: Path, encoded: list[int]) -> None:
    first = cached_config(folder, {})
    build_cache(first)
    before = times(folder / "cache")
    shutil.copytree(folder / "data", folder / "copies" / "data")
    copies = moved_config(
        folder, {"data": {name: {"path": f"{folder}/copies/data", "split": split} for name, split in SPLITS.items()}}
    )
    load_all(copies)
    file = folder / "copies" / "data" / "train.jsonl"
    file.write_text(file.read_text().replace("left circle", "left disc", 1))
    with pytest.raises(CacheError, match="the annotations changed since the cache was written"):
        load_all(copies)
    shutil.copy(folder / "data" / "train.jsonl", file)
    for image in (folder / "copies" / "data").glob("*.png"):
        Image.open(image).convert("L").save(image)  # a second version of all images
    with pytest.raises(CacheError, match=r"5 of its 5 images differ"):
        load_all(copies)
    encoded.clear()
    build_cache(copies)
    assert sum(encoded) == 7
    assert before.items() <= times(folder / "cache").items()  # the features of the first version are kept
    load_all(first)
    load_all(copies)
    (folder / "copies").rename(folder / "moved")
    for source in (copies.data.train, copies.data.eval):
        source.path = f"{folder}/moved/data"  # type: ignore[union-attr]
    load_all(copies)


def test_the_name_of_a_cache_does_not_depend_on_places(tmp_path: Path) -> None:
    names = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        write_expressions(tmp_path / place)
        write_encoders(tmp_path / place)
        build_cache(cached_config(tmp_path / place, {}))
        names.append(sorted(path.name for path in (tmp_path / place / "cache").iterdir()))
    assert names[0] == names[1]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"circle") if b"circle" in content else len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replace_index(path: Path) -> None:
    np.savez(path, images=np.zeros(15), ends=np.zeros(15))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("images/00001.npy", flip_bit),
        ("texts/00001.npy", flip_bit),
        ("images/00001.npy", cut),
        ("texts/00001.npy", cut),
        ("images/00001.npy", Path.unlink),
        ("texts/00001.npy", Path.unlink),
        ("index.npz", cut),
        ("index.npz", flip_bit),
        ("index.npz", replace_index),
    ],
)
def test_a_damaged_file_is_named_and_written_again(folder: Path, encoded: list[int], name: str, damage: Any) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    load_all(config)
    before = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in times(folder / "cache")}
    modified = times(folder / "cache")
    damage(cache_of(folder) / name)
    with pytest.raises(CacheError, match=f"{name}.*`vg cache CONFIG`"):
        load_all(config)
    encoded.clear()
    build_cache(config)
    assert sum(encoded) == (2 if name.startswith("images") else 0)
    load_all(config)
    for file, time in times(folder / "cache").items():
        written = file.with_suffix("") == (cache_of(folder) / name).with_suffix("") or file.name == "index.npz"
        assert written or modified[file] == time, file
        assert before[file] == hashlib.sha256(file.read_bytes()).hexdigest() or file.suffix == ".npz"
    build_cache(config)
    assert sum(encoded) == (2 if name.startswith("images") else 0)


def test_a_damaged_index_is_written_again_after_data_have_moved(folder: Path, encoded: list[int]) -> None:
    """The index has the images by which a cache is found, but the key is enough if there is only one."""
    build_cache(cached_config(folder, {}))
    (folder / "data").rename(folder / "moved")
    config = moved_config(
        folder, {"data": {name: {"path": f"{folder}/moved", "split": split} for name, split in SPLITS.items()}}
    )
    cut(cache_of(folder) / "index.npz")
    with pytest.raises(CacheError, match=r"index\.npz.*`vg cache CONFIG`"):
        load_all(config)
    encoded.clear()
    build_cache(config)
    assert sum(encoded) == 0
    load_all(config)


def test_a_damaged_record_is_written_again(folder: Path, encoded: list[int]) -> None:
    config = cached_config(folder, {})
    build_cache(config)
    flip_bit(cache_of(folder) / "images" / "00002.json")
    encoded.clear()
    build_cache(config)
    assert sum(encoded) == 1
    assert_equals_a_new_cache(config, folder)


def test_a_fixed_image_brings_back_its_expressions(folder: Path) -> None:
    file = folder / "data" / "train0.png"
    content = file.read_bytes()
    file.write_bytes(b"not an image")
    config = cached_config(folder, {}, data={"bad_samples": "skip"})
    build_cache(config)
    assert len({sample.id for sample in load_all(config)}) == 12
    file.write_bytes(content)
    with pytest.raises(CacheError, match=r"1 of 5 images .*train0\.png"):
        load_all(config)
    build_cache(config)
    assert len({sample.id for sample in load_all(config)}) == 15
    assert_equals_a_new_cache(config, folder)

"""A feature cache of any dataset notices changed annotations, and is still found where nothing changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cache.feature_data import NUM_IMAGES, cached_config, write_encoders, write_expressions
from vg.cache.build import build_cache
from vg.config import RunConfig
from vg.data.shards.source import ShardsConfig
from vg.data.shards.write import write_shards
from vg.datasets import training_dataset
from vg.errors import CacheError
from vg.training.digests import Digests


@pytest.fixture(params=["odvg", "coco", "split"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> RunConfig:
    """A run on one phrase and box per image, with the annotations in data/train.json."""
    write_expressions(tmp_path)
    write_encoders(tmp_path)
    write_annotations(tmp_path, request.param)
    dataset: dict[str, Any] = {"name": request.param, "path": str(tmp_path / "data" / "train.json")}
    if request.param == "split":
        dataset = {"name": "split", "dataset": dataset | {"name": "odvg"}, "part": "train"}
    return cached_config(tmp_path, {}, data={"train": dataset, "eval": dataset})


def write_annotations(folder: Path, name: str, box: tuple[int, int, int, int] = (10, 12, 20, 30)) -> None:
    files = [f"train{image}.png" for image in range(NUM_IMAGES["train"])]
    sizes = [{"height": 60 + 8 * image, "width": 80} for image in range(len(files))]
    content: Any = {
        "images": [
            {"id": i, "file_name": file} | size for i, (file, size) in enumerate(zip(files, sizes, strict=True))
        ],
        "categories": [{"id": 1, "name": "circle"}],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": box} for i in range(len(files))],
    }
    if name != "coco":
        region = {"caption": "", "regions": [{"phrase": "circle", "bbox": box}]}
        lines = [{"filename": file, "grounding": region} | size for file, size in zip(files, sizes, strict=True)]
        (folder / "data" / "train.json").write_text("\n".join(map(json.dumps, lines)))
        return
    (folder / "data" / "train.json").write_text(json.dumps(content))


def load(config: RunConfig) -> Any:
    return training_dataset(config, config.model.build(), evaluations=[])[0]


def test_changed_annotations_need_a_new_cache(config: RunConfig, tmp_path: Path) -> None:
    build_cache(config)
    before = load(config).box.tolist()
    settings = config.data.train
    write_annotations(tmp_path, settings.name, (11, 12, 21, 31))
    with pytest.raises(CacheError, match="the annotations changed since the cache was written"):
        load(config)
    build_cache(config)
    assert load(config).box.tolist() != before


def test_a_resumed_run_warns_of_changed_annotations(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def digests() -> Digests:
        build_cache(config)
        return Digests(config.data, [training_dataset(config, config.model.build(), []).source, None])

    before = digests().state()
    digests().warn_of_changes(before, 7)
    assert not caplog.text
    write_annotations(tmp_path, config.data.train.name, (11, 12, 21, 31))
    digests().warn_of_changes(before, 7)
    assert "data.train changed since step 7: " in caplog.text


@pytest.mark.parametrize("config", ["split"], indirect=True)
def test_a_part_of_a_moved_dataset_keeps_its_cache(config: RunConfig, tmp_path: Path) -> None:
    build_cache(config)
    (tmp_path / "data").rename(tmp_path / "moved")
    for settings in (config.data.train, config.data.eval):
        settings.dataset.path = str(tmp_path / "moved" / "train.json")  # type: ignore[union-attr]
    load(config)


@pytest.mark.parametrize("config", ["odvg"], indirect=True)
def test_the_cache_of_downloads_is_no_part_of_the_key(config: RunConfig, tmp_path: Path) -> None:
    write_shards(config.data.train, tmp_path / "shards")
    config.data.train = ShardsConfig(path=str(tmp_path / "shards"))
    build_cache(config)
    config.data.train = ShardsConfig(path=str(tmp_path / "shards"), cache=str(tmp_path / "downloads"), cache_gb=5)
    load(config)


@pytest.mark.parametrize("config", ["odvg"], indirect=True)
@pytest.mark.parametrize("content", ["[1]", '{"id": "public"}', "{", '{"split": "train", "settings": {}}'])
def test_other_files_of_the_name_of_a_key_are_ignored(config: RunConfig, content: str, tmp_path: Path) -> None:
    for name in ("before", "zoo"):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "key.json").write_text(content)
    with pytest.raises(CacheError, match="contains no features of"):
        load(config)
    build_cache(config)
    load(config)

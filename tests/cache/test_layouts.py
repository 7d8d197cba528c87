"""Cached features of several layers, mixed channels and images that keep their aspect ratio equal those on the fly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.cache.feature_data import VISION, cached_config
from tests.cache.test_resident import assert_resident_equals_loader
from tests.conftest import HEAD, history
from vg.cache.build import build_cache
from vg.config import RunConfig
from vg.data.collate import Collator
from vg.data.dataset import GroundingDataset
from vg.datasets import training_dataset
from vg.errors import CacheError
from vg.training.trainer import Trainer
from vg.types import EncodedBatch

SETTINGS: dict[str, dict[str, Any]] = {
    "layers": {"layers": [1, 2]},
    "mixed": {"layers": [1, 2], "mixed_width": 24},
    "kept aspect": {"keep_aspect": True},
    "all, dense": {"layers": [1, 2], "mixed_width": 24, "keep_aspect": True, "head": HEAD | {"dropout": 0.0}},
}
all_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
HALF = {"rtol": 2**-10, "atol": 1e-4}


def configured(folder: Path, settings: dict[str, Any], cache: dict[str, Any] | None, **sections: Any) -> RunConfig:
    """Return a run at 64 px with an encoder of two layers, whose images have several grids if their aspect is kept."""
    if not (folder / "deep").exists():
        torch.manual_seed(0)
        network = AutoModel.from_config(AutoConfig.for_model(**VISION | {"num_hidden_layers": 2}))
        network.save_pretrained(folder / "deep")
    vision = {"id": str(folder / "deep")} | {k: v for k, v in settings.items() if k in ("layers", "mixed_width")}
    model = {k: v for k, v in settings.items() if k in ("keep_aspect", "head")}
    return cached_config(folder, cache, model={"image_size": 64, "vision": vision} | model, **sections)


@all_settings
@pytest.mark.parametrize("views", [["plain"], ["plain", "flip", "crop"]])
def test_cached_features_equal_live_ones_to_half_precision(
    folder: Path, settings: dict[str, Any], views: list[str]
) -> None:
    config = configured(folder, settings, {"views": views})
    build_cache(config)
    model = config.model.build().eval()
    pixels, cached = GroundingDataset(config.data.train.build()), training_dataset(config, model, [])
    chosen = [next((n, e) for e in range(40) if cached.source.locate(n, e)[1] == 0) for n in range(15)]  # type: ignore[union-attr]
    stored = cached.collate([cached.source.load(index, epoch) for index, epoch in chosen])  # type: ignore[arg-type]
    assert isinstance(stored, EncodedBatch)
    live = Collator(model.image_spec, model.text_spec)([pixels[index] for index in range(15)])
    with torch.no_grad():
        features = model.encode(live)
        image_ids = stored.features.image_ids.tolist()  # the cache knows which samples share an image
        assert features.grid == stored.features.grid
        assert (features.grids is None) == (stored.features.grids is None) == ("keep_aspect" not in settings)
        if features.grids and stored.features.grids:
            assert features.grids == tuple(stored.features.grids[index] for index in image_ids)
        image = stored.features.image.float()
        torch.testing.assert_close(image[image_ids], features.image, **HALF)
        for one, other in zip(model(live), model(stored), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)


@all_settings
def test_training_from_the_cache_equals_that_on_images(folder: Path, settings: dict[str, Any]) -> None:
    losses = []
    for cache in (None, {"resident": False}, {"resident": True}):
        train = {"epochs": 2, "output": str(folder / f"run{len(losses)}"), "log_every": 1, "trackers": []}
        config = configured(folder, settings, cache, train=train, data={"workers": 0, "batch_size": 4})
        if cache:
            build_cache(config)
        Trainer(config).fit()
        losses.append([row["loss"] for row in history(config) if "loss" in row])
    assert losses[1] == losses[2]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-2)


@all_settings
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_batches_in_memory_equal_those_of_the_loader(folder: Path, settings: dict[str, Any], precision: str) -> None:
    cache = {"views": ["plain", "crop"], "precision": precision}
    config = configured(folder, settings, cache, data={"expressions_per_image": 3})
    build_cache(config)
    assert_resident_equals_loader(config)


@all_settings
def test_the_announced_size_is_that_of_the_files(
    folder: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(folder, settings, {"views": ["plain", "crop"]})
    build_cache(config)
    (cache,) = (folder / "cache").glob("*train*")
    size = sum(np.load(file).nbytes for file in (cache / "images").glob("*.npy"))
    width = 24 if "mixed_width" in settings else 32 * len(settings.get("layers", [2]))
    assert size == 5 * 2 * (5 + 4 * 4) * width * 2  # images, views, tokens of a square of 64 px, bytes
    announced = re.search(r"5 images \(plain, crop\), .*to write: images ([\d.]+) MB", capsys.readouterr().out)
    assert announced
    assert announced[1] == f"{size / 1e6:.2f}"


def test_every_setting_is_in_the_key(folder: Path) -> None:
    plain = configured(folder, {}, {})
    build_cache(plain)
    for settings, difference in (
        ({"layers": [1, 2]}, r"vision\.layers is \[1, 2\], the cache has None"),
        ({"mixed_width": 24}, r"vision\.mix is {'seed': 0, 'shape': \[24, 32\]}, the cache has None"),
        ({"keep_aspect": True}, r"transform\.name is KeptAspectImage, the cache has StretchedImage"),
    ):
        config = configured(folder, settings, {})
        with pytest.raises(CacheError, match=difference):
            training_dataset(config, config.model.build(), [])


def test_an_interrupted_build_with_several_grids_continues(folder: Path) -> None:
    config = configured(folder, SETTINGS["kept aspect"], {})
    build_cache(config)
    (cache,) = (folder / "cache").glob("*train*")
    before = {file: file.read_bytes() for file in sorted(cache.rglob("*.np?"))}
    for name in ("index.npz", "images/00001.json", "images/00001.npy"):
        (cache / name).unlink()
    build_cache(config)
    assert {file: file.read_bytes() for file in sorted(cache.rglob("*.np?"))} == before

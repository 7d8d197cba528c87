"""How `vg cache` encodes: precision, data workers, and images that are normalized after loading."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.cache.feature_data import cached_config, write_encoders, write_expressions
from vg.cache.build import Build, build_cache
from vg.cache.views import ImageViews
from vg.data.collate import Collator
from vg.datasets import training_dataset
from vg.errors import CacheError
from vg.training.trainer import Trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_expressions(tmp_path)
    write_encoders(tmp_path)
    return tmp_path


def test_bf16_is_a_cache_of_its_own(folder: Path) -> None:
    exact, rounded = cached_config(folder, {}), cached_config(folder, {"precision": "bf16"})
    build_cache(exact)
    with pytest.raises(CacheError, match="precision is bf16, the cache has no"):
        training_dataset(rounded, rounded.model.build(), [])
    build_cache(rounded)
    assert len(list((folder / "cache").iterdir())) == 2 * 2
    one, other = (training_dataset(config, config.model.build(), []) for config in (exact, rounded))
    for index in range(len(one)):
        for name in ("image", "text"):
            wanted, found = (getattr(data[index], name).astype(np.float32) for data in (one, other))
            assert found.shape == wanted.shape
            difference = np.abs(found - wanted).max()
            assert 0 < difference < 2**-4 * np.abs(wanted).max()  # bfloat16 has 8 bits
    Trainer(rounded).fit()


@pytest.mark.parametrize(
    ("device", "workers", "cores", "processes", "used"),
    [("cpu", 2, 8, 1, 2), ("cuda", 0, 8, 1, 0), ("cuda", 2, 8, 1, 8), ("cuda", 2, 64, 2, 16), ("cuda", 3, 8, 4, 3)],
)
def test_workers_feed_a_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, workers: int, cores: int, processes: int, used: int
) -> None:
    config = cached_config(folder, {}, data={"workers": workers})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    build = object.__new__(Build)
    build.data, build.accelerator = config.data, SimpleNamespace(device=torch.device(device), num_processes=1)  # type: ignore[assignment]
    assert build._num_workers() == used


def test_images_are_normalized_after_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data workers send uint8, and the encoders get what the collator would have made."""
    config = cached_config(folder, {"views": ["plain", "flip"]}, data={"workers": 1})
    model, source = config.model.build(), config.data.train.build()
    collate = Collator(model.image_spec, model.text_spec)
    views = ImageViews(source, ["plain", "flip"], collate, skip=False)
    batch = views.batch([views[0], views[1]])
    assert batch.images.dtype == torch.uint8
    images = [source.load(int(views.samples[image][0]), 0) for image in range(2)]
    assert batch.normalized()[::2].equal(collate.images(images)[0])
    assert batch.pack().normalized().equal(batch.normalized())

"""Workers that are killed at random moments: the completed labels equal those of an undisturbed run, byte by byte.

scripts/benchmarks/label.py does the same with more images, kills and workers.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from scripts.benchmarks.label import (
    CLOCKS,
    PHRASES,
    Killed,
    contents,
    overhead,
    run_quietly,
    write_model,
    write_scenes,
)
from tests.labeling.conftest import write_noise
from tests.labeling.test_label import CLASSES, LOW
from vg.data.detection.odvg import OdvgConfig

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")

NUM_SHARDS = 20


@pytest.fixture(scope="module")
def words(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Model, data and options."""
    photos = write_noise(tmp_path_factory.mktemp("photos"), 3 * NUM_SHARDS)
    settings = ("--shard-size", "3", "--batch-size", "2", "--device", "cpu", "--format", "coco")
    return [str(detector), str(photos), *CLASSES, *LOW, *settings]


@pytest.fixture(scope="module")
def quiet(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("quiet") / "labels"
    run_quietly(words, out)
    found = contents(out)
    assert len(found) == NUM_SHARDS + 3
    return found


def test_killed_workers(words: list[str], quiet: dict[str, bytes], tmp_path: Path) -> None:
    """One of three workers of an array, then one of two of torchrun; one worker completes the labels."""
    out = tmp_path / "labels"
    for engine, workers in (("array", 3), ("torchrun", 2)):
        killed = Killed(engine, workers, words, out, seed=workers)
        killed.kill_after(num_shards=2)
        assert killed.wait() != 0
        assert len(list(out.glob("*.jsonl"))) < NUM_SHARDS
    run_quietly(words, out)
    assert contents(out) == quiet


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_killed_worker_of_ray_is_restarted(words: list[str], quiet: dict[str, bytes], tmp_path: Path) -> None:
    killed = Killed("ray", 2, words, tmp_path / "labels", seed=0)
    killed.kill_after(num_shards=3)
    assert killed.wait() == 0
    assert contents(tmp_path / "labels") == quiet


def test_benchmark(tmp_path: Path) -> None:
    """Scenes with their true boxes are a dataset, and labeling costs more than forward passes."""
    images = write_scenes(tmp_path, "train", 20, 64)
    settings = {"path": str(tmp_path / "train.jsonl"), "image_root": str(images)}
    source = OdvgConfig(**settings, label_map=str(tmp_path / "label_map.json")).build()
    sample = source.load(3, 0)
    assert sample.phrases == PHRASES
    assert len(sample.boxes) >= 3
    write_model(tmp_path / "model")
    ratios = overhead(tmp_path / "model", images, tmp_path, count=16, rounds=1)
    assert ratios.keys() == CLOCKS.keys()
    assert all(ratio > 0.5 for ratio in ratios.values())

"""A small model with random weights and images of noise, for tests of `vg label`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.models.grounding_dino.tiny import tiny_model
from vg.checkpoint import write_model
from vg.config import ModelOnlyConfig

NUM_IMAGES = 20


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    model = tiny_model()
    write_model(folder, model, ModelOnlyConfig(model.config))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of several sizes, in a folder and a subfolder."""
    return write_noise(tmp_path / "photos", NUM_IMAGES)


def write_noise(folder: Path, count: int) -> Path:
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("more" if number % 3 else "") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (8, 8, 3), np.uint8)
        size = (640 + 64 * (number % 3), 640 + 64 * (number % 5))  # the boxes of the model are small
        Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
    return folder

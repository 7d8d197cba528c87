"""A Grounding DINO small enough for tests, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from vg.data.collate import Collator
from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.models.grounding_dino.model import GroundingDino
from vg.types import Batch, Sample


def tiny_config(**settings: object) -> GroundingDinoConfig:
    return replace(GroundingDinoConfig.tiny(), **settings)  # type: ignore[arg-type]


def tiny_model(seed: int = 0, **settings: object) -> GroundingDino:
    """Build a model whose weights are all random, also those initialized to zero, so that every path has an effect."""
    torch.manual_seed(seed)
    model = tiny_config(**settings).build(pretrained=False)
    for name, weights in model.named_parameters():
        if "norm" in name.lower() and name.endswith("weight"):
            nn.init.uniform_(weights, 0.5, 1.0)
        elif weights.dim() == 1 or not weights.any():
            nn.init.uniform_(weights, -0.3, 0.3)
    return model.eval()


def sample(phrases: Sequence[str], size: tuple[int, int] = (64, 96), seed: int = 0, boxes: int = 0) -> Sample:
    """Draw a noise image of (height, width) with random boxes and phrase ids."""
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 0.5, (boxes, 2))
    scaled = np.concatenate((corners, corners + random.uniform(0.2, 0.5, (boxes, 2))), axis=1)
    pixels = scaled * np.array([size[1], size[0]] * 2)
    image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    phrase_ids = random.integers(0, len(phrases), boxes)
    return Sample(f"{seed}", image, tuple(phrases), pixels.astype(np.float32).reshape(-1, 4), phrase_ids)


def batch_of(model: GroundingDino, *samples: Sample) -> Batch:
    return Collator(model.image_spec, model.text_spec)(samples)

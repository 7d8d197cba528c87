"""A Grounding DINO small enough for tests, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from tests.conftest import TEXT
from vg.data.collate import Collator
from vg.models.grounding_dino.config import BertConfig, GroundingDinoConfig, ImageConfig, SwinConfig
from vg.models.grounding_dino.model import GroundingDino
from vg.types import Batch, Sample

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tiny_config(**settings: object) -> GroundingDinoConfig:
    values: dict[str, object] = {
        "backbone": SwinConfig(width=16, depths=[1, 1, 1, 1], heads=[1, 2, 4, 8], window=3, drop_path=0.0),
        "text": BertConfig(architecture=TEXT | NO_DROPOUT),
        "image": ImageConfig(shortest=64, longest=120),
        "width": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "heads": 4,
        "points": 2,
        "feedforward": 64,
        "num_queries": 20,
        "fusion_drop_path": 0.0,
    }
    return GroundingDinoConfig(**values | settings)  # type: ignore[arg-type]


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

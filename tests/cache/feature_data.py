"""A small RefCOCO with images, and frozen encoders in local folders, for the tests of the feature cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel

from tests.conftest import TEXT
from vg.config import RunConfig, parse_config
from vg.models.encoders import SMALL_VOCABULARY

VISION = {
    "model_type": "dinov3_vit",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 16,
    "num_register_tokens": 4,
}
SENTENCES = ("left circle", "the red star", "big square on the right")
NUM_IMAGES = {"train": 5, "val": 2}


def write_expressions(folder: Path) -> None:
    """Write random images of different sizes, each with three expressions and boxes, as JSON lines."""
    folder = folder / "data"
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, num_images in NUM_IMAGES.items():
        rows = []
        for image in range(num_images):
            name, size = f"{split}{image}.png", (60 + 8 * image, 80)
            pixels = random.integers(0, 255, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC).save(folder / name)
            rows += [
                {
                    "sent": sentence if image else f"{sentence} again",
                    "ann_id": 10 * image + n,
                    "bbox": [10 + 5 * n, 12, 20, 30],
                    "image_path": name,
                }
                for n, sentence in enumerate(SENTENCES)
            ]
        rows = rows[::2] + rows[1::2]  # samples of one image are not adjacent
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_encoders(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    AutoModel.from_config(AutoConfig.for_model(**VISION)).save_pretrained(folder / "vision")
    AutoModel.from_config(AutoConfig.for_model(**TEXT)).save_pretrained(folder / "text")


def cached_config(folder: Path, cache: dict[str, Any] | None, **sections: dict[str, Any]) -> RunConfig:
    """Return a run on these data and encoders.

    Args:
        cache: differences from the defaults of data.cache; None for a run without a cache.
    """
    source = {"name": "refcoco", "path": str(folder / "data")}
    values: dict[str, dict[str, Any]] = {
        "model": {
            "name": "rec",
            "image_size": 32,
            "vision": {"id": str(folder / "vision")},
            "text": {"id": str(folder / "text"), "tokenizer": str(SMALL_VOCABULARY)},
            "head": {"name": "pooled", "width": 32, "layers": 1, "heads": 2, "feedforward": 64, "dropout": 0.0},
        },
        "data": {
            "train": source | {"split": "train"},
            "eval": source | {"split": "val"},
            "batch_size": 4,
            "workers": 0,
            "cache": None if cache is None else {"folder": str(folder / "cache")} | cache,
        },
        "optim": {"lr": 1e-3},
        "train": {"epochs": 2, "output": str(folder / "run"), "log_every": 1, "trackers": []},
    }
    return parse_config({name: values[name] | sections.get(name, {}) for name in values})

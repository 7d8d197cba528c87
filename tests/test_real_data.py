"""Real images and expressions: the model overfits the RefCOCO samples in shared/data beside the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vg.config import RunConfig
from vg.training.trainer import Trainer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REFS = DATA / "refcoco_with_images" / "refs.json"
TOKENIZER = DATA / "weights" / "bert-base-uncased-tokenizer.json"


@pytest.mark.skipif(not (REFS.exists() and TOKENIZER.exists()), reason="no shared/data beside the repository")
def test_overfit_22_real_expressions(tiny_config: Callable[..., RunConfig]) -> None:
    source = {"name": "refcoco", "path": str(REFS), "split": "val", "image_root": str(REFS.parent / "images")}
    config = tiny_config(
        model={
            "image_size": 96,
            "vision": {
                "frozen": False,
                "architecture": {
                    "model_type": "dinov3_convnext",
                    "hidden_sizes": [32, 64],
                    "depths": [1, 1],
                    "layer_scale_init_value": 1.0,
                },
            },
            "text": {
                "frozen": False,
                "tokenizer": str(TOKENIZER),
                "architecture": {
                    "model_type": "bert",
                    "hidden_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "intermediate_size": 64,
                },
            },
            "head": {"name": "dense", "width": 64, "layers": 2, "heads": 4, "feedforward": 128, "dropout": 0.0},
        },
        data={"train": source, "eval": source, "batch_size": 22, "eval_batch_size": 22},
        optim={"lr": 3e-3, "warmup_steps": 10},
        train={"epochs": 120, "eval_every": 120},
    )
    results = Trainer(config).fit()
    assert results["num_expressions"] == 22
    assert results["miou"] >= 0.9

"""Shared by all tests: one thread, no network access, and a configuration that trains in a second."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vg.config import RunConfig, parse_config
from vg.training.history import History

if TYPE_CHECKING:
    from vg.training.trainer import Trainer

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: more threads than cores are slow
torch.set_num_threads(1)

VISION = {"model_type": "dinov3_convnext", "hidden_sizes": [16, 32], "depths": [1, 1], "layer_scale_init_value": 1.0}
TEXT = {
    "model_type": "bert",
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
HEAD = {"name": "dense", "width": 32, "layers": 1, "heads": 2, "feedforward": 64}
NO_DROPOUT = {
    "text": {"frozen": False, "architecture": TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}},
    "head": HEAD | {"dropout": 0.0},
}


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """A function that returns a configuration whose run takes a second.

    Its arguments override values of sections: ``tiny_config(train={"ema": 0.9}, data={"workers": 2})``.
    """

    def make(**sections: dict[str, Any]) -> RunConfig:
        values: dict[str, dict[str, Any]] = {
            "model": {
                "name": "rec",
                "image_size": 32,
                "vision": {"frozen": False, "architecture": VISION},
                "text": {"frozen": False, "architecture": TEXT},
                "head": HEAD,
            },
            "data": {
                "train": {"name": "shapes", "split": "train", "image_size": 64, "size": 20},
                "eval": {"name": "shapes", "split": "val", "image_size": 64, "size": 5},
                "batch_size": 4,
                "eval_batch_size": 5,
                "workers": 0,
            },
            "optim": {"lr": 1e-3},
            "train": {"epochs": 2, "output": str(tmp_path / "run"), "log_every": 2, "trackers": []},
        }
        assert sections.keys() <= values.keys(), sections.keys()
        return parse_config({name: values[name] | sections.get(name, {}) for name in values})

    return make


def history(config: RunConfig) -> list[dict[str, Any]]:
    """The rows of a run's history."""
    return History(Path(config.train.output) / "history.jsonl").rows()


def scripted(trainer: Trainer, scores: list[float]) -> Trainer:
    """Make the evaluations of a trainer return these scores, one after the other."""
    values = iter(scores)
    trainer.evaluator.run = lambda model: {"miou": next(values), "data": "script"}  # type: ignore[method-assign]
    return trainer

"""Training runs of a tiny Grounding DINO: exact resume, bfloat16, adapters, and memorizing four images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TEXT, history
from tests.models.grounding_dino.tiny import tiny_config as tiny_grounding_dino
from tests.training.test_data import write_coco
from tests.training.test_resume import assert_same_runs, interrupt, stop_in_step
from vg.checkpoint import read_model
from vg.config import RunConfig, load_config
from vg.data.detection.odvg import OdvgConfig
from vg.errors import CheckpointError
from vg.models.grounding_dino.config import BertConfig, ClassHeadConfig, DenoisingConfig
from vg.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

RECIPE = Path(__file__).parents[3] / "configs" / "grounding_dino" / "finetune_lora.yaml"
SCENES = {"name": "shapes", "split": "val", "view": "detection", "image_size": 64}
RANDOM: dict[str, Any] = {  # every source of randomness
    "text": BertConfig(architecture=TEXT),  # with dropout
    "dropout": 0.1,
    "fusion_dropout": 0.1,
    "fusion_drop_path": 0.1,
    "denoising": DenoisingConfig(num_queries=6, num_labels=8),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_within_an_epoch_equals_uninterrupted_run(tiny_config: MakeConfig, tmp_path: Path, workers: int) -> None:
    """Four steps of two batches per epoch, one image is left out; negatives, denoising and dropout are random."""
    train = write_coco(tmp_path / "set", "train", range(1, 18))
    evaluated = write_coco(tmp_path / "set", "val", range(18, 20))

    def make(name: str) -> RunConfig:
        config = tiny_config(
            data={
                "train": {"name": "coco", "path": train, "vocabulary": {"negatives": 2}},
                "eval": {"name": "coco", "path": evaluated},
                "batch_size": 2,
                "workers": workers,
                "augment": {"flip": 0.5, "resize": {"shortest": [48, 64], "crop": 0.5}},
            },
            train={"output": str(tmp_path / name), "accumulate": 2, "ema": 0.9, "log_every": 3},
        )
        config.model = tiny_grounding_dino(**RANDOM)
        return config

    straight = Trainer(make("straight"))
    prompts = {
        target.id: target.phrases for step in straight.data.steps(0, 0) for batch in step for target in batch.targets
    }
    assert {len(phrases) for phrases in prompts.values()} == {2, 3}
    straight.fit()
    for number in (2, 7) if workers == 0 else (6,):
        config = make(f"stopped_{number}")
        trainer = Trainer(config)
        stop_in_step(trainer, number, interrupt)
        with pytest.raises(SystemExit):
            trainer.fit()
        resumed = Trainer(config, resume=True)
        assert (resumed.progress.epoch, resumed.progress.samples) == (number // 4, 4 * (number % 4))
        resumed.fit()
        assert_same_runs(straight.folder.path, resumed.folder.path)


def test_denoising_labels_are_the_classes_of_the_training_data(tiny_config: MakeConfig, tmp_path: Path) -> None:
    train = {"name": "coco", "path": write_coco(tmp_path / "set", "train", range(1, 5))}
    odvg = OdvgConfig.miniature(tmp_path)
    captions = {"name": "odvg", "path": odvg.path}
    mixture = {"name": "mixture", "datasets": [train, train]}
    for number, (data, configured, expected) in enumerate(
        [
            (train, None, 3),
            (mixture, None, 3),
            (train, 7, 7),
            (train | {"vocabulary": {"negatives": 2}}, None, 256),
            (captions, None, 256),
            (mixture | {"datasets": [train, captions]}, None, 256),
        ]
    ):
        output = {"output": str(tmp_path / str(number)), "max_steps": 1}
        config = tiny_config(data={"train": data, "eval": train, "batch_size": 2}, train=output)
        config.model = tiny_grounding_dino(denoising=DenoisingConfig(num_queries=5, num_labels=configured))
        trainer = Trainer(config)
        assert trainer.unwrapped_model.denoising.labels.num_embeddings == expected, data
        if expected == 3:
            trainer.fit()
            saved, _ = read_model(tmp_path / str(number) / "best")
            assert saved.config.denoising.num_labels == 3
            assert saved.denoising.labels.weight.equal(trainer.unwrapped_model.denoising.labels.weight)


def test_resuming_with_another_number_of_denoising_labels(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Until a version, `denoising: {}` meant 256 labels for any training data."""
    data = {"name": "coco", "path": write_coco(tmp_path / "set", "train", range(1, 5))}
    config = tiny_config(data={"train": data, "eval": data, "batch_size": 2}, train={"max_steps": 1})
    config.model = tiny_grounding_dino(denoising=DenoisingConfig(num_queries=5, num_labels=256))
    Trainer(config).fit()
    run = Path(config.train.output)
    saved = (run / "config.yaml").read_text()
    config.model = tiny_grounding_dino(denoising=DenoisingConfig(num_queries=5))
    with pytest.raises(CheckpointError, match=r"256 denoising labels, the model 3: set model.denoising.num_labels=256"):
        Trainer(config, resume=True)
    assert (run / "config.yaml").read_text() == saved
    config.model.denoising = DenoisingConfig(num_queries=5, num_labels=256)
    Trainer(config, resume=True).fit()

    config.model = tiny_grounding_dino(denoising=DenoisingConfig(num_queries=5), weights=str(run / "best"))
    config.train.output = str(tmp_path / "finetuned")
    assert Trainer(config).unwrapped_model.denoising.labels.num_embeddings == 3


def losses(config: RunConfig) -> list[float]:
    return [row["loss"] for row in history(config) if "loss" in row]


def test_bfloat16_learns(tiny_config: MakeConfig) -> None:
    config = tiny_config(
        data={"train": SCENES | {"size": 8}, "eval": SCENES | {"size": 2}},
        train={"precision": "bf16", "max_steps": 24, "epochs": 12, "log_every": 8, "eval_every": 99},
    )
    config.model = tiny_grounding_dino(denoising=DenoisingConfig(num_queries=6, num_labels=8))
    trainer = Trainer(config)
    trainer.fit()
    first, *_, last = losses(config)
    assert last < 0.85 * first
    assert all(weights.isfinite().all() for weights in trainer.unwrapped_model.parameters())


def test_the_lora_recipe_learns(tiny_config: MakeConfig) -> None:
    """Its module names match, gradients pass gradient checkpointing, and every trainable weight changes."""
    pytest.importorskip("peft")
    recipe = load_config(RECIPE)
    config = tiny_config(
        data={"train": SCENES | {"size": 8}, "eval": SCENES | {"size": 2}},
        train={"max_steps": 6, "log_every": 2, "eval_every": 99, "epochs": 3},
    )
    config.model = tiny_grounding_dino(
        shared_heads=False,
        classes=ClassHeadConfig(scale="width", bias=True),  # with random weights the head of the recipe learns slowly
        denoising=DenoisingConfig(num_queries=6, num_labels=2),
        gradient_checkpointing=True,
    )
    config.optim = recipe.optim
    config.optim.lr, config.optim.warmup_steps = 3e-3, 0
    trainer = Trainer(config)
    before = {name: weights.clone() for name, weights in trainer.unwrapped_model.named_parameters()}
    trainer.fit()
    changed = {name for name, weights in trainer.unwrapped_model.named_parameters() if not weights.equal(before[name])}
    assert changed == {name for name, weights in trainer.unwrapped_model.named_parameters() if weights.requires_grad}
    for part in ("backbone", "text.network", "encoder", "decoder.layers"):
        assert any(name.startswith(f"{part}.") and ".lora_B." in name for name in changed), part
    first, *_, last = losses(config)
    assert last < first


def test_four_images_are_memorized(tiny_config: MakeConfig) -> None:
    four = SCENES | {"size": 4}
    config = tiny_config(
        data={"train": four, "eval": four, "batch_size": 4},
        optim={"lr": 2e-3, "clip_norm": 0.1, "warmup_steps": 10},
        train={"epochs": 150, "eval_every": 150, "log_every": 50, "best_metric": "ap50"},
    )
    config.model = tiny_grounding_dino(
        classes=ClassHeadConfig(scale="width", bias=True), denoising=DenoisingConfig(num_queries=10, num_labels=16)
    )
    assert Trainer(config).fit()["ap50"] >= 0.9

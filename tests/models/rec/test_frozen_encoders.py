"""Checkpoints of rec and the frozen encoders that they do not contain: which ones, where, and whether they changed."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, BertTokenizer

import vg
from vg.checkpoint import read_model, write_model
from vg.cli import main
from vg.config import ModelOnlyConfig
from vg.errors import CheckpointError, ConfigError
from vg.models.encoders import SMALL_VOCABULARY
from vg.models.rec.config import BgeConfig, DenseHeadConfig, RecConfig, VisionEncoderConfig
from vg.models.saved import ENCODERS
from vg.models.settings import TINY_BERT

DINO = {"model_type": "dinov3_convnext", "hidden_sizes": [16, 32], "depths": [1, 1], "layer_scale_init_value": 1.0}


def save_encoder(folder: Path, architecture: dict, seed: int) -> None:
    torch.manual_seed(seed)
    AutoModel.from_config(AutoConfig.for_model(**architecture)).save_pretrained(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint, with its encoders in vision/ and text/ beside it."""
    save_encoder(tmp_path / "vision", DINO, seed=0)
    save_encoder(tmp_path / "text", TINY_BERT, seed=0)
    BertTokenizer(vocab=str(SMALL_VOCABULARY)).save_pretrained(tmp_path / "text")
    config = RecConfig(
        image_size=32,
        vision=VisionEncoderConfig(id=str(tmp_path / "vision")),
        text=BgeConfig(id=str(tmp_path / "text")),
        head=DenseHeadConfig(width=32, layers=1, heads=2, feedforward=64),
    )
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_model(folder, config.build(), ModelOnlyConfig(config))
    return folder


def test_unchanged_encoders_are_not_mentioned(checkpoint: Path) -> None:
    (checkpoint.parent / "vision" / "README.txt").write_text("not a weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_model(checkpoint)


@pytest.mark.parametrize("name", ["vision", "text"])
def test_other_weights_at_the_same_id_are_reported(checkpoint: Path, name: str) -> None:
    folder = checkpoint.parent / name
    save_encoder(folder, DINO if name == "vision" else TINY_BERT, seed=1)
    with pytest.warns(UserWarning, match=rf"model\.{name} is {folder} .*but the checkpoint was trained with {folder}"):
        read_model(checkpoint)


def test_weights_that_were_trained_with_another_encoder_are_reported(checkpoint: Path) -> None:
    config = read_model(checkpoint)[1].model
    save_encoder(checkpoint.parent / "other", DINO, seed=1)
    config = replace(config, weights=str(checkpoint), vision=VisionEncoderConfig(id=str(checkpoint.parent / "other")))
    with pytest.warns(UserWarning, match=r"model\.vision is .*other .*but the checkpoint was trained with .*vision "):
        config.build()


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]", "{}", '{"vision": 3}'], ids=lambda content: content[:20])
def test_a_damaged_list_of_encoders(checkpoint: Path, content: str) -> None:
    config = read_model(checkpoint)[1].model
    (checkpoint / ENCODERS).write_text(content)
    for read in (lambda: read_model(checkpoint), replace(config, weights=str(checkpoint)).build):
        with pytest.raises(CheckpointError, match=rf"{ENCODERS} is damaged"):
            read()


def test_a_missing_list_of_encoders(checkpoint: Path) -> None:
    (checkpoint / ENCODERS).unlink()
    with pytest.raises(CheckpointError, match=rf"{ENCODERS} does not exist"):
        read_model(checkpoint)


def test_a_moved_encoder_is_found_with_an_override(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = checkpoint.parent
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    before = vg.Grounder(checkpoint, "cpu").predict(image, "the red star")
    shutil.move(root / "vision", root / "moved")
    override = f"model.vision.id={root / 'moved'}"
    with pytest.raises(ConfigError, match=rf"{root / 'vision'} .*does not exist; set model\.vision\.id to its folder"):
        vg.load_model(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not vg.load_model(checkpoint, overrides=[override]).training
        after = vg.Grounder(checkpoint, device="cpu", overrides=[override]).predict(image, "the red star")
        _, box, _ = vg.predict_and_crop(image, "the red star", checkpoint, device="cpu", overrides=[override])
    assert (before.boxes == after.boxes).all()
    assert box == tuple(before.boxes[0].tolist())

    Image.fromarray(image).save(root / "image.png")
    arguments = ["predict", str(checkpoint), str(root / "image.png"), "the red star"]
    options = ["--device", "cpu", "--output", str(root / "out.png")]
    for words in ([*arguments, override, *options], [*arguments, *options, override]):
        main(words)
        assert capsys.readouterr().out.startswith("the red star: left")

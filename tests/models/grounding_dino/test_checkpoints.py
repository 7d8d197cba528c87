"""Checkpoints in the official and mmdetection formats, conversion between formats, and `vg convert`."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.grounding_dino.golden import FOLDER, needs_golden
from tests.models.grounding_dino.published import BERT, TEXT, bert_tokenizer, write_tokenizer
from tests.models.grounding_dino.tiny import tiny_model
from vg.checkpoint import read_model, write_weights
from vg.cli import main
from vg.config import ModelOnlyConfig
from vg.models.grounding_dino.checkpoints import Checkpoint, load_into, not_stored, read_checkpoint, write_checkpoint
from vg.models.grounding_dino.config import (
    BertConfig,
    ClassHeadConfig,
    DenoisingConfig,
    GroundingDinoConfig,
    ImageConfig,
    PredictConfig,
    ResNetConfig,
    SwinConfig,
)
from vg.models.grounding_dino.model import GroundingDino
from vg.types import TextSpec

MM = {"classes": ClassHeadConfig(scale="width", bias=True), "shared_heads": False}
LEARNED = {"classes": ClassHeadConfig(scale="learned"), "shared_heads": False}
SWIN = SwinConfig(stages=[1, 2, 3, 4], width=16, depths=[1, 1, 2, 1], heads=[1, 2, 4, 8], window=3)
FIVE = {"backbone": SWIN, "levels": 5}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def model(**settings: Any) -> GroundingDino:
    return tiny_model(**{"points": 4, "text": TEXT} | settings)


def written(path: Path, format: Any, source: GroundingDino | Checkpoint) -> Checkpoint:
    """Write a model or checkpoint in this format and read it."""
    weights = source.weights if isinstance(source, Checkpoint) else source.own_state_dict()
    tokenizer = bert_tokenizer(path) if format == "transformers" else None
    write_checkpoint(weights, source.config, tokenizer, path, format)
    return read_checkpoint(path, BERT)


@needs_golden
def test_three_files_with_equal_weights() -> None:
    bert = json.loads((FOLDER / "config.json").read_text())["bert"]
    official, prefixed, mmdet = (
        read_checkpoint(FOLDER / f"{name}.pth", bert)
        for name in ("official_tiny", "official_tiny_module_prefix", "mmdet_tiny")
    )
    assert [checkpoint.format for checkpoint in (official, prefixed, mmdet)] == ["official", "official", "mmdet"]
    assert equal(official.weights, prefixed.weights)
    assert equal(official.weights, mmdet.weights)
    assert official.config == prefixed.config
    expected = {"logit_eps": (1e-3, 1e-5), "fusion_dropout": 0.1, "fusion_drop_path": 0.0}
    assert mmdet.config == replace(official.config, **expected)
    assert sum(tensor.numel() for tensor in official.weights.values()) == 1_261_430 - (48 * 48 + 48), (
        "without the pooler"
    )
    config = official.config
    assert config.backbone == SwinConfig(width=16, depths=[2, 2, 2, 2], heads=[1, 2, 4, 8], window=7, drop_path=0.2)
    assert (config.width, config.levels, config.encoder_layers, config.decoder_layers) == (64, 4, 2, 3)
    assert (config.heads, config.points, config.feedforward, config.num_queries) == (8, 4, 128, 30)
    assert (config.shared_heads, config.classes, config.logit_eps) == (True, ClassHeadConfig(), (1e-3, 1e-3))
    assert config.text.architecture == {
        "model_type": "bert",
        "vocab_size": 1160,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "type_vocab_size": 2,
    }


@needs_golden
def test_written_files_equal_the_recorded_ones(tmp_path: Path) -> None:
    """All names and values of the recorded files, except for buffers and the unused pooler."""
    bert = json.loads((FOLDER / "config.json").read_text())["bert"]
    checkpoint = read_checkpoint(FOLDER / "official_tiny.pth", bert)
    for format, key in (("official", "model"), ("mmdet", "state_dict")):
        write_checkpoint(checkpoint.weights, checkpoint.config, None, tmp_path / format, format)  # type: ignore[arg-type]
        ours = torch.load(tmp_path / format, weights_only=True)[key]
        recorded = torch.load(FOLDER / f"{format}_tiny.pth", weights_only=True)
        recorded = recorded.get("model", recorded)
        assert {name for name in recorded if "pooler" not in name and "relative_position_index" not in name} == set(
            ours
        )
        assert all(ours[name].equal(recorded[name]) for name in ours)


CHAINS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "official": ({}, ["official", "mmdet", "transformers", "official"]),
    "heads of each layer": ({"shared_heads": False}, ["official", "transformers", "mmdet", "official"]),
    "mm": (MM, ["mmdet", "transformers", "mmdet"]),
    "fine-tuned in mmdetection": (LEARNED, ["mmdet", "mmdet"]),
    "five levels": (MM | FIVE, ["mmdet", "transformers", "mmdet"]),
    "official, five levels": (FIVE, ["official", "mmdet", "transformers"]),
    "resnet": (
        MM | {"backbone": ResNetConfig(depths=[1, 2, 1, 1], widths=[16, 32, 48, 64])},
        ["mmdet", "transformers"],
    ),
    "official resnet": (
        {"backbone": ResNetConfig(depths=[1, 1, 1, 1], widths=[16, 32, 48, 64])},
        ["official", "mmdet"],
    ),
}


@pytest.mark.parametrize(("settings", "formats"), CHAINS.values(), ids=CHAINS)
def test_conversion_between_formats(tmp_path: Path, settings: dict[str, Any], formats: list[Any]) -> None:
    source: GroundingDino | Checkpoint = model(**settings)
    weights = source.own_state_dict()  # type: ignore[union-attr]
    for number, format in enumerate(formats):
        checkpoint = written(tmp_path / f"{number}", format, source)
        assert equal(checkpoint.weights, weights)
        config, expected = checkpoint.config, source.config
        assert checkpoint.format == format
        for name in ("shared_heads", "classes", "levels", "heads", "points", "feedforward", "num_queries", "width"):
            assert getattr(config, name) == getattr(expected, name), name
        assert replace(config.backbone, id=None, **drop_path(expected)) == expected.backbone
        source = checkpoint


def drop_path(config: GroundingDinoConfig) -> dict[str, float]:
    return {"drop_path": config.backbone.drop_path} if isinstance(config.backbone, SwinConfig) else {}


def test_mmdetection_interleaves_the_channels_of_patch_merging(tmp_path: Path) -> None:
    source = model()
    written(tmp_path / "mm.pth", "mmdet", source)
    stored = torch.load(tmp_path / "mm.pth", weights_only=True)["state_dict"]
    ours = source.own_state_dict()["backbone.network.encoder.layers.0.downsample.reduction.weight"]  # [2C, 4C]
    theirs = stored["backbone.stages.0.downsample.reduction.weight"]
    channels = ours.shape[1] // 4
    for (row, column), block in {(0, 0): 0, (1, 0): 1, (0, 1): 2, (1, 1): 3}.items():
        of_channel_3 = theirs[:, 3 * 4 + 2 * row + column]
        assert of_channel_3.equal(ours[:, block * channels + 3])


def test_the_embedding_of_denoising_labels_is_optional(tmp_path: Path) -> None:
    source = model(**MM, denoising=DenoisingConfig(num_labels=5))
    labels = "denoising.labels.weight"
    checkpoint = written(tmp_path / "mm.pth", "mmdet", source)
    assert checkpoint.config.denoising == DenoisingConfig(num_labels=5)
    assert checkpoint.weights[labels].equal(source.own_state_dict()[labels])
    without = written(tmp_path / "hf", "transformers", source)
    assert without.config.denoising is None
    assert labels not in without.weights

    other = model(seed=1, **MM, denoising=DenoisingConfig(num_labels=5))
    before = other.own_state_dict()[labels].clone()
    load_into(other, tmp_path / "hf")
    assert other.own_state_dict()[labels].equal(before), "unchanged"
    load_into(other, tmp_path / "mm.pth")
    assert equal(other.own_state_dict(), source.own_state_dict())
    automatic = model(seed=1, **MM, denoising=DenoisingConfig())
    load_into(automatic, tmp_path / "mm.pth")
    assert equal(automatic.own_state_dict(), source.own_state_dict()), "takes the size of the checkpoint"
    assert automatic.config.denoising == DenoisingConfig(num_labels=5)
    plain = model(seed=1, **MM)
    load_into(plain, tmp_path / "mm.pth")
    assert equal(plain.own_state_dict(), without.weights)


def test_official_weights_load_into_one_head_per_layer(tmp_path: Path) -> None:
    source = model()
    written(tmp_path / "official.pth", "official", source)
    other = model(seed=1, **LEARNED)
    load_into(other, tmp_path / "official.pth")
    own = other.own_state_dict()
    for name, tensor in source.own_state_dict().items():
        copies = [name.replace("_heads.0.", f"_heads.{layer}.") for layer in range(2)]
        assert all(own[copy].equal(tensor) for copy in copies)
    assert own["decoder.class_heads.1.log_scale"].tolist() == [0.0], "a scale of one"
    assert own["queries.class_head.log_scale"].tolist() == [0.0]


class OfAnotherPackage:
    def __init__(self, value: int):
        self.value = value


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_does_not_run(tmp_path: Path, zipped: bool) -> None:
    """Training checkpoints contain logs and arguments of packages that may not be installed."""
    source = model()
    expected = written(tmp_path / "mm.pth", "mmdet", source)
    stored = torch.load(tmp_path / "mm.pth", weights_only=True)
    stored["meta"] = {"seed": np.float64(3), "history": np.arange(4), "args": argparse.Namespace(lr=1), "epoch": 3}
    stored["message_hub"] = OrderedDict(loss=OfAnotherPackage(3), function=print)
    if not zipped:
        del stored["meta"], stored["message_hub"]  # the format of before torch 1.6 needs plain contents
    torch.save(stored, tmp_path / "training.pth", _use_new_zipfile_serialization=zipped)
    assert equal(read_checkpoint(tmp_path / "training.pth", BERT).weights, expected.weights)


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = model(**MM)
    written(tmp_path / "mm.pth", "mmdet", source)
    (tmp_path / "bert").mkdir()
    write_tokenizer(tmp_path / "bert")
    options = ["--tokenizer", str(tmp_path / "bert")]
    main(["convert", str(tmp_path / "mm.pth"), str(tmp_path / "a" / "vg"), "--to", "vg", *options])
    output = capsys.readouterr().out
    assert "mm.pth: Grounding DINO in the mmdet format" in output
    assert f"{sum(tensor.numel() for tensor in source.own_state_dict().values()):,} weights" in output
    assert f"layers of width {source.config.width}, 4 levels, 20 queries, heads for each layer; logits: dot" in output
    assert "a/vg: written in the vg format" in output
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["vg"], "no partial files"

    loaded, config = read_model(tmp_path / "a" / "vg")
    assert equal(loaded.own_state_dict(), source.own_state_dict())
    assert config.model.text.id is None  # no download needed
    assert loaded.text_spec.tokenizer.convert_tokens_to_ids(".") == 1012
    for name, format in (("hf", "transformers"), ("again.pth", "mmdet"), ("vg", "vg")):
        main(["convert", str(tmp_path / "a" / "vg"), str(tmp_path / name), "--to", format])
        assert equal(read_checkpoint(tmp_path / name, BERT).weights, source.own_state_dict())
    assert (tmp_path / "vg" / "config.yaml").read_text() == (tmp_path / "a" / "vg" / "config.yaml").read_text()


def test_convert_prints_settings_that_the_format_does_not_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = bert_tokenizer(tmp_path / "hf")
    eps = "model.logit_eps=(1e-05, 1e-05) (vg assumes (0.001, {}))"
    for name, image in (("small", ImageConfig(shortest=128)), ("default", ImageConfig())):
        source = model(image=image, max_tokens=64 if name == "small" else 256)
        (tmp_path / name).mkdir()
        write_checkpoint(source.own_state_dict(), source.config, tokenizer, tmp_path / name, "transformers")
        for format in ("vg", "official", "mmdet"):
            main(["convert", str(tmp_path / name), str(tmp_path / f"{name}_{format}"), "--to", format])
            lost = [eps.format({"official": "0.001", "mmdet": "1e-05"}[format])] if format != "vg" else []
            if format != "vg" and name == "small":
                lost += ["model.image.shortest=128 (vg assumes 800)", "model.max_tokens=64 (vg assumes 256)"]
            line = f"lost in the {format} format: {', '.join(lost)}: set these where the file is used\n" if lost else ""
            assert capsys.readouterr().out.endswith(f"written in the {format} format\n{line}")


@pytest.mark.parametrize(  # the official format has no biases
    ("format", "settings"),
    [("official", {}), ("mmdet", {}), ("mmdet", MM), ("transformers", {}), ("transformers", MM)],
    ids=["official", "mmdet", "mmdet-mm", "transformers", "transformers-mm"],
)
def test_settings_that_are_lost_are_listed(tmp_path: Path, format: Any, settings: dict[str, Any]) -> None:
    """Exactly those of predictions that differ after the file is read."""
    rates = {"dropout": 0.1, "fusion_dropout": 0.2, "fusion_drop_path": 0.3}
    image = ImageConfig(shortest=64, longest=120, mix_sizes=True)
    predict = PredictConfig(score="max", top_k=10, threshold=0.1, nms=0.5)
    source = model(**settings, **rates, logit_eps=(1e-4, 1e-4), image=image, max_tokens=64, predict=predict)
    read = written(tmp_path / "file", format, source).config
    expected = {
        f"model.{name}={own} (vg assumes {other})"
        for name, own, other in differences(asdict(source.config), asdict(read))
        if name.split(".")[0] not in {*rates, "backbone", "denoising", "text"}
    }
    assert set(not_stored(source.config, format)) == expected
    assert len(expected) == (6 if format == "transformers" else 9)
    assert not_stored(read, format) == []


def differences(own: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the path of each value in which nested dictionaries differ, and both values."""
    if isinstance(own, dict) and isinstance(other, dict):
        for key in own.keys() | other.keys():
            yield from differences(own.get(key), other.get(key), f"{name}.{key}".lstrip("."))
    elif own != other:
        yield name, own, other


def test_the_checkpoint_of_a_run(tmp_path: Path) -> None:
    """Its config may give the text encoder by id; sizes are detected from the weights, so nothing is downloaded."""
    source = model(denoising=DenoisingConfig(num_labels=5))
    config = replace(source.config, text=BertConfig(frozen=True), weights="elsewhere.pth")
    (tmp_path / "best").mkdir()
    spec = TextSpec(bert_tokenizer(tmp_path / "bert"), max_tokens=256)
    write_weights(tmp_path / "best", source.own_state_dict(), ModelOnlyConfig(config), spec)
    checkpoint = read_checkpoint(tmp_path, BERT)
    assert (checkpoint.format, checkpoint.tokenizer) == ("vg", str(tmp_path / "best" / "tokenizer"))
    assert checkpoint.config == replace(source.config, text=replace(TEXT, frozen=True))
    assert equal(checkpoint.weights, source.own_state_dict())
    other = model(seed=1)
    load_into(other, tmp_path)
    assert all(tensor.equal(checkpoint.weights[name]) for name, tensor in other.own_state_dict().items())

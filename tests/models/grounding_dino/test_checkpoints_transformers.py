"""Folders of transformers: equal weights and equal outputs in both implementations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, AutoTokenizer

from tests.models.grounding_dino.published import (
    bert_tokenizer,
    output_of_transformers,
    output_of_vg,
    random_model,
    write_tokenizer,
)
from vg.errors import CheckpointError
from vg.inference.load import load_model
from vg.models.grounding_dino.checkpoints import load_into, read_checkpoint, write_checkpoint
from vg.models.grounding_dino.config import ImageConfig, ResNetConfig, SwinConfig
from vg.types import FittedImage

VARIANTS = {
    "official": {},
    "mm": {"mm": True},
    "mm, shared heads": {"mm": True, "decoder_bbox_embed_share": True, "decoder_cls_embed_share": True},
    "heads of each layer": {"decoder_bbox_embed_share": False},
    "four stages": {"mm": True, "stages": (1, 2, 3, 4)},
    "two extra levels": {"num_feature_levels": 5},
    "resnet": {"backbone": "resnet"},
    "two points": {"encoder_n_points": 2, "decoder_n_points": 2},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A transformers model and its folder."""
    model = random_model(**request.param)
    model.save_pretrained(tmp_path / "published")
    write_tokenizer(tmp_path / "published")
    model.config.save_pretrained(tmp_path / "published")  # write_tokenizer left that of BERT
    return model, tmp_path / "published"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (None, {"activation_function": "gelu"}, r"config\.json: activation_function is 'gelu', vg implements 'relu'"),
        (None, {"layer_norm_eps": 0.1}, "layer_norm_eps is 0.1, vg implements 1e-05"),
        (None, {"position_embedding_type": "learned"}, "position_embedding_type is 'learned'"),
        (None, {"embedding_init_target": False, "two_stage": False}, "two_stage is False.*; embedding_init_target is"),
        (
            None,
            {"decoder_attention_heads": 2},
            r"encoder_attention_heads and decoder_attention_heads differ \(4 and 2\)",
        ),
        (None, {"decoder_ffn_dim": 32}, r"encoder_ffn_dim and decoder_ffn_dim differ \(64 and 32\)"),
        ("text_config", {"hidden_act": "relu"}, r"text_config\.hidden_act is 'relu', vg implements 'gelu'"),
        ("text_config", {"layer_norm_eps": 1e-5}, r"text_config\.layer_norm_eps is 1e-05, vg implements 1e-12"),
        ("backbone_config", {"hidden_act": "relu"}, r"backbone_config\.hidden_act is 'relu', vg implements 'gelu'"),
        ("backbone_config", {"layer_norm_eps": 1e-3}, r"backbone_config\.layer_norm_eps is 0\.001"),
        (None, {"text_config": [1]}, r"text_config is \[1\], expected settings by their names"),
        (None, {"encoder_n_points": "4"}, "encoder_n_points and decoder_n_points must be the same positive number"),
        (None, {"encoder_n_points": 10**6, "decoder_n_points": 10**6}, "1000000 points and 4 levels do not fit"),
        (None, {"encoder_attention_heads": [4]}, "encoder_attention_heads and decoder_attention_heads differ"),
        ("text_config", {"num_attention_heads": -1}, "num_attention_heads of the text encoder is -1"),
        (None, {"max_text_len": -1}, "max_tokens: Input should be greater than .*, got -1"),
        (None, {"positional_embedding_temperature": "warm"}, "position_temperature: Input should be .*, got 'warm'"),
    ],
)
def test_settings_that_no_tensor_shows_are_refused(
    section: str | None, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = random_model()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (settings[section] if section else settings).update(values)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def test_settings_that_are_null_have_their_defaults(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    expected = read_checkpoint(tmp_path).config
    settings = json.loads((tmp_path / "config.json").read_text())
    changed = settings | {"positional_embedding_temperature": None, "max_text_len": None, "layer_norm_eps": None}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": None, "size": None}))
    assert read_checkpoint(tmp_path).config == expected


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_the_image_processor_is_applied_or_refused(file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random_model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    assert read_checkpoint(tmp_path).config.image == ImageConfig()
    size = {"shortest_edge": 96, "longest_edge": 128}
    values = {"size": size, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "resample": 2}

    def write(**changes: Any) -> None:
        stored = values | changes
        nested = {"image_processor": stored} if file == "processor_config.json" else stored
        (tmp_path / file).write_text(json.dumps(nested))

    write()
    checkpoint = read_checkpoint(tmp_path)
    model = load_model(tmp_path, str(tmp_path / "tokenizer"))
    assert model.image_spec == FittedImage(96, 128, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))
    for changes, message in (
        ({"resample": 3}, "resample is 3, vg implements 2"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"rescale_factor": 1}, "rescale_factor is 1, vg implements 0.0039"),
        ({"size": {"height": 96, "width": 96}}, "size is .*'height'.*vg implements shortest_edge and longest_edge"),
    ):
        write(**changes)
        with pytest.raises(CheckpointError, match=f"{file}: {message}"):
            read_checkpoint(tmp_path)
    for changes, message in (
        ({"image_std": [0, 0, 0]}, r"image\.std\.0: Input should be greater than 0, got 0"),
        ({"image_mean": [0.5]}, r"image\.mean"),
        ({"image_mean": [math.nan] * 3}, r"image\.mean\.0: Input should be a finite number"),
        ({"image_mean": 0.5}, r"image\.mean"),
        ({"size": {"shortest_edge": "small", "longest_edge": 1333}}, r"image\.shortest: .*, got 'small'"),
    ):
        write(**changes)
        with pytest.raises(CheckpointError, match=f"its settings cannot be used: {message}"):
            read_checkpoint(tmp_path)
    write()
    own = replace(checkpoint.config, image=ImageConfig(shortest=64, longest=128))
    with pytest.raises(CheckpointError, match=r"image\.mean: \(0\.485, .*, \(0\.5, 0\.4, 0\.3\) in the checkpoint"):
        load_into(own.build(pretrained=False), tmp_path)
    own.image.mean, own.image.std = checkpoint.config.image.mean, checkpoint.config.image.std
    load_into(own.build(pretrained=False), tmp_path)
    assert "images are resized to 64 and at most 128 pixels (model.image), the checkpoint has 96 and 128" in caplog.text


def used(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without unused weights."""
    return {name: tensor for name, tensor in tensors.items() if "layernorm." not in name.partition("model.swin.")[2]}


def test_outputs_equal_transformers_in_both_directions(published: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = published
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.format, checkpoint.tokenizer) == ("transformers", str(folder))
    assert checkpoint.config.shared_heads == getattr(model.config, "decoder_bbox_embed_share", True)
    ours = checkpoint.config.build(pretrained=False).eval()
    ours.load_own_state_dict(checkpoint.weights)
    ours.load_tokenizer(str(folder))
    logits, boxes = output_of_transformers(model)
    our_logits, our_boxes = output_of_vg(ours)
    torch.testing.assert_close(our_boxes, boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(our_logits, logits, atol=1e-5, rtol=1e-5)
    assert boxes.std(dim=1).max() > 0.1, "the queries differ"

    (tmp_path / "ours").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write_checkpoint(checkpoint.weights, checkpoint.config, tokenizer, tmp_path / "ours", "transformers")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "ours"))
    assert used(before).keys() == after.keys(), "the names in files, not those in memory"
    assert all(tensor.equal(before[name]) and tensor.shape == before[name].shape for name, tensor in after.items())
    again, report = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(model)
    assert not report["unexpected_keys"]
    assert all("swin.layernorm" in name for name in report["missing_keys"])
    for one, other in zip(output_of_transformers(again.eval()), (logits, boxes), strict=True):
        assert one.equal(other)


def test_the_processor_loads(tmp_path: Path) -> None:
    model = random_model()
    model.save_pretrained(tmp_path / "published")
    checkpoint = read_checkpoint(tmp_path / "published")
    (tmp_path / "ours").mkdir()
    tokenizer = bert_tokenizer(tmp_path / "bert")
    write_checkpoint(checkpoint.weights, checkpoint.config, tokenizer, tmp_path / "ours", "transformers")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    encoded = processor(images=torch.zeros(3, 480, 640, dtype=torch.uint8).numpy(), text="cat.", return_tensors="pt")
    assert encoded["pixel_values"].shape == (1, 3, 800, 1066)
    assert encoded["input_ids"].tolist() == [[101, 1030, 1012, 102]]


def test_settings_in_config_json(tmp_path: Path) -> None:
    random_model(
        encoder_n_points=2, decoder_n_points=2, max_text_len=40, positional_embedding_temperature=10
    ).save_pretrained(tmp_path)
    config = read_checkpoint(tmp_path).config
    assert (config.heads, config.points, config.max_tokens, config.position_temperature) == (4, 2, 40, 10)
    assert config.text.architecture is not None
    assert config.text.architecture["num_attention_heads"] == 4
    assert config.logit_eps == (1e-5, 1e-5)
    assert isinstance(config.backbone, SwinConfig)
    assert (config.backbone.width, config.backbone.window, config.backbone.stages) == (16, 3, [2, 3, 4])
    assert (config.backbone.depths, config.backbone.heads) == ([1, 1, 2, 1], [1, 2, 4, 8])


@pytest.mark.parametrize("mm", [False, True])
def test_names_in_memory_extra_tensors_and_copies_are_accepted(tmp_path: Path, mm: bool) -> None:
    """Some files contain the names in memory, all copies of the heads, and LLMDet's language model."""
    model = random_model(mm)
    model.save_pretrained(tmp_path / "published")
    expected = read_checkpoint(tmp_path / "published")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("attention.q_proj" in name for name in tensors)
    extras = ("lmm.layers.0.weight", "connector.0.bias", "region_connector.0.bias", "image_seperate.weight")
    for name in (*extras, "ref_point_head.0.weight"):
        tensors[name] = torch.zeros(3)
    (tmp_path / "other").mkdir()
    model.config.save_pretrained(tmp_path / "other")
    names = sorted(tensors)
    for shard, some in enumerate((names[::2], names[1::2])):
        save_file(
            {name: tensors[name] for name in some}, tmp_path / "other" / f"model-0000{shard}-of-00002.safetensors"
        )
    found = read_checkpoint(tmp_path / "other")
    assert found.config == expected.config
    assert found.weights.keys() == expected.weights.keys()
    assert all(found.weights[name].equal(expected.weights[name]) for name in found.weights)


def test_detect_a_resnet(tmp_path: Path) -> None:
    random_model(backbone="resnet").save_pretrained(tmp_path)
    backbone = read_checkpoint(tmp_path).config.backbone
    assert backbone == ResNetConfig(depths=[1, 2, 1, 1], widths=[16, 32, 48, 64])


def test_load_into_an_existing_model(tmp_path: Path) -> None:
    model = random_model(mm=True)
    write_tokenizer(tmp_path)
    model.save_pretrained(tmp_path)
    ours = read_checkpoint(tmp_path).config.build(pretrained=False).eval()
    load_into(ours, tmp_path)
    ours.load_tokenizer(str(tmp_path))
    for one, other in zip(output_of_vg(ours), output_of_transformers(model), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

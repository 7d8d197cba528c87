"""Folders of transformers: equal weights and equal outputs in both implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, AutoTokenizer

from tests.models.grounding_dino.published import (
    output_of_transformers,
    output_of_vg,
    random_model,
    write_tokenizer,
)
from vg.models.grounding_dino.checkpoints import load_into, read_checkpoint, write_checkpoint
from vg.models.grounding_dino.config import ResNetConfig, SwinConfig

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


def used(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without unused weights."""
    return {name: tensor for name, tensor in tensors.items() if "layernorm." not in name.partition("model.swin.")[2]}


def test_outputs_equal_transformers_in_both_directions(published: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = published
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.dialect, checkpoint.tokenizer) == ("transformers", str(folder))
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
    for name in ("bert", "ours"):
        (tmp_path / name).mkdir()
    write_tokenizer(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
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

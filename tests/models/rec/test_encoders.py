"""The encoders of transformers that rec accepts: any resolution, weights from folders, and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, CLIPModel, Siglip2ImageProcessorPil, SiglipModel, T5Model

from vg.data.images import normalized
from vg.errors import ConfigError
from vg.models.encoder_types import SIGLIP_VISION, TEXT_TYPES, VISION_TYPES
from vg.models.encoders import Encoder
from vg.models.rec.config import BgeConfig, DenseHeadConfig, RecConfig, VisionEncoderConfig
from vg.models.rec.vision import VisionEncoder
from vg.models.settings import TINY_BERT, EncoderConfig, TextEncoderConfig

WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PATCHES = {**WIDTHS, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}
SWIN = {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
OTHER_VISION = {
    "convnext": STAGES | {"num_stages": 2},
    "convnextv2": STAGES | {"num_stages": 2},
    "dinov3_convnext": STAGES,
    "resnet": STAGES | {"embedding_size": 8},
    "siglip2_vision_model": WIDTHS | {"patch_size": 8, "num_patches": 16},
    "swin": SWIN,
}
TEXT = {**WIDTHS, "vocab_size": 400, "max_position_embeddings": 80, "pad_token_id": 0}
TEXT |= {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
OTHER_TEXT = {
    "albert": TEXT | {"embedding_size": 16},
    "distilbert": TEXT | {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "t5": {"vocab_size": 400, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
}


def vision(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type} | OTHER_VISION.get(model_type, PATCHES)


def text(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type} | OTHER_TEXT.get(model_type, TEXT)


def trained_without_gradient(encoder: Encoder, features: torch.Tensor) -> list[str]:
    features.square().sum().backward()
    return [name for name, value in encoder.named_parameters() if value.requires_grad and value.grad is None]


@pytest.mark.parametrize("model_type", VISION_TYPES)
def test_vision_encoders_at_any_resolution(model_type: str) -> None:
    torch.manual_seed(0)
    encoder = VisionEncoder(VisionEncoderConfig(architecture=vision(model_type), frozen=False), pretrained=False)
    for height, width in ((32, 32), (64, 64), (16, 16), (40, 40), (32, 64), (50, 50), (32, 32)):
        features, (rows, columns) = encoder(torch.randn(2, 3, height, width))
        prefix = {"deit": 2, "dinov2_with_registers": 5, "convnext": 0, "convnextv2": 0, "resnet": 0, "swin": 0}
        expected = prefix.get(model_type, 0 if model_type in SIGLIP_VISION else 1) + rows * columns
        assert features.shape == (2, expected, encoder.width)
        if height % 8 == width % 8 == 0:
            assert (rows, columns) == (height // 8, width // 8)
    assert trained_without_gradient(encoder, features) == []


def test_swin_does_not_depend_on_former_images() -> None:
    """transformers shrinks or does not shift the windows for a small image, and keeps this."""
    encoder = VisionEncoder(VisionEncoderConfig(architecture=vision("swin")), pretrained=False)
    image = torch.randn(1, 3, 64, 64)
    before, _ = encoder(image)
    for size in (16, 32):  # smaller than a window, and as large as one
        encoder(image[..., :size, :size])
        torch.testing.assert_close(encoder(image)[0], before, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_positions_are_the_longest_input(model_type: str) -> None:
    encoder = Encoder(BgeConfig(architecture=text(model_type), frozen=True), pretrained=False)

    def run(length: int) -> int:
        token_ids = torch.full((1, length), 7)
        return encoder.run(input_ids=token_ids, attention_mask=torch.ones_like(token_ids)).shape[1]

    if encoder.positions is None:
        assert run(200) == 200
        return
    assert run(encoder.positions) == encoder.positions
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        run(encoder.positions + 1)


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_text_encoders(model_type: str) -> None:
    encoder = Encoder(TextEncoderConfig(architecture=text(model_type), frozen=False), pretrained=False)
    tokens = torch.tensor([[2, 5, 6, 3, 0, 0], [2, 5, 6, 7, 8, 3]])
    features = encoder.run(input_ids=tokens, attention_mask=(tokens != 0).long())
    assert features.shape == (2, 6, encoder.width)
    assert trained_without_gradient(encoder, features) == []


def saved(model_type: str, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    model.save_pretrained(folder)
    return model


def test_towers_of_clip_and_siglip_have_their_weights(tmp_path: Path) -> None:
    images, tokens = torch.randn(1, 3, 32, 32), torch.tensor([[2, 5, 6, 3]])
    for model_type in ("clip", "siglip"):
        whole = saved(model_type, tmp_path / model_type, vision_config=PATCHES, text_config=TEXT)
        assert isinstance(whole, (CLIPModel, SiglipModel))
        tower = VisionEncoder(VisionEncoderConfig(id=str(tmp_path / model_type)), pretrained=True)
        expected = whole.vision_model(pixel_values=images).last_hidden_state
        torch.testing.assert_close(tower(images)[0], expected, rtol=0, atol=0)
    encoder = Encoder(TextEncoderConfig(id=str(tmp_path / "clip")), pretrained=True)
    whole = CLIPModel.from_pretrained(tmp_path / "clip")
    expected = whole.text_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(encoder.run(input_ids=tokens, attention_mask=torch.ones_like(tokens)), expected)


def test_siglip2_sees_images_as_its_own_processor(tmp_path: Path) -> None:
    """NaFlex: any aspect ratio, as flat patches whose values are in another order than those of a convolution."""
    whole = saved("siglip2", tmp_path, vision_config=vision("siglip2_vision_model"), text_config=TEXT)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=15)  # as many as the image has: no resizing
    expected = whole.vision_model(**processor(pixels, return_tensors="pt")).last_hidden_state
    config = RecConfig(
        vision=VisionEncoderConfig(id=str(tmp_path)), text=BgeConfig(architecture=TINY_BERT), head=DenseHeadConfig()
    )
    model = config.build()
    tokens, grid = model.encode_images(torch.from_numpy(normalized([pixels], [(24, 40)], model.image_spec)))
    assert grid == (3, 5)
    torch.testing.assert_close(tokens, expected)


def test_the_encoder_of_t5_has_its_weights(tmp_path: Path) -> None:
    whole = saved("t5", tmp_path, **OTHER_TEXT["t5"])
    assert isinstance(whole, T5Model)
    encoder = Encoder(TextEncoderConfig(id=str(tmp_path)), pretrained=True)
    tokens = torch.tensor([[2, 5, 6, 3]])
    expected = whole.encoder(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(encoder.run(input_ids=tokens), expected)


def test_clip_and_siglip_are_normalized_as_published() -> None:
    means = {}
    for model_type in ("clip_vision_model", *SIGLIP_VISION, "dinov2"):
        config = RecConfig(
            vision=VisionEncoderConfig(architecture=vision(model_type)),
            text=BgeConfig(architecture=TINY_BERT),
            head=DenseHeadConfig(width=32, layers=1, heads=2, feedforward=64),
        )
        means[model_type] = config.build().image_spec.mean[0]
    assert means == {"clip_vision_model": 0.48145466, "dinov2": 0.485} | dict.fromkeys(SIGLIP_VISION, 0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (VisionEncoderConfig(architecture={"model_type": "vit_mae"}), r"model\.vision.*vit_mae.*dinov2.*vit"),
        (VisionEncoderConfig(architecture={"model_type": "bert"}), r"model\.vision.*bert"),
        (TextEncoderConfig(architecture={"model_type": "gpt2"}), r"model\.text.*gpt2.*bert.*t5"),
    ],
)
def test_other_types_are_refused_by_name(config: EncoderConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Encoder(config, pretrained=False)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    """transformers makes them random and only logs it."""
    saved("bert", tmp_path, **TEXT)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 16 weights, such as encoder\.layer\.2"):
        Encoder(TextEncoderConfig(id=str(tmp_path)), pretrained=True)

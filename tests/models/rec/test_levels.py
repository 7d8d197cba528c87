"""Features of several layers of a vision encoder, and their fixed projection to fewer channels."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.models.rec.test_encoders import trained_without_gradient, vision
from vg.checkpoint import read_model, write_model
from vg.config import ModelOnlyConfig
from vg.errors import ConfigError
from vg.models.encoder_types import SIGLIP_VISION, VISION_TYPES
from vg.models.rec.config import RecConfig, VisionEncoderConfig
from vg.models.rec.model import fixed_projection
from vg.models.rec.vision import VisionEncoder

PREFIX = {"deit": 2, "dinov2_with_registers": 5, "convnext": 0, "convnextv2": 0, "resnet": 0, "swin": 0}
PREFIX |= dict.fromkeys(SIGLIP_VISION, 0)


def encoder(model_type: str, layers: list[int] | None, **settings: Any) -> VisionEncoder:
    torch.manual_seed(0)
    config = VisionEncoderConfig(architecture=vision(model_type), layers=layers, **settings)
    return VisionEncoder(config, pretrained=False)


def recorded(network: torch.nn.Module, names: list[str], images: torch.Tensor) -> list[torch.Tensor]:
    """Run a network; return the outputs of submodules."""
    found: list[torch.Tensor] = []
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda _, __, output: found.append(output if isinstance(output, torch.Tensor) else output[0])
        )
    network(images)
    return found.copy()  # the hooks remain


@pytest.mark.parametrize("model_type", VISION_TYPES)
def test_the_last_layer_is_the_default(model_type: str) -> None:
    images = torch.randn(2, 3, 40, 64)
    for expected, found in zip(encoder(model_type, None)(images), encoder(model_type, [2])(images), strict=True):
        assert expected == found if isinstance(expected, tuple) else expected.equal(found)
    assert encoder(model_type, None).width == encoder(model_type, [2]).width


@pytest.mark.parametrize("model_type", VISION_TYPES)
def test_two_layers_of_every_type(model_type: str) -> None:
    whole = encoder(model_type, [1, 2], frozen=False)
    for height, width in ((32, 64), (64, 64), (48, 32)):
        tokens, (rows, columns) = whole(torch.randn(2, 3, height, width))
        cell = 4 if hasattr(whole.network_config, "depths") else 8  # the grid of the first stage is finer
        assert (rows, columns) == (height // cell, width // cell)
        assert tokens.shape == (2, PREFIX.get(model_type, 1) + rows * columns, whole.width)
    assert whole.width == (48 if cell == 4 else 64)
    assert trained_without_gradient(whole, tokens) == []


def test_layers_are_normalized_as_by_the_networks_of_dino() -> None:
    images = torch.randn(2, 3, 32, 48)
    for model_type, block, norm in (
        ("dinov2", "encoder.layer.{}", "layernorm"),
        ("dinov3_vit", "model.layer.{}", "norm"),
    ):
        whole = encoder(model_type, [1, 2])
        outputs = recorded(whole.network, [block.format(index) for index in range(2)], images)
        expected = torch.cat([whole.network.get_submodule(norm)(x) for x in outputs], dim=-1)
        torch.testing.assert_close(whole(images)[0], expected, rtol=0, atol=0)


def test_layers_of_clip_are_not_normalized() -> None:
    """Its norm is that of the class token in the space of its text."""
    images = torch.randn(2, 3, 32, 32)
    whole = encoder("clip_vision_model", [1, 2])
    outputs = recorded(whole.network, ["encoder.layers.0", "encoder.layers.1"], images)
    assert whole(images)[0].equal(torch.cat(outputs, dim=-1))


def test_stages_of_convnext() -> None:
    """The class token of a stage is the mean of its cells, as that of the last one before its norm."""
    images = torch.randn(2, 3, 32, 48)
    whole = encoder("dinov3_convnext", [1, 2])
    first, _ = recorded(whole.network, ["model.stages.0", "model.stages.1"], images)
    last = whole.network(images).last_hidden_state  # [B, 1 + 4 x 6, 32]
    tokens, grid = whole(images)
    assert grid == (8, 12)
    assert tokens[:, 1:, :16].mT.unflatten(2, grid).equal(first)
    torch.testing.assert_close(tokens[:, 0, :16], first.mean(dim=(2, 3)))
    assert tokens[:, 0, 16:].equal(last[:, 0])
    coarse = last[:, 1:].mT.unflatten(2, (4, 6))
    torch.testing.assert_close(
        tokens[:, 1:, 16:].mT.unflatten(2, grid), F.interpolate(coarse, scale_factor=2, mode="bilinear")
    )


def test_stages_of_swin_are_those_before_merging() -> None:
    images = torch.randn(2, 3, 64, 64)
    whole = encoder("swin", [1, 2])
    (first,) = recorded(whole.network, ["encoder.layers.0.blocks.1"], images)
    tokens, grid = whole(images)
    assert grid == (16, 16)
    assert tokens[..., :16].equal(first)


@pytest.mark.parametrize("layers", [[0, 2], [1, 3], [-1]])
def test_layers_that_do_not_exist(layers: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"model\.vision\.layers=.*: the layers of this encoder are 1 to 2"):
        encoder("dinov3_vit", layers)


def test_layers_are_listed_once_and_in_order() -> None:
    for layers in ([2, 1], [1, 1]):
        with pytest.raises(ValueError, match="list each layer once, in increasing order"):
            encoder("dinov3_vit", layers)


def test_no_layer_is_trained_in_vain() -> None:
    with pytest.raises(ConfigError, match=r"lacks the last layer, 2: layers after 1 would not be trained"):
        encoder("dinov3_vit", [1], frozen=False)
    assert encoder("dinov3_vit", [1], frozen=True).width == 32


def test_the_projection_keeps_lengths_and_random_numbers() -> None:
    def random_state() -> bytes:
        numpy_state = np.random.get_state()  # noqa: NPY002
        return pickle.dumps((random.getstate(), numpy_state, torch.get_rng_state()))

    before = random_state()
    matrix = fixed_projection(96, 24)
    assert random_state() == before
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(24), rtol=0, atol=1e-6)
    assert fixed_projection(96, 24).equal(matrix)
    torch.testing.assert_close(matrix[0, :3], torch.tensor([0.17123190, 0.22031908, -0.15665679]), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match=r"model\.vision\.mixed_width=97 exceeds the 96 channels"):
        fixed_projection(96, 97)


def mixed() -> RecConfig:
    config = RecConfig.tiny()
    architecture = vision("dinov3_vit")
    return replace(config, vision=VisionEncoderConfig(architecture=architecture, layers=[1, 2], mixed_width=24))


def test_the_projection_is_saved_and_not_trained(tmp_path: Path) -> None:
    config = mixed()
    model = config.build()
    plain = replace(config, vision=replace(config.vision, mixed_width=None)).build()
    images = torch.randn(2, 3, 32, 32)
    wide, narrow = plain.encode_images(images)[0], model.encode_images(images)[0]
    assert (wide.shape, narrow.shape) == ((2, 17, 64), (2, 17, 24))
    assert model.head.vision_projection.in_features == 24
    assert all("mix" not in name for name, _ in model.named_parameters())
    assert model.num_parameters() == plain.num_parameters() - 40 * config.head.width
    model.mix.neg_()  # as if another version had drawn it
    write_model(tmp_path, model, ModelOnlyConfig(config))
    read, _ = read_model(tmp_path)
    assert read.mix.equal(model.mix)

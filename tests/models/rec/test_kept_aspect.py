"""Images that keep their aspect ratio: their sizes, features and positions, and padding that has no effect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import TEXT
from tests.models.rec.test_encoders import vision
from vg.data.collate import Collator
from vg.errors import ConfigError
from vg.export.networks import networks
from vg.inference.torch_backend import TorchBackend
from vg.models.encoder_types import SIGLIP_VISION, VISION_TYPES
from vg.models.rec import heads
from vg.models.rec.config import (
    BgeConfig,
    DenseHeadConfig,
    DenseLossConfig,
    PooledHeadConfig,
    RecConfig,
    VisionEncoderConfig,
)
from vg.models.rec.kept_aspect import KeptAspectImage
from vg.models.rec.layers import padded_centers, token_centers
from vg.models.rec.model import RecModel
from vg.models.rec.vision import VisionEncoder
from vg.types import Batch, Features, Sample

SIZES = {"width": 32, "layers": 2, "heads": 2, "feedforward": 48, "dropout": 0.0}
HEADS = {
    "pooled": PooledHeadConfig(**SIZES),
    "dense": DenseHeadConfig(**SIZES, num_boxes=6, loss=DenseLossConfig(diou=1, l1=1, giou=1)),
}
all_heads = pytest.mark.parametrize("head", HEADS)
IMAGES = ((60, 80), (80, 60), (64, 64), (30, 100), (50, 66), (8, 200))  # height, width


def build(head: str, model_type: str = "dinov3_vit", **settings: Any) -> RecModel:
    torch.manual_seed(0)
    config = RecConfig(
        image_size=64,
        keep_aspect=True,
        vision=VisionEncoderConfig(architecture=vision(model_type), **settings),
        text=BgeConfig(architecture=TEXT),
        head=HEADS[head],
    )
    return config.build().eval()


def some_samples(sizes: Sequence[tuple[int, int]] = IMAGES) -> list[Sample]:
    random = np.random.default_rng(0)
    return [
        Sample(
            id=str(index),
            image=random.integers(0, 256, (height, width, 3), dtype=np.uint8),
            phrases=("the red star" if index % 2 else "big square on the right",),
            boxes=np.array([[0.3 * width, 0.2 * height, 0.7 * width, 0.9 * height]], np.float32),
            phrase_ids=np.zeros(1, np.int64),
        )
        for index, (height, width) in enumerate(sizes)
    ]


def batch_of(model: RecModel, samples: Sequence[Sample]) -> Batch:
    return Collator(model.image_spec, model.text_spec)(samples)


@pytest.mark.parametrize(
    ("size", "side", "stride", "expected"),
    [
        ((480, 640), 448, 16, (24, 32)),
        ((640, 480), 448, 16, (32, 24)),
        ((427, 640), 448, 16, (23, 34)),
        ((500, 500), 448, 16, (28, 28)),
        ((1, 1), 450, 16, (28, 28)),
        ((480, 640), 518, 14, (32, 42)),
        ((480, 640), 672, 32, (18, 24)),
        ((10, 10_000), 448, 16, (1, 784)),
        ((10_000, 10), 64, 32, (4, 1)),
    ],
)
def test_sizes(size: tuple[int, int], side: int, stride: int, expected: tuple[int, int]) -> None:
    assert KeptAspectImage(side, stride).resized(*size) == tuple(cells * stride for cells in expected)


def test_sizes_use_the_area_and_keep_the_aspect_ratio() -> None:
    for height in range(100, 700, 37):
        for width in range(100, 700, 41):
            rows, columns = (side / 16 for side in KeptAspectImage(448, 16).resized(height, width))
            assert rows == int(rows)
            assert columns == int(columns)
            assert 0.9 * 784 < rows * columns <= 784
            assert abs(math.log(columns / rows * height / width)) < 0.08


def test_features_do_not_depend_on_the_batch() -> None:
    model = build("dense")
    batch = batch_of(model, some_samples())
    assert len(set(batch.sizes)) == 5
    with torch.no_grad():
        features = model.encode(batch)
        assert features.grids == tuple((height // 8, width // 8) for height, width in batch.sizes)
        assert features.grid == (8, 8)
        assert features.image.shape == (6, 1 + 64, 32)
        for index, ((height, width), (rows, columns)) in enumerate(zip(batch.sizes, features.grids, strict=True)):
            image = batch.images[index : index + 1, :, :height, :width]
            expected = model.vision.network(pixel_values=image).last_hidden_state[0]
            end = 1 + rows * columns
            torch.testing.assert_close(features.image[index, :end], expected, rtol=0, atol=2e-6)
            assert not features.image[index, end:].any()


@pytest.mark.parametrize("layers", [None, [1, 2]])
@pytest.mark.parametrize("model_type", VISION_TYPES)
def test_every_encoder(model_type: str, layers: list[int] | None) -> None:
    model = build("dense", model_type, layers=layers)
    stride = model.vision.stride
    assert stride == 8
    samples = some_samples()
    with torch.no_grad():
        features = model.encode(batch_of(model, samples))
        cell = 4 if layers and hasattr(model.vision.network_config, "depths") else 8
        assert features.grids is not None
        assert features.grids[:3] == ((56 // cell, 72 // cell), (72 // cell, 56 // cell), (64 // cell, 64 // cell))
        for index in range(6):
            alone = model.encode(batch_of(model, samples[index : index + 1]))
            assert (alone.grids, alone.grid) == (None, features.grids[index])
            expected = alone.image[0]
            torch.testing.assert_close(features.image[index, : len(expected)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "dinov2", *SIGLIP_VISION, "vit"])
def test_learned_positions_are_interpolated_along_the_right_axis(model_type: str) -> None:
    """With positions that depend on the row only, the tokens of a row are equal."""
    torch.manual_seed(0)
    encoder = VisionEncoder(VisionEncoderConfig(architecture=vision(model_type)), pretrained=False)
    name = next(name for name, _ in encoder.named_parameters() if "position_embedding" in name)
    positions = encoder.get_parameter(name)
    table = positions.view(-1, 32)[-16:].view(4, 4, 32)
    with torch.no_grad():
        table.copy_(torch.randn(4, 1, 32).expand(4, 4, 32))
        tokens, grid = encoder(torch.zeros(1, 3, 24, 64))
    assert grid == (3, 8)
    cells = tokens[0, -24:].unflatten(0, grid)
    torch.testing.assert_close(cells, cells[:, :1].expand_as(cells), rtol=0, atol=2e-5)
    assert (cells[0, 0] - cells[1, 0]).abs().max() > 1e-2


VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
FULL_SIZE = {  # architecture, parameters, (stride of the last layer, of the first selected one)
    "dinov3_vit": (VIT | {"num_register_tokens": 4}, 85_660_416, (16, 16)),
    "dinov3_convnext": ({"hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]}, 87_566_464, (32, 8)),
    "dinov2": (VIT | {"patch_size": 14, "image_size": 518}, 86_580_480, (14, 14)),
    "clip_vision_model": (VIT | {"patch_size": 16}, 85_799_424, (16, 16)),
    "siglip_vision_model": (VIT | {"patch_size": 16, "image_size": 224}, 92_884_224, (16, 16)),
    "siglip2_vision_model": (VIT, 92_930_304, (16, 16)),
    "vit": (VIT, 86_389_248, (16, 16)),
    "swin": ({"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}, 86_743_224, (32, 8)),
}


@pytest.mark.parametrize("model_type", FULL_SIZE)
def test_full_size_encoders_at_high_resolution(model_type: str) -> None:
    """Base models as published, without values: parameters, and tokens of images that are not square."""
    architecture, parameters, (stride, finest) = FULL_SIZE[model_type]
    layers = [2, 3, 4] if "depths" in architecture else [3, 6, 9, 12]
    config = VisionEncoderConfig(architecture=architecture | {"model_type": model_type}, layers=layers)
    with torch.device("meta"), torch.no_grad():
        encoder = VisionEncoder(config, pretrained=False)
        assert sum(p.numel() for p in encoder.parameters()) == parameters
        for side in (448, 512, 672):
            height, width = KeptAspectImage(side, stride).resized(640, 480)
            assert height > width
            tokens, grid = encoder(torch.zeros(2, 3, height, width))
            assert grid == (height // finest, width // finest)
            prefix = ({"dinov3_vit": 5, "swin": 0} | dict.fromkeys(SIGLIP_VISION, 0)).get(model_type, 1)
            assert tokens.shape == (2, prefix + grid[0] * grid[1], encoder.width)
    assert encoder.width == (256 + 512 + 1024 if stride == 32 else 4 * 768)


def outputs(model: RecModel, samples: Sequence[Sample]) -> tuple[Any, list[Any], dict[str, Tensor]]:
    batch = batch_of(model, samples)
    output = model(batch)
    return output, model.predict(output, batch), {str(k): v for k, v in model.loss(output, batch).items()}


@all_heads
def test_predictions_and_losses_do_not_depend_on_the_batch(head: str) -> None:
    model, samples = build(head), some_samples()
    _, together, loss = outputs(model, samples)
    alone = [outputs(model, [sample]) for sample in samples]
    for name, value in loss.items():
        torch.testing.assert_close(value, torch.stack([losses[name] for *_, losses in alone]).mean())
    for found, (_, (expected,), _) in zip(together, alone, strict=True):
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


@all_heads
def test_expressions_that_share_an_image(head: str) -> None:
    """The same predictions and gradients as with a copy of the image for each."""
    samples = [sample for sample in some_samples() for _ in range(2)]
    samples = [replace(sample, phrases=(("left", "top")[n % 2],)) for n, sample in enumerate(samples)]
    results = []
    for shared in (True, False):
        model = build(head)
        order = [samples[n] for n in (3, 0, 2, 1, 5, 4, 11, 6)]
        order = order if shared else [replace(sample, image=sample.image.copy()) for sample in order]
        batch = batch_of(model, order)
        assert (len(batch.images), len(batch.text.mask)) == (5 if shared else 8, 8)
        loss = torch.stack(list(model.loss(model(batch), batch).values())).sum()
        loss.backward()
        results.append((loss, [p.grad for p in model.head.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@all_heads
def test_padding_has_no_effect(head: str) -> None:
    model = build(head)
    with torch.no_grad():
        features = model.encode(batch_of(model, some_samples()))
        expected = model.decode(features)
        noise = features.image.clone()
        for image, (rows, columns) in zip(noise, features.grids or (), strict=True):
            image[1 + rows * columns :] = 1e3
        for one, other in zip(model.decode(features._replace(image=noise)), expected, strict=True):
            assert one.equal(other)


def test_padding_is_never_scored_positive_or_predicted() -> None:
    """An image of three tokens among larger ones, with a head that returns six boxes."""
    model = build("dense")
    grids = ((3, 1), (8, 8), (5, 12))
    features = Features(
        image=torch.randn(3, 1 + 64, 32),
        grid=(8, 8),
        text=torch.randn(3, 4, 32),
        text_mask=torch.ones(3, 4, dtype=torch.bool),
        image_ids=torch.arange(3),
        grids=grids,
    )
    output = model.decode(features)
    cells = [3, 64, 60]
    probability = output.logits.softmax(dim=1)
    target = torch.tensor([[0.5, 0.5, 1e-3, 1e-3], [0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0]])
    positive = model.head.positive_tokens(output.centers, target)
    assert positive.sum(dim=1).tolist() == [1, 64, 60]
    for row, count in enumerate(cells):
        assert not probability[row, count:].any()
        assert not positive[row, count:].any()
        assert torch.equal(output.centers[row, :count], token_centers(grids[row]))
    boxes, scores = model.head.select_boxes(output)
    assert boxes.shape == (3, 6, 4)
    assert (scores[0, 3:] == 0).all()
    own = torch.cdist(boxes[0, :3], output.boxes[0, :3]).min(dim=1).values
    assert (own == 0).all()
    assert (scores[1:] > 0).all()


def test_centers_of_several_grids() -> None:
    centers, mask = padded_centers([(1, 2), (2, 2), (1, 2)])
    assert centers.shape == (3, 4, 2)
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [True, True, False, False]]
    assert centers[0, :2].equal(token_centers((1, 2)))
    assert centers[1].equal(token_centers((2, 2)))


@all_heads
def test_images_of_one_shape_need_no_mask(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("a mask is made")

    monkeypatch.setattr(heads, "padded_centers", forbidden)
    model = build(head)
    _, predictions, _ = outputs(model, some_samples([(60, 80), (30, 40), (600, 800)]))
    assert len(predictions) == 3


@all_heads
def test_every_parameter_is_trained_in_mixed_precision(head: str) -> None:
    model = build(head).train()
    batch = batch_of(model, some_samples())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
    sum(model.loss(type(output)(*(x.float() for x in output)), batch).values()).backward()
    assert [n for n, p in model.head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_one_size_per_batch() -> None:
    model = build("dense")
    batch = Collator(model.image_spec, model.text_spec, one_size=True)(some_samples())
    assert set(batch.sizes) == {model.image_spec.resized(50, 66)}
    assert model.encode(batch).grids is None


@pytest.mark.parametrize("keep_aspect", [True, False])
@pytest.mark.parametrize(("size", "nearest"), [(7, "8"), (63, "56 or 64")])
def test_an_image_has_whole_tokens(size: int, nearest: str, keep_aspect: bool) -> None:
    """The encoder does not see the remainder, and the head would take the cells for the whole image."""
    config = replace(RecConfig.tiny(), image_size=size, keep_aspect=keep_aspect)
    message = rf"image_size={size} is not a multiple of the stride of the encoder, 8 pixels; set it to {nearest}$"
    with pytest.raises(ConfigError, match=message):
        config.build()


def test_it_is_not_exported() -> None:
    with pytest.raises(ConfigError, match=r"model\.keep_aspect=true cannot be exported yet"):
        networks(build("dense"))


@all_heads
def test_images_of_several_shapes_are_predicted_in_one_pass(head: str) -> None:
    backend = TorchBackend(build(head), "cpu")
    images = [sample.image for sample in some_samples()]
    together = backend.predict(backend.prepare(images, [("left", "top")] * len(images)))
    for image, found in zip(images, together, strict=True):
        (expected,) = backend.predict(backend.prepare([image], [("left", "top")]))
        assert found.phrase_ids.tolist() == expected.phrase_ids.tolist()
        np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-5)

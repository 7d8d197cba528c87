"""Expressions of one image share its keys and values, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vg.models import encoders
from vg.models.rec.config import DenseHeadConfig, HeadConfig, PooledHeadConfig
from vg.models.rec.layers import index_in_group
from vg.models.settings import EncoderConfig, TextEncoderConfig
from vg.types import Features

GRID = (3, 4)
IMAGE_IDS = torch.tensor([1, 0, 1, 2, 1, 0])  # in any order, groups of different sizes
HEADS = {
    "pooled": PooledHeadConfig(width=32, layers=2, heads=2, feedforward=64, dropout=0.0),
    "dense": DenseHeadConfig(width=32, layers=2, heads=2, feedforward=64, dropout=0.0),
}


def head_input(num_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return image tokens [B, S, D], text tokens [R, T, D] and their mask [R, T]."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(num_images, 5 + GRID[0] * GRID[1], 24, generator=generator)
    text = torch.randn(len(IMAGE_IDS), 7, 16, generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 2, 7, 4]).unsqueeze(1)
    return image, text, mask


def build(config: HeadConfig) -> nn.Module:
    torch.manual_seed(1)
    return config.build(24, 16)


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS)
def test_shared_images_give_the_same_loss_and_gradients(config: HeadConfig) -> None:
    image, text, mask = head_input(3)
    target = torch.rand(6, 1, 4, generator=torch.Generator().manual_seed(2)) * 0.4 + 0.3
    results = []
    for shared in (False, True):
        head = build(config).double()
        leaves = image.double().requires_grad_(), text.double().requires_grad_()
        if shared:
            output = head(Features(leaves[0], GRID, leaves[1], mask, IMAGE_IDS))
        else:
            output = head(Features(leaves[0][IMAGE_IDS], GRID, leaves[1], mask))
        losses = head.loss(output, target.double(), torch.ones(6, 1, dtype=torch.bool))
        torch.stack(list(losses.values())).sum().backward()
        gradients = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
        results.append((output._asdict(), losses, gradients, [leaf.grad for leaf in leaves]))
    assert results[0][2]
    assert results[0][3][0].abs().sum() > 0
    # Rotations and boxes of the dense head are computed in float32 whatever the weights are.
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_keys_and_values_of_an_image_are_computed_once() -> None:
    head = build(HEADS["pooled"])
    seen = []
    for layer in head.decoder.layers:
        layer.multihead_attn.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1].shape[0]))
    image, text, mask = head_input(3)
    head(Features(image, GRID, text, mask, IMAGE_IDS))
    assert seen == [3, 3]


@pytest.mark.parametrize("training", [False, True])
def test_without_sharing_the_decoder_equals_that_of_torch_bit_for_bit(training: bool) -> None:
    config = PooledHeadConfig(width=32, layers=2, heads=2, feedforward=64, dropout=0.1)
    head = build(config).train(training)
    layer = nn.TransformerDecoderLayer(32, 2, 64, 0.1, batch_first=True)
    published = nn.TransformerDecoder(layer, 2).train(training)
    published.load_state_dict(head.decoder.state_dict())
    image, text, mask = head_input(6)
    states = []
    head.norm.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    torch.manual_seed(3)
    head(Features(image, GRID, text, mask))
    torch.manual_seed(3)
    x = published(head.text_projection(text), head.vision_projection(image), tgt_key_padding_mask=~mask)
    assert states[0].equal((x * (mask / mask.sum(dim=1, keepdim=True)).unsqueeze(-1)).sum(dim=1))


def test_index_in_group() -> None:
    assert index_in_group(IMAGE_IDS).tolist() == [0, 0, 1, 0, 2, 1]


def test_the_key_of_a_hub_id_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files at a commit of the Hub never change, so the weights are identified without a download."""
    requests = []

    def download(id: str, file: str, revision: str | None) -> str:
        requests.append((id, file, revision))
        return str(tmp_path / "snapshots" / "abc123" / file)

    monkeypatch.setattr(encoders, "hf_hub_download", download)
    key = encoders.weights_key("model.vision", EncoderConfig(id="somebody/encoder", revision="main"))
    assert key == {"id": "somebody/encoder", "revision": "main", "weights": "abc123"}
    assert encoders.tokenizer_key(TextEncoderConfig(id="somebody/words", revision="v2")) == "abc123"
    assert requests == [("somebody/encoder", "config.json", "main"), ("somebody/words", "config.json", "v2")]

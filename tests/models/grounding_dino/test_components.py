"""Components of Grounding DINO against straightforward implementations of their equations."""

from __future__ import annotations

import math
from pkgutil import resolve_name

import pytest
import torch
from torch import Tensor

from tests.models.grounding_dino.tiny import tiny_config
from vg.models import grounding_dino as package
from vg.models.grounding_dino.attention import drop_path, inverse_sigmoid
from vg.models.grounding_dino.config import BertConfig, ClassHeadConfig, GroundingDinoConfig
from vg.models.grounding_dino.feature_enhancer import FusionLayer, GatedFusionLayer
from vg.models.grounding_dino.heads import ClassHead
from vg.models.grounding_dino.text_encoder import TextEncoder, TextFeatures
from vg.models.settings import TINY_BERT

B, S, T, D = 2, 30, 7, 64


def streams() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image [B, S, D] and text [B, T, D] with the masks of a batch in which the second row is padded."""
    torch.manual_seed(0)
    image_mask, text_mask = torch.ones(B, S, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    image_mask[1, 20:], text_mask[1, 4:] = False, False
    return torch.randn(B, S, D), torch.randn(B, T, D), image_mask, text_mask


def randomized(layer: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    for weights in layer.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    return layer.eval()


def reference_attention(
    layer: FusionLayer, image: Tensor, text: Tensor, image_mask: Tensor, text_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The attention of the fusion layer with the matrix products in the published order."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # [B, heads, S or T, d]

    query, key = heads(layer.image_query(image)), heads(layer.text_key(text))
    scores = query @ key.mT / math.sqrt(query.shape[-1])  # [B, heads, S, T]
    over_text = scores.masked_fill(~text_mask[:, None, None], -torch.inf).softmax(dim=-1)
    over_image = scores.mT.masked_fill(~image_mask[:, None, None], -torch.inf).softmax(dim=-1)
    to_image = over_text @ heads(layer.text_value(text))
    to_text = over_image @ heads(layer.image_value(image))
    return (
        layer.image_output(to_image.transpose(1, 2).flatten(2)),
        layer.text_output(to_text.transpose(1, 2).flatten(2)),
    )


def test_folded_fusion_attention_equals_the_published_order() -> None:
    layer = randomized(FusionLayer(tiny_config())).double()
    image, text, *masks = streams()
    image, text = image.double(), text.double()
    for found, wanted, mask in zip(
        layer.attend(image, text, *masks), reference_attention(layer, image, text, *masks), masks, strict=True
    ):
        assert (found - wanted)[mask].abs().max() < 1e-12  # padding is undefined
        assert found.isfinite().all()


def test_gradients_of_folded_fusion_attention_equal_the_published_order() -> None:
    layer = randomized(FusionLayer(tiny_config())).double()
    image, text, *masks = streams()
    image, text = image.double(), text.double()
    gradients = []
    for attend in (layer.attend, lambda *inputs: reference_attention(layer, *inputs)):
        outputs = attend(image, text, *masks)
        layer.zero_grad()
        sum((x[mask] ** 2).sum() for x, mask in zip(outputs, masks, strict=True)).backward()
        gradients.append({name: p.grad for name, p in layer.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-9, atol=1e-9), name


def test_the_fusion_residual_is_the_normalized_stream() -> None:
    layer = FusionLayer(tiny_config()).eval()
    torch.nn.init.zeros_(layer.image_gate)
    torch.nn.init.zeros_(layer.text_gate)
    image, text, *masks = streams()
    found_image, found_text = layer(image, text, *masks)
    assert torch.equal(found_image, layer.image_norm(image))
    assert torch.equal(found_text, layer.text_norm(text))


@pytest.mark.parametrize(("logit", "kept"), [(50.0, 1.0), (-50.0, 0.0), (0.0, 0.5)])
def test_gated_fusion_interpolates(logit: float, kept: float) -> None:
    """alpha * own + (1 - alpha) * attended, with alpha = sigmoid(logit) here."""
    layer = randomized(GatedFusionLayer(tiny_config()))
    for gate in (layer.image_alpha, layer.text_alpha):
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.constant_(gate.bias, logit)
    image, text, *masks = streams()
    own = layer.image_norm(image), layer.text_norm(text)
    attended = layer.attend(*own, *masks)
    for found, x, other, mask in zip(layer(image, text, *masks), own, attended, masks, strict=True):
        assert torch.allclose(found[mask], (kept * x + (1 - kept) * other)[mask], atol=1e-5)


def text_features(tokens: Tensor, mask: Tensor) -> TextFeatures:
    return TextFeatures(tokens, torch.zeros_like(tokens), torch.ones(B, T, T, dtype=torch.bool), mask)


def test_class_heads() -> None:
    image, tokens, _, mask = streams()
    text = text_features(tokens, mask)
    dot = image @ tokens.mT
    padded = ~mask.unsqueeze(1).expand_as(dot)
    heads = {
        "dot": (ClassHeadConfig(), dot),
        "mm": (ClassHeadConfig(scale="width", bias=True), dot / math.sqrt(D) - math.log(99)),
        "learned": (ClassHeadConfig(scale="learned"), dot),
        "cosine": (
            ClassHeadConfig(similarity="cosine", scale="learned"),
            torch.nn.functional.cosine_similarity(image.unsqueeze(2), tokens.unsqueeze(1), dim=-1) / 0.07,
        ),
    }
    for name, (config, wanted) in heads.items():
        found = ClassHead(config, D)(image, text)
        assert torch.allclose(found, wanted.masked_fill(padded, -torch.inf), rtol=1e-4, atol=1e-4), name


def test_cosine_similarity_ignores_lengths() -> None:
    image, tokens, _, mask = streams()
    head = ClassHead(ClassHeadConfig(similarity="cosine", scale="learned"), D)
    first, second = head(image, text_features(tokens, mask)), head(3 * image, text_features(5 * tokens, mask))
    assert torch.allclose(first, second, atol=1e-5)
    assert first[first.isfinite()].abs().max() <= 1 / 0.07


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    x = drop_path(torch.ones(4000, 3, 2), 0.25, training=True)
    assert x.flatten(1).std(dim=1).max() == 0
    assert x.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert float(x.mean()) == pytest.approx(1, abs=0.03)
    assert drop_path(x, 0.25, training=False) is x


@pytest.mark.parametrize("layer_type", [FusionLayer, GatedFusionLayer])
def test_drop_path_of_fusion_keeps_the_own_stream(layer_type: type[FusionLayer]) -> None:
    layer = randomized(layer_type(tiny_config(fusion_drop_path=0.999))).train()
    image, text, image_mask, text_mask = streams()
    torch.testing.assert_close(layer(image, text, image_mask, text_mask)[0], layer.image_norm(image))


def test_inverse_sigmoid_at_the_border() -> None:
    x = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    assert inverse_sigmoid(x, 1e-3).tolist() == pytest.approx([math.log(1e-3), math.log(0.3 / 0.7), math.log(1e3)])
    assert inverse_sigmoid(x, 1e-5)[0] == pytest.approx(-11.5129, abs=1e-4)


def test_the_table_of_equations_points_to_existing_code_and_settings() -> None:
    rows = [line.rsplit("|", 3)[1:3] for line in (package.__doc__ or "").splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    for code, setting in rows[1:]:  # without the header
        for name in code.strip().split(", "):
            resolve_name(name if name.startswith("vg.") else f"{package.__name__}.{name}")
        value: object = GroundingDinoConfig()
        for key in setting.strip().partition("=")[0].split(".")[1:]:
            value = getattr(value, key)


def test_eager_attention_of_the_text_encoder_equals_sdpa() -> None:
    ids = torch.tensor([[101, 1035, 1036, 1012, 1037, 1012, 102], [101, 1038, 1012, 102, 0, 0, 0]])
    features = []
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        architecture = TINY_BERT | {"vocab_size": 1040, "attn_implementation": implementation}
        encoder = TextEncoder(BertConfig(architecture=architecture), D, pretrained=False).eval()
        assert encoder.network.config._attn_implementation == implementation
        with torch.no_grad():
            features.append(encoder(ids, ids > 0, (101, 102, 1012)))
    torch.testing.assert_close(features[1].tokens, features[0].tokens, rtol=0, atol=1e-6)

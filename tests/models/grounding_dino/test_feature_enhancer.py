"""The feature enhancer: image tokens in chunks on a CPU, and in bfloat16 under autocast, with equal results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.models.grounding_dino.tiny import tiny_config
from vg.models.grounding_dino import feature_enhancer
from vg.models.grounding_dino.backbone import ImageFeatures
from vg.models.grounding_dino.feature_enhancer import FeatureEnhancer, FusionLayer, ImageNorm, token_chunks
from vg.models.grounding_dino.text_encoder import TextFeatures


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_enhancer, "CHUNK_TOKENS", 8)  # of two images together


def fusion() -> FusionLayer:
    torch.manual_seed(0)
    layer = FusionLayer(tiny_config(width=32)).eval()
    for weights in layer.parameters():
        nn.init.xavier_uniform_(weights) if weights.dim() > 1 else nn.init.uniform_(weights, -0.3, 0.3)
    return layer


def reference_softmax(layer: FusionLayer, image: Tensor, text: Tensor, image_mask: Tensor | None) -> Tensor:
    """Image-to-text attention [R, T, D] with one softmax over all image tokens."""
    query, key, value = (
        projection(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # [R, heads, S or T, d]
        for projection, x in ((layer.text_key, text), (layer.image_query, image), (layer.image_value, image))
    )
    scores = query @ key.mT * query.shape[-1] ** -0.5  # [R, heads, T, S]
    if image_mask is not None:
        scores = scores.masked_fill(~image_mask[:, None, None], -torch.inf)
    return layer.text_output((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_a_chunked_softmax_equals_the_softmax_over_all_tokens(padded: bool, size: float) -> None:
    """Also if one image starts with padding, and if scores differ by more than exp can represent."""
    layer = fusion()
    image, text = size * torch.randn(2, 27, 32), torch.randn(2, 5, 32)
    image_mask = torch.stack((torch.arange(27) >= 9, torch.arange(27) < 20)) if padded else None
    text_mask = torch.arange(5) < torch.tensor([[5], [3]])
    with torch.no_grad():
        assert len(token_chunks(image)) == 7
        to_image, to_text = layer.attend(image, text, image_mask, text_mask)
    whole_image, whole_text = layer.attend(image, text, image_mask, text_mask)  # with gradients: one chunk
    torch.testing.assert_close(to_image, whole_image, atol=1e-5 * size, rtol=1e-5)
    torch.testing.assert_close(to_text, whole_text, atol=1e-5 * size, rtol=1e-5)
    wanted = reference_softmax(layer, image, text, image_mask)
    torch.testing.assert_close(to_text, wanted, atol=2e-5 * size, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_long_prompts_attend_alike_without_scores_in_memory(padded: bool) -> None:
    """Also the values of a row of padding only, in both directions; no batch has one, and its gradient differs."""
    layer = fusion()
    tokens = torch.randn(3, 50, 32, requires_grad=True), torch.randn(3, 70, 32, requires_grad=True)
    image_mask = torch.arange(50) < torch.tensor([[50], [20], [0]]) if padded else None
    text_mask = torch.arange(70) < torch.tensor([[70], [33], [0]])
    results = []
    for attend in (layer.attend_folded, layer.attend_unfolded):
        attended = attend(*tokens, image_mask, text_mask)
        loss = sum((x[:2] * torch.linspace(-1, 1, x[:2].numel()).view_as(x[:2])).sum() for x in attended)
        inputs = [*tokens, *layer.parameters()]
        results.append((*attended, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)))
    for folded, unfolded in zip(*results, strict=True):
        torch.testing.assert_close(unfolded, folded, atol=1e-5, rtol=1e-5)


def test_dropout_of_long_prompts_drops_probabilities() -> None:
    """Dropping all of them leaves the biases; in evaluation none is dropped."""
    layer = fusion()
    tokens, mask = (torch.randn(1, 50, 32), torch.randn(1, 70, 32)), torch.ones(1, 70, dtype=torch.bool)
    kept = layer.attend_unfolded(*tokens, None, mask)
    layer.dropout = 1.0
    torch.testing.assert_close(layer.attend_unfolded(*tokens, None, mask), kept)
    layer.train()
    for own, other in zip(*(f(*tokens, None, mask) for f in (layer.attend_unfolded, layer.attend_folded)), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(
    ("device", "length", "name"),
    [("cuda", 65, "attend_unfolded"), ("cuda", 64, "attend_folded"), ("cpu", 65, "attend_folded")],
)
def test_long_prompts_on_a_gpu(monkeypatch: pytest.MonkeyPatch, device: str, length: int, name: str) -> None:
    layer, called = fusion(), []
    for attend in ("attend_folded", "attend_unfolded"):
        monkeypatch.setattr(layer, attend, lambda *_, attend=attend: called.append(attend))
    with FakeTensorMode():  # which needs no GPU
        layer.attend(torch.empty(1, 50, 32, device=device), torch.empty(1, length, 32, device=device), None, None)
    assert called == [name]


def test_chunks_only_without_gradients() -> None:
    x, mask = torch.randn(2, 27, 3), torch.ones(2, 27, dtype=torch.bool)
    assert len(token_chunks(x)) == 1, "gradients need all activations"
    with torch.no_grad():
        chunks = token_chunks(x, mask)
    assert [chunk.shape[1] for chunk, _ in chunks] == [4] * 6 + [3]
    assert torch.cat([chunk for chunk, _ in chunks], dim=1).equal(x)
    assert torch.cat([inside for _, inside in chunks], dim=1).equal(mask)


def activations(dtype: torch.dtype) -> tuple[Tensor, list[torch.dtype]]:
    """Return image tokens [R, S, D] after the enhancer, and the dtypes of what is kept of this shape for backward."""
    torch.manual_seed(0)
    enhancer = FeatureEnhancer(tiny_config()).train()
    for weights in enhancer.parameters():
        nn.init.xavier_uniform_(weights) if weights.dim() > 1 else nn.init.uniform_(weights, 0.1, 0.5)
    image_tokens, text_tokens = torch.randn(2, 20, 64), torch.randn(2, 5, 64)
    shapes = ((3, 4), (2, 2), (2, 1), (2, 1))
    everything = torch.ones(2, 5, dtype=torch.bool)
    positions, centers = torch.randn(2, 20, 64), torch.rand(2, 20, 2)
    image = ImageFeatures(image_tokens.to(dtype), positions, centers, torch.ones(2, 4, 2), None, shapes)
    text = TextFeatures(text_tokens.to(dtype), positions[:, :5], everything.unsqueeze(1).expand(2, 5, 5), everything)
    kept: list[torch.dtype] = []

    def pack(x: Tensor) -> Tensor:
        if x.shape == image_tokens.shape:
            kept.append(x.dtype)
        return x

    same = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with same, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        enhanced, enhanced_text = enhancer(image, text)
    (enhanced.tokens.sum() + enhanced_text.tokens.sum()).backward()
    assert all(weights.grad is None or weights.grad.dtype == torch.float32 for weights in enhancer.parameters())
    return enhanced.tokens, kept


def test_the_residual_stream_of_the_image_is_bfloat16_under_its_autocast() -> None:
    exact, _ = activations(torch.float32)
    tokens, kept = activations(torch.bfloat16)
    assert tokens.dtype == torch.bfloat16
    assert set(kept) == {torch.bfloat16}
    torch.testing.assert_close(tokens.float(), exact, atol=0.1, rtol=0.05)


def test_the_residual_stream_of_the_image_stays_float32_under_float16() -> None:
    exact, _ = activations(torch.float32)
    tokens, kept = activations(torch.float16)
    assert tokens.dtype == torch.float32
    assert torch.float32 in kept
    torch.testing.assert_close(tokens, exact, atol=0.02, rtol=0.01)


def test_the_image_norm_is_that_of_torch() -> None:
    torch.manual_seed(0)
    norm, x = ImageNorm(64), torch.randn(3, 64)
    nn.init.uniform_(norm.weight)
    assert norm(x).equal(nn.LayerNorm.forward(norm, x))
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), norm(x.bfloat16().float()), atol=0.0, rtol=2**-8)

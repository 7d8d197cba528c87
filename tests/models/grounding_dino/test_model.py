"""The whole Grounding DINO: results do not depend on batch, phrase order or padding; variants; gradients; caching."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.grounding_dino.tiny import batch_of, sample, tiny_config, tiny_model
from vg.config import parse_config
from vg.data.collate import Collator
from vg.errors import ConfigError, PredictionError
from vg.models.base import check_finite
from vg.models.grounding_dino.config import (
    ClassHeadConfig,
    DenoisingConfig,
    ImageConfig,
    PredictConfig,
    ResNetConfig,
    SwinConfig,
)
from vg.models.grounding_dino.model import GroundingDino
from vg.training.optim import OptimConfig, build_optimizer
from vg.types import Prediction

VARIANTS = {
    "published": {},
    "mm": {"shared_heads": False, "classes": ClassHeadConfig(scale="width", bias=True)},
    "five levels": {
        "backbone": SwinConfig(
            stages=[1, 2, 3, 4], width=16, depths=[1, 1, 1, 1], heads=[1, 2, 4, 8], window=3, drop_path=0.0
        ),
        "levels": 5,
    },
    "resnet": {"backbone": ResNetConfig(depths=[1, 1, 1, 1], widths=[8, 16, 32, 64])},
    "cosine": {"classes": ClassHeadConfig(similarity="cosine", scale="learned")},
    "gated": {"fusion": "gated"},
    "two further levels": {"levels": 5},
}


def same(found: Prediction, wanted: Prediction, tolerance: float = 1e-5) -> None:
    """Assert equal boxes and scores for every phrase, in any order among nearly equal scores."""
    assert len(found.boxes) == len(wanted.boxes) > 0
    assert (found.scores - wanted.scores).abs().max() <= tolerance
    for one, other in ((found, wanted), (wanted, found)):
        for box, score, phrase_id in zip(one.boxes, one.scores, one.phrase_ids, strict=True):
            same_phrase = other.phrase_ids == phrase_id
            distance = (other.boxes[same_phrase] - box).abs().amax(dim=1) / 100  # boxes in pixels
            assert (distance + (other.scores[same_phrase] - score).abs()).min() <= 2 * tolerance


@torch.no_grad()
def predict(model: GroundingDino, *samples) -> list[Prediction]:
    batch = batch_of(model, *samples)
    return model.predict(model(batch), batch)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_batch_equals_single_images(settings: dict) -> None:
    model = tiny_model(**settings)
    samples = [
        sample(["a small thing", "dog"], (64, 96), seed=0),
        sample(["hot dog", "dog", "cat on a red chair"], (96, 64), seed=1),
        sample(["left"], (64, 64), seed=2),
        sample(["dog"], (64, 96), seed=3),
    ]
    batched = predict(model, *samples)
    for one, alone in zip(batched, (predict(model, x)[0] for x in samples), strict=True):
        same(one, alone)


def test_padding_leaks_with_mix_sizes() -> None:
    """image.mix_sizes reproduces padded batches of other implementations, so it must have an effect."""
    samples = [sample(["dog"], (64, 96), seed=0), sample(["dog"], (64, 64), seed=1)]
    model = tiny_model(image=ImageConfig(shortest=64, longest=120, mix_sizes=True))
    assert not torch.allclose(predict(model, *samples)[1].scores, predict(model, samples[1])[0].scores, atol=1e-5)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_every_weight_gets_a_gradient(settings: dict) -> None:
    model = tiny_model(**settings, denoising=DenoisingConfig(num_queries=4)).train()
    batch = batch_of(model, sample(["dog", "cat"], boxes=3), sample(["red thing"], (64, 64), seed=1, boxes=1))
    terms = model.loss(model(batch), batch)
    torch.stack(list(terms.values())).sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # The bias of a key shifts all attention logits of a query equally, and the softmax ignores it.
    assert [name for name in without if not name.endswith(("key.bias", "k_proj.bias", "text_key.bias"))] == []


def test_predictions_do_not_depend_on_the_order_of_phrases() -> None:
    """Fifteen phrases, of which one prompt can contain three."""
    names = ["dog", "hot dog", "car", "carrot", "Cat", "cat", "red", "blue", "a big red thing", "star", "box", "st. x"]
    names += ["up", "down", "left"]
    model = tiny_model(max_tokens=12, predict=PredictConfig(top_k=1000))
    forward, backward = predict(model, sample(names))[0], predict(model, sample(names[::-1]))[0]
    assert batch_of(model, sample(names)).text.token_ids.shape[0] > 3
    assert set(forward.phrase_ids.tolist()) == set(range(len(names)))
    for name in names:
        of_forward = forward.scores[forward.phrase_ids == names.index(name)]
        of_backward = backward.scores[backward.phrase_ids == names[::-1].index(name)]
        assert torch.equal(of_forward, of_backward), name
    assert torch.equal(forward.boxes[:10], backward.boxes[:10])


def test_several_prompts_per_image_in_a_batch_equal_single_images() -> None:
    model = tiny_model(max_tokens=8)
    samples = [sample(["dog", "cat", "red", "blue", "star"]), sample(["up"], (64, 64), seed=1), sample(["dog", "box"])]
    for one, alone in zip(predict(model, *samples), (predict(model, x)[0] for x in samples), strict=True):
        same(one, alone)


def test_samples_of_one_image_encode_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(max_tokens=8)
    first, second = sample(["dog", "cat", "red", "blue", "star"]), sample(["up"], (64, 64), seed=1)
    samples = [first, second, replace(first, phrases=("box",)), replace(second, phrases=("left dog", "cat", "red"))]
    alone = [predict(model, x)[0] for x in samples]
    encoded: list[int] = []  # images per call
    encode = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda images: encoded.append(len(images)) or encode(images))
    for one, other in zip(predict(model, *samples), alone, strict=True):
        same(one, other)
    assert sum(encoded) == 2
    batch = Collator(model.image_spec, model.text_spec, one_prompt=True)(samples)
    assert len(batch.images) == 4, "in training"


def test_text_padding_changes_nothing() -> None:
    model = tiny_model()
    alone = predict(model, sample(["dog"]))[0]
    beside = predict(model, sample(["dog"]), sample(["a very long phrase that makes the other row longer"], seed=1))[0]
    same(beside, alone)


def test_small_images_have_fewer_queries() -> None:
    model = tiny_model(image=ImageConfig(shortest=8, longest=16))  # smaller than one window of 3 x 3 tokens of 4 pixels
    batch = batch_of(model, sample(["dog"], (8, 11)))
    with torch.no_grad():
        output = model(batch)
    # 8 x 11 pixels are 2 x 3 patches, so the levels have 1 x 2, 1 x 1, 1 x 1 and 1 x 1 tokens.
    assert output.boxes.shape[2] == output.logits.shape[2] == 5 < model.config.num_queries
    prediction = model.predict(output, batch)[0]
    assert len(prediction.boxes) == 5
    assert prediction.boxes.isfinite().all()


def test_recent_prompts_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    encoded: list[int] = []  # prompts per call
    forward = model.text.forward
    monkeypatch.setattr(model.text, "forward", lambda ids, *rest: encoded.append(len(ids)) or forward(ids, *rest))
    first = predict(model, sample(["dog"]), sample(["dog"], seed=1), sample(["cat"], seed=2))
    assert encoded == [2]
    again = predict(model, sample(["dog"]), sample(["dog"], seed=1), sample(["cat"], seed=2))
    assert encoded == [2]
    same(again[0], first[0], 0)
    with torch.no_grad():
        model.text.projection.weight.mul_(2)
    changed = predict(model, sample(["dog"]))
    assert encoded == [2, 1]
    assert not torch.equal(changed[0].scores, first[0].scores)
    with torch.no_grad():  # as a moving average (EMA) does
        model.text.projection.weight.data = model.text.projection.weight.data / 2
    same(predict(model, sample(["dog"]))[0], first[0])
    assert encoded == [2, 1, 1]
    tokens = torch.tensor([[2, 5, 6, 7, 3]]), torch.ones(1, 5, dtype=torch.bool)
    masks = [model.text.cached(*tokens, delimiters).sub_sentences for delimiters in ((2, 3), (2, 3, 6))]
    assert not torch.equal(*masks), "tokens of other delimiters see each other"


def test_weights_without_versions_are_not_cached() -> None:
    """Tensors that are made in inference mode do not count their changes."""
    with torch.inference_mode():
        model, other = tiny_model(), tiny_model(seed=1)
        before = predict(model, sample(["dog"]))[0]
        model.load_own_state_dict(other.own_state_dict())
        same(predict(model, sample(["dog"]))[0], predict(other, sample(["dog"]))[0], 0)
        assert not torch.equal(predict(model, sample(["dog"]))[0].scores, before.scores)


def test_training_clears_the_prompt_cache() -> None:
    """A fused AdamW changes weights without increasing their version; training and evaluation alternate."""
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    before = predict(model, sample(["dog"]))[0]
    batch = batch_of(model.train(), sample(["dog"], boxes=2))
    torch.stack(list(model.loss(model(batch), batch).values())).sum().backward()
    optimizer.step()
    after = predict(model.eval(), sample(["dog"]))[0]
    uncached = tiny_model()
    uncached.load_state_dict(model.state_dict())
    same(after, predict(uncached, sample(["dog"]))[0], 0)
    assert not torch.equal(after.scores, before.scores)


@torch.no_grad()
def test_a_small_image_in_a_batch_with_a_large_one() -> None:
    """The small image has fewer tokens than there are queries; the rest of its row is padding."""
    model = tiny_model(num_queries=120)
    small, large = sample(["dog"], (64, 64)), sample(["dog", "cat"], (64, 112), seed=1)
    batch = batch_of(model, small, large)
    output = model(batch)
    assert output.logits.shape[2] == 120
    assert int(output.logits[0, 0].isneginf().all(dim=-1).sum()) == 120 - 85  # 8 x 8 + 4 x 4 + 2 x 2 + 1 tokens
    found = model.predict(output, batch)
    for one, alone in zip(found, (predict(model, x)[0] for x in (small, large)), strict=True):
        same(one, alone)


@torch.no_grad()
def test_box_losses_of_a_small_image_in_a_batch_with_a_large_one() -> None:
    """Its 100 boxes are matched with its 85 queries, never with the padding; the large image has no boxes."""
    model = tiny_model(num_queries=120).train()
    small, large = sample(["dog"], (64, 64), boxes=100), sample(["dog"], (64, 112), seed=1)
    batches = batch_of(model, small), batch_of(model, small, large)
    alone, beside = (model.loss(model(batch), batch) for batch in batches)
    for name in alone:
        if name.term != "class":  # the large image has a class loss
            torch.testing.assert_close(beside[name], alone[name], msg=str(name))


def test_gradients_of_a_small_image_in_a_batch_with_a_large_one_are_finite() -> None:
    model = tiny_model(num_queries=120, denoising=DenoisingConfig(num_queries=4)).train()
    batch = batch_of(model, sample(["dog"], (64, 64), boxes=2), sample(["dog", "cat"], (64, 112), seed=1, boxes=3))
    terms = model.loss(model(batch), batch)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_max_scores_do_not_depend_on_the_batch() -> None:
    model = tiny_model(predict=PredictConfig(score="max"))
    one, two = sample(["a big dog"]), sample(["cat", "red"], seed=1)
    for found, alone in zip(predict(model, one, two), (predict(model, x)[0] for x in (one, two)), strict=True):
        same(found, alone)


def test_half_precision_does_not_overflow_with_many_tokens() -> None:
    """A sum over all image tokens overflows float16 if a channel is large everywhere."""
    layer = tiny_model().encoder.layers[0].fusion
    image = torch.full((1, 22_000, 64), -1.0)
    image[..., 0] = 60.0
    with torch.autocast("cpu", torch.float16):
        assert all(x.isfinite().all() for x in layer(image, torch.randn(1, 5, 64), None, torch.ones(1, 5).bool()))


def test_models_can_be_copied() -> None:
    model = tiny_model()
    other = copy.deepcopy(model)
    same(predict(other, sample(["dog"]))[0], predict(model, sample(["dog"]))[0], 0)
    assert other.state_dict().keys() == model.state_dict().keys()


def test_gradient_checkpointing_with_a_resnet() -> None:
    backbone = ResNetConfig(depths=[1, 1, 1, 1], widths=[8, 16, 32, 64])
    model = tiny_model(gradient_checkpointing=True, backbone=backbone).train()
    batch = batch_of(model, sample(["dog"], boxes=1))
    torch.stack(list(model.loss(model(batch), batch).values())).sum().backward()


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(gradient_checkpointing=checkpointing).train()
        batch = batch_of(model, sample(["dog", "cat"], boxes=3))
        torch.stack(list(model.loss(model(batch), batch).values())).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-6)


def test_bfloat16_stays_close() -> None:
    model = tiny_model()
    batch = batch_of(model, sample(["dog", "cat"]))
    with torch.no_grad():
        exact = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch)
    assert half.logits.dtype == half.boxes.dtype == torch.float32
    assert (half.encoder_boxes.sort(dim=1).values - exact.encoder_boxes.sort(dim=1).values).abs().mean() < 0.02


def test_phrase_scores_equal_values_computed_by_hand() -> None:
    from vg.models.grounding_dino.postprocess import phrase_scores

    logits = torch.tensor([[[-1.0, 2.0, 0.5, -torch.inf]]])  # [R, Q, T]
    p = logits.sigmoid()[0, 0]
    tokens = torch.tensor([[[False, True, True, False], [False, False, True, False], [False] * 4]])  # [R, P, T]
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mean, best = (phrase_scores(logits, tokens, mask, score)[0, 0] for score in ("mean", "max"))
    assert torch.allclose(mean, torch.stack(((p[1] + p[2]) / 2, p[2], torch.tensor(-1.0))))
    assert torch.allclose(best, torch.stack((p[1], p[2], torch.tensor(-1.0))))
    everything = torch.tensor([[True, True, True, False]])
    # A single phrase: all tokens of the prompt, as in mmdetection's RefExpMetric.
    single = phrase_scores(logits, tokens[:, 1:2], everything, "max")
    assert torch.allclose(single, p[1])


def test_threshold_top_k_and_nms() -> None:
    plain = predict(tiny_model(), sample(["dog", "cat"]))[0]
    assert torch.equal(plain.scores, plain.scores.sort(descending=True).values)
    best = predict(tiny_model(predict=PredictConfig(top_k=7)), sample(["dog", "cat"]))[0]
    assert torch.equal(best.scores, plain.scores[:7])
    limit = float(plain.scores[4])
    above = predict(tiny_model(predict=PredictConfig(threshold=limit)), sample(["dog", "cat"]))[0]
    assert torch.equal(above.scores, plain.scores[plain.scores >= limit])
    model = tiny_model(predict=PredictConfig(nms=0.3))
    torch.nn.init.constant_(model.decoder.box_heads[0][-1].bias, 2.0)  # large boxes, which overlap
    fewer = predict(model, sample(["dog", "cat"]))[0]
    assert 0 < len(fewer.boxes) < len(plain.boxes)


@pytest.mark.parametrize("train", [False, True])
def test_compiles_without_graph_breaks(train: bool) -> None:
    model = tiny_model(encoder_layers=1, decoder_layers=2).train(train)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for phrases in (["dog"], ["a cat", "red thing"]):  # prompts of different lengths
        batch = batch_of(model, sample(phrases))
        with torch.set_grad_enabled(train):
            close(compiled(batch).logits, model(batch).logits)


@torch.no_grad()
def test_compiles_with_dynamic_sizes() -> None:
    """All but the backbone: transformers' Swin compiles with dynamic sizes, too, but that takes minutes."""
    model = tiny_model(image=ImageConfig(shortest=140, longest=300))
    compiled = torch.compile(model.ground, fullgraph=True, dynamic=True, backend="eager")
    names = ["a dog", "a big cat", "red thing", "box", "star"]
    for size, phrases in (((140, 210), names[:4]), ((250, 140), names[:3]), ((140, 290), names)):
        batch = batch_of(model, sample(phrases, size))
        image, text = model.encode_image(batch), model.encode_text(batch.text)
        close(compiled(image, text).logits, model.ground(image, text).logits)


def close(found: Tensor, wanted: Tensor) -> None:
    assert torch.equal(found.isfinite(), wanted.isfinite())
    assert torch.allclose(found.nan_to_num(neginf=0), wanted.nan_to_num(neginf=0), atol=1e-4)


def test_invalid_settings() -> None:
    for settings, message in (
        ({"heads": 3}, "must be even"),
        ({"width": 40}, "multiple of 32"),
        ({"levels": 2}, "fewer than the 3 stages"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(**settings)
    with pytest.raises(ValueError, match="end with 4"):
        SwinConfig(stages=[1, 2])
    with pytest.raises(ValueError, match="must increase"):
        ResNetConfig(widths=[64, 64, 128, 256])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": {"depths": [2, 2, 6]}}, r"model\.backbone\.depths: .* at least 4 items"),
        ({"backbone": {"heads": [3, 6, 12, 24, 48]}}, r"model\.backbone\.heads: .* at most 4 items"),
        ({"backbone": {"name": "resnet", "widths": [8] * 3}}, r"model\.backbone\.widths: .* at least 4 items"),
        (
            {"backbone": {"heads": [3, 6, 12, 25]}},
            r"model\.backbone.*: .*heads \(\[3, 6, 12, 25\]\) must divide the widths of the stages "
            r"\(\[96, 192, 384, 768\]\)",
        ),
        ({"position_temperature": 0}, r"model\.position_temperature: .* greater than 0"),
        ({"image": {"std": [0.2, 0, 0.2]}}, r"model\.image\.std\.1: .* greater than 0"),
        ({"classes": {"similarity": "cosine"}}, r"model\.classes: .*cosine needs scale=learned, not one: .* too small"),
        (
            {"classes": {"similarity": "cosine", "scale": "width", "bias": True}},
            r"model\.classes: .*needs scale=learned, not width",
        ),
        ({"loss": {"encoder": 0}}, r"model\.loss\.encoder: .* greater than 0"),
        ({"loss": {"l1": 0, "giou": 0}}, r"model\.loss: .*give one of diou, l1, giou a positive weight"),
        ({"loss": {"class_weight": 0}}, r"model\.loss: .*class_weight must be positive"),
    ],
)
def test_settings_without_a_meaning_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    data = {"train": {"name": "shapes"}, "eval": {"name": "shapes"}}
    if "backbone" in settings:
        settings = {"backbone": {"name": "swin"} | settings["backbone"]}
    with pytest.raises(ConfigError, match=message):
        parse_config({"model": {"name": "grounding_dino"} | settings, "data": data})


@pytest.mark.parametrize("name", ["neck.projections.0.0", "encoder.layers.0.fusion.image_norm", "queries.memory_norm"])
def test_nan_is_not_padding(name: str) -> None:
    """In a batch with padding, whose tokens are left out by their scores."""
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(f"{name}.weight")[0] = torch.nan
    predictions = predict(model, sample(("dog",), size=(100, 100)), sample(("dog",), size=(60, 110)))
    with pytest.raises(PredictionError, match="not finite"):
        check_finite(predictions, model)

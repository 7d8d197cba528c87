"""The head for no object, one, or several: positive tokens, losses, calibration, ranking, and the model around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cache.feature_data import cached_config, write_encoders, write_expressions
from tests.models.rec.test_heads import SIZES, TEXT_WIDTH, VISION_WIDTH, rows_of, tokens
from vg import boxes as box_ops
from vg.cache.build import build_cache
from vg.data.collate import Collator
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import ConfigError
from vg.models.rec.any_objects import MAX_POSITIVES, AnyObjectsHead
from vg.models.rec.config import DenseHeadConfig, DenseLossConfig, PooledHeadConfig, RecConfig
from vg.models.rec.heads import DenseHead, DenseOutput
from vg.models.rec.layers import token_centers
from vg.models.rec.model import RecModel
from vg.training.trainer import Trainer
from vg.types import Batch

CONFIG = DenseHeadConfig(**SIZES, objects="any", num_boxes=4, loss=DenseLossConfig(diou=1))


def build(config: DenseHeadConfig = CONFIG) -> AnyObjectsHead:
    torch.manual_seed(0)
    head = config.build(VISION_WIDTH, TEXT_WIDTH)
    assert isinstance(head, AnyObjectsHead)
    return head


def targets() -> tuple[Tensor, Tensor]:
    """Return the boxes of four expressions with two objects, none, one and none, and their mask."""
    boxes = torch.tensor([[[0.3, 0.3, 0.3, 0.4], [0.8, 0.7, 0.2, 0.3]], [[0.5] * 4] * 2, [[0.6, 0.5, 0.4, 0.4]] * 2])
    mask = torch.tensor([[True, True], [False, False], [True, False], [False, False]])
    return torch.cat((boxes, boxes[1:2])), mask


def small_model() -> RecModel:
    torch.manual_seed(0)
    config = RecConfig.tiny()
    assert isinstance(config.head, DenseHeadConfig)
    return replace(config, head=replace(config.head, objects="any")).build(pretrained=False)


def generalized_batch(model: RecModel, size: int = 8) -> Batch:
    source = ShapesConfig(split="val", image_size=64, kinds=("absent", "several", "attribute")).build()
    return Collator(model.image_spec, model.text_spec)([source.load(index, 0) for index in range(size)])


def test_every_parameter_has_a_gradient_and_padding_no_effect() -> None:
    head, (boxes, mask) = build(), targets()
    losses = head.loss(head(tokens()), boxes, mask)
    assert set(losses) == {"token", "diou", "l1", "giou"}
    sum(losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []
    other = head.loss(head(tokens()), boxes.masked_fill(~mask.unsqueeze(-1), 0.9), mask)
    torch.testing.assert_close(other, losses)


def test_loss_is_the_mean_over_expressions_with_and_without_objects() -> None:
    head, (boxes, mask) = build(), targets()

    def loss(rows: slice, most: int) -> dict[str, Tensor]:
        return head.loss(head(rows_of(tokens(), rows)), boxes[rows, :most], mask[rows, :most])

    single = [loss(slice(0, 1), 2), loss(slice(1, 2), 0), loss(slice(2, 3), 1), loss(slice(3, 4), 0)]
    for name, value in loss(slice(4), 2).items():
        torch.testing.assert_close(sum(terms[name] for terms in single) / 4, value)
    assert single[1]["token"] > 0, "an absent expression contributes"
    assert single[1]["l1"] == single[1]["giou"] == 0


@pytest.mark.parametrize(
    ("box", "expected", "count"),
    [
        ((0.25, 1 / 3, 0.3, 0.4), {0, 1, 4, 5}, 4),  # as with one object ...
        ((0.98, 0.98, 0.02, 0.02), {11}, 1),  # ... also between centers: the nearest one
        ((0.5, 0.5, 1.0, 1.0), {1, 2, 4, 5, 6, 7, 9, 10}, MAX_POSITIVES),  # the whole image: these and a corner
    ],
)
def test_positive_tokens(box: tuple[float, ...], expected: set[int], count: int) -> None:
    target, mask = torch.tensor([[box, box]]), torch.tensor([[True, False]])
    positive = AnyObjectsHead.positive_tokens_of_many(token_centers((3, 4)), target, mask)
    assert positive.shape == (1, 2, 12)
    assert expected <= set(positive[0, 0].nonzero().flatten().tolist())
    assert positive[0, 0].sum() == count
    assert not positive[0, 1].any(), "padding"


def test_a_token_of_two_objects_predicts_the_smaller_one() -> None:
    head, centers = build(), token_centers((3, 4))
    large, small = torch.tensor([0.375, 0.5, 0.7, 0.9]), torch.tensor([0.375, 0.5, 0.2, 0.3])
    boxes, mask = torch.stack((large, small)).unsqueeze(0), torch.ones(1, 2, dtype=torch.bool)
    positive = AnyObjectsHead.positive_tokens_of_many(centers, boxes, mask)[0]
    assert (positive[0] & positive[1]).any()
    perfect = torch.where(positive[1].unsqueeze(-1), small, large).unsqueeze(0)
    losses = head.loss(DenseOutput(torch.zeros(1, 12), perfect, centers), boxes, mask)
    assert losses["l1"] == 0
    torch.testing.assert_close(losses["token"], torch.tensor(12 * np.log(2)).float())


def test_the_least_loss_is_that_of_the_frequency() -> None:
    """A proper scoring rule: of 4 equal expressions one has an object, so that 1/4 is the best probability."""
    head, centers = build(), token_centers((3, 4))
    boxes = torch.tensor([0.375, 0.5, 0.2, 0.3]).expand(4, 1, 4)
    mask = torch.tensor([[True], [False], [False], [False]])
    logit = torch.zeros(1, 12, requires_grad=True)
    for _ in range(200):
        loss = head.loss(DenseOutput(logit.expand(4, -1), boxes.expand(-1, 12, -1), centers), boxes, mask)["token"]
        (gradient,) = torch.autograd.grad(loss, logit)
        logit = (logit - 4 * gradient).detach().requires_grad_()
    positive = AnyObjectsHead.positive_tokens_of_many(centers, boxes, mask)[0, 0]
    torch.testing.assert_close(logit.sigmoid()[0, positive], torch.full((int(positive.sum()),), 0.25))


def test_rank_finds_every_object_once() -> None:
    """Three tokens predict the left object, two the right one; probabilities need not add up to 1."""
    left, right, alone = [0.2, 0.5, 0.3, 0.8], [0.7, 0.5, 0.2, 0.4], [0.5, 0.95, 0.05, 0.05]
    probability = torch.tensor([[0.8, 0.9, 0.7, 0.6, 0.95, 0.1], [0.01, 0.02, 0.01, 0.01, 0.01, 0.01]])
    proposals = torch.tensor([[left] * 3 + [right] * 2 + [alone]]).expand(2, -1, -1)
    boxes, scores = build().select_boxes(DenseOutput(probability.logit(), proposals, torch.rand(6, 2)))
    torch.testing.assert_close(boxes[0, :3], torch.tensor([right, left, alone]))
    torch.testing.assert_close(scores, torch.tensor([[0.95, 0.9, 0.1, 0.0], [0.02, 0.01, 0.01, 0.0]]))


def test_a_box_without_area_is_found_once() -> None:
    proposals = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.2, 0.2, 0.1, 0.1]]])
    boxes, scores = build().select_boxes(DenseOutput(torch.tensor([[2.0, 1.0]]), proposals, torch.rand(2, 2)))
    assert boxes.equal(proposals)
    assert (scores > 0).all()


def test_padding_of_the_image_is_never_positive_and_never_found() -> None:
    head = build()
    output = head(tokens(2)._replace(grids=((3, 4), (2, 4))))
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]] * 2)
    positive = head.positive_tokens_of_many(output.centers, boxes, torch.ones(2, 1, dtype=torch.bool))
    assert positive.sum(dim=(1, 2)).tolist() == [9, 8]
    assert not positive[1, 0, 8:].any()
    assert all(value.isfinite() for value in head.loss(output, boxes, torch.ones(2, 1, dtype=torch.bool)).values())
    assert (head.select_boxes(output, 12)[1][1] > 0).sum() <= 8


def test_weights_of_a_head_for_one_object_fit() -> None:
    one = replace(CONFIG, objects="one").build(VISION_WIDTH, TEXT_WIDTH)
    assert type(one) is DenseHead
    build().load_state_dict(one.state_dict())


def test_a_model_learns_from_absent_and_several_and_predicts_any_number() -> None:
    model = small_model()
    batch = generalized_batch(model)
    assert {len(target.boxes) for target in batch.targets} >= {0, 1, 2}
    loss = torch.stack(list(model.loss(model(batch), batch).values())).sum()
    loss.backward()
    assert loss.isfinite()
    assert model.iou(model(batch), batch) is None
    absent = Collator(model.image_spec, model.text_spec)([ShapesConfig(kinds=("absent",)).build().load(0, 0)])
    assert {str(name) for name in model.loss(model(absent), absent)} == {"token", "l1", "giou"}
    output = model.eval()(batch)
    for prediction in model.predict(output._replace(logits=output.logits - 200), batch):
        assert len(prediction.boxes) == 0, "no box of probability 0"
    for prediction, target in zip(model.predict(output, batch), batch.targets, strict=True):
        assert 1 <= len(prediction.boxes) <= 5
        overlap = box_ops.iou(prediction.boxes[:, None], prediction.boxes[None]).fill_diagonal_(0)
        assert (overlap <= 0.5 + 1e-3).all(), target.id


def test_expressions_that_share_an_image_have_the_same_loss() -> None:
    model = small_model().eval()
    settings = ShapesConfig(split="val", image_size=64, kinds=("absent", "several", "attribute", "several"))
    source = replace(settings, expressions_per_scene=4).build()
    samples = [source.load(index, 0) for index in range(8)]
    collate, shared = Collator(model.image_spec, model.text_spec), []
    for sample, first in zip(samples, np.repeat(samples[::4], 4), strict=True):
        assert np.array_equal(sample.image, first.image)
        shared.append(replace(sample, image=first.image))
    batches = [collate(samples), collate(shared)]
    assert [len(batch.images) for batch in batches] == [8, 2]
    first, second = (model.loss(model(batch), batch) for batch in batches)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("head", [RecConfig.tiny().head, PooledHeadConfig(width=32, layers=1, heads=2, feedforward=64)])
def test_a_head_for_one_object_refuses_the_sample_and_names_the_setting(head: DenseHeadConfig) -> None:
    model = replace(RecConfig.tiny(), head=head).build(pretrained=False)
    batch = generalized_batch(model, 1)
    with pytest.raises(ConfigError, match=r"shapes/val/000000/0 has 0 boxes.*head=\{name: dense, objects: any\}"):
        model.loss(model(batch), batch)


def test_cached_features_have_one_object(tmp_path: Path) -> None:
    """A cache refuses other data, but such a model may train on RefCOCO with it: the losses are those without it."""
    write_expressions(tmp_path)
    write_encoders(tmp_path)
    head = {"name": "dense", "objects": "any", "width": 32, "layers": 1, "heads": 2, "feedforward": 64, "dropout": 0.0}
    losses = []
    for cache in (None, {}):
        config = cached_config(tmp_path, cache, model={"head": head})
        if cache is not None:
            build_cache(config)
        trainer = Trainer(config, overwrite=True)
        losses.append(trainer.step(next(trainer.data.steps(0, 0))))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)

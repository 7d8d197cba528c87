"""What every member of the union `vg.models.ModelConfig` promises, tested on its tiny preset."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from vg.boxes import iou, to_pixels
from vg.checkpoint import read_model, write_model
from vg.config import ModelOnlyConfig
from vg.data.collate import Collator
from vg.data.synthetic.shapes import ShapesConfig
from vg.models import ModelConfig
from vg.models.base import GroundingModel
from vg.types import Batch, Prediction

MEMBERS = get_args(get_args(ModelConfig)[0])
MAX_PARAMETERS = 2_000_000
MAX_STEPS, EVALUATE_EVERY = 300, 25


@pytest.fixture(params=MEMBERS, ids=lambda member: member.name)
def config(request: pytest.FixtureRequest) -> Any:
    """Settings of a tiny model."""
    member = request.param
    if not hasattr(member, "tiny"):
        pytest.fail(
            f"{member.__module__}.{member.__name__} needs a classmethod tiny(): return settings of a model without "
            "dropout that trains from scratch in seconds on one CPU core"
        )
    torch.manual_seed(0)
    settings = member.tiny()
    assert type(settings) is member
    return settings


@pytest.fixture
def model(config: Any) -> GroundingModel:
    return config.build(pretrained=False)


@pytest.fixture
def batch(model: GroundingModel) -> Batch:
    """Four drawn scenes with one expression and one box each."""
    source = ShapesConfig(split="val", size=4, image_size=64).build()
    samples = [source.load(index, epoch=0) for index in range(len(source))]
    return Collator(model.image_spec, model.text_spec, one_prompt=True)(samples)


def total_loss(model: GroundingModel, batch: Batch) -> Tensor:
    return torch.stack(list(model.loss(model(batch), batch).values())).sum()


@torch.no_grad()
def predict(model: GroundingModel, batch: Batch) -> list[Prediction]:
    was_training = model.training
    model.eval()
    predictions = model.predict(model(batch), batch)
    model.train(was_training)
    return predictions


def test_settings_are_selected_by_name(config: Any) -> None:
    assert TypeAdapter(ModelConfig).validate_python(asdict(config)) == config


def test_the_loss_is_finite_and_reaches_every_trainable_parameter(model: GroundingModel, batch: Batch) -> None:
    assert model.num_parameters() < MAX_PARAMETERS, "the preset is not tiny"
    model.train()
    loss = total_loss(model, batch)
    assert loss.isfinite()
    assert model.batch_weight(batch) > 0
    loss.backward()
    trainable = {name: weights.grad for name, weights in model.named_parameters() if weights.requires_grad}
    assert trainable
    assert [name for name, gradient in trainable.items() if gradient is None] == []
    assert [name for name, gradient in trainable.items() if not gradient.isfinite().all()] == []


def test_predictions_are_inside_the_image_and_best_first(model: GroundingModel, batch: Batch) -> None:
    predictions = predict(model, batch)
    assert [prediction.id for prediction in predictions] == [target.id for target in batch.targets]
    for prediction, target in zip(predictions, batch.targets, strict=True):
        height, width = target.size
        boxes, scores = prediction.boxes, prediction.scores
        assert len(boxes) == len(scores) == len(prediction.phrase_ids) > 0
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        assert ((scores >= 0) & (scores <= 1)).all()
        assert (scores[:-1] >= scores[1:]).all()
        assert prediction.phrases == target.phrases
        assert set(prediction.phrase_ids.tolist()) <= set(range(len(target.phrases)))


def test_a_saved_model_is_read_back_unchanged(config: Any, model: GroundingModel, batch: Batch, tmp_path: Path) -> None:
    write_model(tmp_path, model, ModelOnlyConfig(config))
    read, read_config = read_model(tmp_path)
    assert not read.training
    assert read_config.model == config
    assert read.image_spec == model.image_spec
    weights = model.state_dict()
    assert read.state_dict().keys() == weights.keys()
    for name, value in read.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for one, other in zip(predict(read, batch), predict(model, batch), strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)


def test_four_samples_are_memorized(model: GroundingModel, batch: Batch) -> None:
    trainable = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-3, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    model.train()
    losses: list[float] = []
    for step in range(1, MAX_STEPS + 1):
        loss = total_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.1)
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
        if step % EVALUATE_EVERY == 0:
            ious = [
                iou(prediction.boxes[0], to_pixels(target.boxes[0], target.size)).item()
                for prediction, target in zip(predict(model, batch), batch.targets, strict=True)
            ]
            if min(ious) > 0.8 and losses[-1] < 0.2 * losses[0]:
                return
    pytest.fail(f"after {MAX_STEPS} steps: IoU {ious}, loss {losses[0]} -> {losses[-1]}")

"""Denoising queries: assignment, noise of boxes and labels, attention mask, gradients and loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.grounding_dino.tiny import batch_of, sample, tiny_config, tiny_model
from vg import boxes as box_ops
from vg.losses.config import LossConfig
from vg.losses.set_loss import DenoisingOutput, SetLoss
from vg.models.grounding_dino import decoder
from vg.models.grounding_dino.config import DenoisingConfig, GroundingDinoConfig
from vg.models.grounding_dino.denoising import Denoising
from vg.models.grounding_dino.model import Output
from vg.movable import map_tensors
from vg.types import LossName, PromptTargets

COUNTS = (2, 0, 3)


def targets(counts: tuple[int, ...] = COUNTS) -> PromptTargets:
    """Boxes well inside 0..1, with phrase ids 0, 1, 2, ..., and 40, 41, ... in the next prompt."""
    torch.manual_seed(0)
    num = max(counts)
    boxes = torch.cat((torch.rand(len(counts), num, 2) * 0.2 + 0.4, torch.rand(len(counts), num, 2) * 0.1 + 0.1), -1)
    phrase_ids = torch.arange(len(counts)).unsqueeze(1) * 40 + torch.arange(num)
    mask = torch.arange(num) < torch.tensor(counts).unsqueeze(1)
    return PromptTargets(boxes, torch.ones(len(counts), num, 4, dtype=torch.bool), phrase_ids, mask, counts)


def exact(**settings: int) -> Denoising:
    return Denoising(DenoisingConfig(label_noise=0, box_noise=0, **settings), width=8)


def test_every_group_has_a_positive_and_a_negative_query_per_box() -> None:
    queries = exact(num_queries=7)(targets(), num_queries=5)  # at most two groups of three boxes
    assert queries.content.shape == (3, 12, 8)
    assert queries.reference_logits.shape == (3, 12, 4)
    assert queries.mask.shape == (17, 17)
    group = [[0, 1, -1, -1, -1, -1], [-1] * 6, [0, 1, 2, -1, -1, -1]]
    assert queries.assignment.tolist() == [row * 2 for row in group]


@pytest.mark.parametrize(
    ("num_boxes", "num_queries"), [(1, 200), (3, 198), (50, 200), (51, 102), (100, 200), (130, 260)]
)
def test_number_of_queries(num_boxes: int, num_queries: int) -> None:
    """At most 100 positive queries, but at least one per box."""
    denoising = Denoising(DenoisingConfig(), width=8)
    assert denoising(targets((num_boxes,)), 900).content.shape == (1, num_queries, 8)


def test_without_noise_queries_equal_the_ground_truth() -> None:
    """Negative queries, too: they differ by their noise only. Padded queries are zero."""
    denoising, truth = exact(num_queries=3, num_labels=32), targets()
    queries = denoising(truth, num_queries=5)
    for half in (slice(0, 3), slice(3, 6)):
        boxes = queries.reference_logits[:, half].sigmoid()
        torch.testing.assert_close(boxes[truth.mask], truth.boxes[truth.mask])
        labels = truth.phrase_ids[truth.mask] % 32
        assert labels.tolist() == [0, 1, 16, 17, 18]
        assert torch.equal(queries.content[:, half][truth.mask], denoising.labels.weight[labels])
        assert (queries.content[:, half][~truth.mask] == 0).all()
        assert (queries.reference_logits[:, half][~truth.mask] == 0).all()


def sides_moved(queries: Tensor, truth: PromptTargets) -> tuple[Tensor, Tensor]:
    """Distances of the sides of positive and negative queries in units of the box size: [R, groups, N, 4] each."""
    num = truth.boxes.shape[1]
    boxes = box_ops.cxcywh_to_xyxy(queries.sigmoid()).unflatten(1, (-1, 2, num))  # [R, groups, 2, N, 4]
    moved = boxes - box_ops.cxcywh_to_xyxy(truth.boxes)[:, None, None]
    moved = moved / truth.boxes[:, None, None, :, 2:].repeat(1, 1, 1, 1, 2)
    return moved[:, :, 0], moved[:, :, 1]


@pytest.mark.parametrize("noise", [0.4, 0.9])
def test_box_noise(noise: float) -> None:
    """Sides of positive queries move by up to noise / 2 in both directions, negative ones by noise / 2 to noise."""
    truth = targets((3, 3))
    queries = Denoising(DenoisingConfig(num_queries=3000, box_noise=noise), width=8)(truth, 1)
    positive, negative = sides_moved(queries.reference_logits, truth)
    assert positive.abs().max() <= noise / 2 + 1e-4
    assert positive.abs().max() > 0.49 * noise
    assert positive.abs().min() < 0.01 * noise
    assert positive.mean().abs() < 0.01
    upright = (queries.reference_logits.sigmoid()[..., 2:] > 0.0011).all(dim=-1).unflatten(1, (-1, 2, 3))[:, :, 1]
    assert upright.float().mean() > 0.5, "in the other queries, opposite sides crossed"
    assert negative[upright].abs().min() >= noise / 2 - 1e-4
    assert negative[upright].abs().max() <= noise + 1e-4
    assert negative[upright].abs().max() > 0.98 * noise


def test_noisy_boxes_stay_in_the_image() -> None:
    truth = targets((1,))._replace(boxes=torch.tensor([[[0.5, 0.5, 1.0, 1.0]]]))
    queries = Denoising(DenoisingConfig(num_queries=500), width=8)(truth, 1)
    corners = box_ops.cxcywh_to_xyxy(queries.reference_logits.sigmoid())
    assert queries.reference_logits.isfinite().all()
    assert corners.min() >= -1e-3
    assert corners.max() <= 1 + 1e-3


def test_label_noise() -> None:
    """Half of label_noise is replaced, and one in four of these by the true label."""
    denoising = Denoising(DenoisingConfig(num_queries=20_000, label_noise=0.8, box_noise=0, num_labels=4), width=8)
    content = denoising(targets((1,)), 1).content[0]
    labels = (content.unsqueeze(1) == denoising.labels.weight).all(dim=-1).int().argmax(dim=1)
    shares = labels.bincount(minlength=4) / len(labels)
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.1, 0.1, 0.1]), atol=0.01, rtol=0)


def test_queries_attend_within_their_group_only() -> None:
    mask = exact(num_queries=7)(targets(), num_queries=5).mask
    for query in range(17):
        for key in range(17):
            same_group = key // 6 == query // 6 and query < 12
            assert mask[query, key] == (key >= 12 or same_group)


def test_noise_comes_from_the_global_generator() -> None:
    denoising, truth = Denoising(DenoisingConfig(), width=8), targets()

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        queries = denoising(truth, 5)
        return torch.cat((queries.content, queries.reference_logits), dim=-1)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("counts", [COUNTS, (0, 0)], ids=["boxes", "no boxes"])
def test_the_label_embedding_always_gets_a_gradient(counts: tuple[int, ...]) -> None:
    """Even in a batch without boxes: DDP waits for the gradient of every weight."""
    denoising = exact(num_queries=3)
    queries = denoising(targets(counts), num_queries=5)
    content = torch.cat((queries.content, torch.ones(len(counts), 5, 8, requires_grad=True)), dim=1)
    content.sum().backward()
    assert not queries.reference_logits.requires_grad
    assert denoising.labels.weight.grad is not None
    if not any(counts):
        assert queries.content.shape == (2, 0, 8)
        assert queries.assignment.shape == (2, 0)
        assert queries.mask.all()
        assert (denoising.labels.weight.grad == 0).all()
        return
    uses = denoising.labels.weight.grad[:, 0].nonzero().flatten().tolist()
    assert uses == [0, 1, 80, 81, 82]


def test_the_loss_uses_the_assignment_of_the_queries() -> None:
    """Queries without noise that predict their own box have no loss if the negative ones predict background."""
    truth = targets()
    queries = exact(num_queries=3)(truth, num_queries=5)
    boxes = queries.reference_logits.sigmoid().unsqueeze(0)
    logits = torch.full((1, 3, 6, 4), -20.0).masked_fill((queries.assignment >= 0)[None, ..., None], 20.0)
    mask = torch.ones(3, 4, dtype=torch.bool)
    matching = torch.zeros(1, 3, 5, 4), torch.rand(1, 3, 5, 4)
    losses = SetLoss(LossConfig())(*matching, truth, mask, denoising=DenoisingOutput(logits, boxes, queries.assignment))
    for term in ("class", "l1", "giou"):
        assert losses[LossName(term, "denoising")].item() == pytest.approx(0, abs=1e-5)
    logits[0, 0, 3] = 20.0  # the negative query of the first box predicts its phrase
    losses = SetLoss(LossConfig())(*matching, truth, mask, denoising=DenoisingOutput(logits, boxes, queries.assignment))
    assert losses[LossName("class", "denoising")].item() == pytest.approx(0.75 * 20 * 4 / 5, rel=1e-4)


def test_no_value_is_read_from_the_device() -> None:
    """On the meta device, reading one would raise; on a GPU it would be a synchronization in every step."""
    truth = map_tensors(targets(), lambda x: x.to("meta"))
    denoising = Denoising(DenoisingConfig(num_queries=7), width=8).to("meta")
    queries = denoising(truth, num_queries=5)
    assert queries.content.shape == (3, 12, 8)
    output = DenoisingOutput(queries.content, queries.reference_logits, queries.assignment)
    counts = SetLoss._counts(truth, output)
    assert counts.shape == (2,)


def test_default_settings() -> None:
    config = GroundingDinoConfig()
    assert config.denoising is None
    assert config.loss == LossConfig()
    assert DenoisingConfig() == DenoisingConfig(num_queries=100, label_noise=0.5, box_noise=1.0, num_labels=None)
    assert Denoising(DenoisingConfig(), width=8).labels.num_embeddings == 256


@pytest.mark.parametrize("half", [False, True])
def test_the_mask_is_converted_once_for_all_decoder_layers(monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    """To what the attention of torch makes of a bool mask in every layer: equal to the bit."""
    model = tiny_model(denoising=DenoisingConfig(num_queries=6, num_labels=8)).train()
    batch = batch_of(model, sample(["cat"], boxes=2), sample(["dog"], (64, 64), boxes=1))
    attend, masks = F.scaled_dot_product_attention, []

    def spy(query: Tensor, key: Tensor, *more: Any, **options: Any) -> Tensor:
        if query.shape[2] == key.shape[2] > 20:  # M + Q queries
            masks.append((more[1], query.dtype))
        return attend(query, key, *more, **options)

    def outputs() -> Output:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model(batch)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    once = outputs()
    (mask, dtype), (other, _) = masks
    assert other is mask
    assert mask.dtype == dtype == (torch.bfloat16 if half else torch.float32)
    monkeypatch.setattr(decoder, "additive_mask", lambda mask, dtype: mask)
    converted_in_layers = outputs()
    assert masks[-1][0].dtype == torch.bool
    assert once.logits.equal(converted_in_layers.logits)
    assert once.boxes.equal(converted_in_layers.boxes)


def test_other_random_weights_do_not_depend_on_the_number_of_labels() -> None:
    """The end of training builds the model again, with a number that was unknown before: see Trainer.interpolate."""
    config, built = tiny_config(denoising=DenoisingConfig()), []
    for _ in range(2):
        torch.manual_seed(0)
        built.append(config.build(pretrained=False))
        built[-1].use_classes(5)
    first, second = (model.own_state_dict() for model in built)
    assert [name for name in first if not first[name].equal(second[name])] == ["denoising.labels.weight"]

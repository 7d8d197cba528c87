"""The set loss gives the costs, assignments, terms and gradients recorded from Open-GroundingDino."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.files import recorded_json, recorded_tensors
from vg.data.collate import prompt_targets
from vg.losses.config import LossConfig, MatchingConfig
from vg.losses.matcher import match, match_costs
from vg.losses.set_loss import SetLoss
from vg.types import PromptTargets, Target, Text

CONFIG = LossConfig(class_weight=2, matching=MatchingConfig(class_cost="mean", class_weight=1))
OUTPUTS = ("aux0", "aux1", "final", "interm")  # as the recording names them
TERMS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
SUFFIXES = {"_layer0": "_0", "_layer1": "_1", "": "", "_encoder": "_interm"}


class Recording:
    """Three prompts, the second without boxes, and random outputs of 14 queries for every layer.

    The reference found the tokens of a class by searching its name in the caption, so the class "dog" of the first
    image has the token "dog" of "hot dog". Our prompts store the span of each phrase and do not make this mistake;
    the test therefore takes the recorded token maps. The reference divides the class terms by the number of matched
    boxes and the box terms by the number of all boxes. We divide both by the latter; the two are equal here.
    """

    def __init__(self) -> None:
        self.values = recorded_tensors("criterion")
        self.results: dict[str, Any] = recorded_json("criterion.json")
        self.mask = self.values["text_token_mask"]
        self.logits = torch.stack([self.values[f"{name}.logits"] for name in OUTPUTS]).requires_grad_()
        self.boxes = torch.stack([self.values[f"{name}.boxes"] for name in OUTPUTS]).requires_grad_()

    def targets(self, empty: bool = False) -> PromptTargets:
        names = self.results["class_names"]
        phrase_tokens = torch.zeros(3, max(map(len, names)), self.mask.shape[1], dtype=torch.bool)
        targets = []
        for row in range(3):
            phrase_tokens[row, : len(names[row])] = self.values[f"positive_map.{row}"] > 0
            boxes, labels = self.values[f"target_boxes.{row}"], self.values[f"target_labels.{row}"]
            count = 0 if empty else len(labels)
            targets.append(Target(str(row), (1, 1), tuple(names[row]), boxes[:count], labels[:count]))
        return prompt_targets(Text(self.values["input_ids"], self.mask, phrase_tokens, torch.arange(3)), targets)

    def loss(self, targets: PromptTargets) -> dict[str, Tensor]:
        encoder = self.logits[3], self.boxes[3]
        losses = SetLoss(CONFIG)(self.logits[:3], self.boxes[:3], targets, self.mask, encoder=encoder)
        return {str(name): value for name, value in losses.items()}


@pytest.fixture
def recording() -> Recording:
    return Recording()


def test_costs_and_assignments_equal_the_recorded_ones(recording: Recording) -> None:
    targets = recording.targets()
    costs = match_costs(recording.logits, recording.boxes, targets, recording.mask, CONFIG)
    costs = costs - CONFIG.matching.giou  # our GIoU cost is 1 - GIoU, theirs is -GIoU
    found = match(recording.logits, recording.boxes, targets, recording.mask, CONFIG)
    assert targets.counts == (6, 0, 3)
    for layer, name in enumerate(OUTPUTS):
        for row, (queries, labels) in enumerate(recording.results["matched_[query,target]_per_image"][name]):
            expected = recording.values[f"{name}.cost.{row}"]
            torch.testing.assert_close(costs[layer, row, :, : len(labels)], expected, atol=5e-5, rtol=1e-5)
            assert found[layer, row, queries].tolist() == labels
            assert (found[layer, row] >= 0).sum() == len(labels)


@pytest.mark.parametrize("empty", [False, True], ids=["boxes", "no boxes"])
def test_loss_terms_equal_the_recorded_ones(recording: Recording, empty: bool) -> None:
    results = recording.results["all_images_empty"] if empty else recording.results
    losses = recording.loss(recording.targets(empty))
    assert len(losses) == 12
    for term, recorded in TERMS.items():
        for layer, suffix in SUFFIXES.items():
            weight = recording.results["loss_weights"][recorded + suffix]
            expected = weight * results["losses_unweighted"][recorded + suffix]
            assert losses[term + layer].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert sum(losses.values()).item() == pytest.approx(results["weighted_total"], rel=1e-6)


def test_gradients_equal_the_recorded_ones(recording: Recording) -> None:
    """Box gradients differ slightly because the reference adds 1e-6 to the areas that it divides by."""
    torch.stack(list(recording.loss(recording.targets()).values())).sum().backward()
    assert recording.logits.grad is not None
    assert recording.boxes.grad is not None
    for layer, name in enumerate(OUTPUTS):
        values = recording.values
        torch.testing.assert_close(recording.logits.grad[layer], values[f"{name}.grad_logits"], atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(recording.boxes.grad[layer], values[f"{name}.grad_boxes"], atol=1e-6, rtol=5e-4)

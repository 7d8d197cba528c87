"""The set loss gives the recorded costs, assignments, terms and gradients of Open-GroundingDino."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vg.data.prompt import prompt_targets
from vg.losses.config import LossConfig, MatchingConfig
from vg.losses.matcher import match, match_costs
from vg.losses.set_loss import SetLoss
from vg.types import PromptTargets, Target, Text

RECORDED = Path(__file__).parents[2] / ".." / "shared" / "data" / "golden_official"
CONFIG = LossConfig(class_weight=2, matching=MatchingConfig(class_cost="mean", class_weight=1))
PARTS = {
    "aux0": "_layer0",
    "aux1": "_layer1",
    "final": "",
    "interm": "_encoder",
}  # their names of outputs: ours of terms
TERMS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
SUFFIXES = {"_layer0": "_0", "_layer1": "_1", "": "", "_encoder": "_interm"}

pytestmark = pytest.mark.skipif(not RECORDED.exists(), reason=f"no recorded values in {RECORDED}")


class Recording:
    """Three prompts, the second without boxes, and the answers of 14 random queries, layer by layer.

    The recorded maps of tokens were found by searching names in the caption: a "dog" of the first image is named by
    the "dog" of "hot dog". Our prompts know their spans and never do this, so the maps are taken as they are.
    The reference divides the class terms by the number of matched boxes, and the box terms by that of all boxes; we
    divide both by the latter. Here they are the same.
    """

    def __init__(self) -> None:
        self.values = load_file(RECORDED / "criterion.safetensors")
        self.notes: dict[str, Any] = json.loads((RECORDED / "criterion.json").read_text())
        self.mask = self.values["text_token_mask"]
        self.logits = torch.stack([self.values[f"{part}.logits"] for part in PARTS]).requires_grad_()
        self.boxes = torch.stack([self.values[f"{part}.boxes"] for part in PARTS]).requires_grad_()

    def targets(self, empty: bool = False) -> PromptTargets:
        names = self.notes["class_names"]
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


def test_costs_and_assignments(recording: Recording) -> None:
    targets = recording.targets()
    costs = match_costs(recording.logits, recording.boxes, targets, recording.mask, CONFIG)
    costs = costs - CONFIG.matching.giou  # ours counts 1 - GIoU, theirs -GIoU
    found = match(recording.logits, recording.boxes, targets, recording.mask, CONFIG)
    assert targets.counts == (6, 0, 3)
    for layer, part in enumerate(PARTS):
        for row, (queries, shown) in enumerate(recording.notes["matched_[query,target]_per_image"][part]):
            expected = recording.values[f"{part}.cost.{row}"]
            torch.testing.assert_close(costs[layer, row, :, : len(shown)], expected, atol=5e-5, rtol=1e-5)
            assert found[layer, row, queries].tolist() == shown
            assert (found[layer, row] >= 0).sum() == len(shown)


@pytest.mark.parametrize("empty", [False, True], ids=["boxes", "no boxes"])
def test_terms(recording: Recording, empty: bool) -> None:
    notes = recording.notes["all_images_empty"] if empty else recording.notes
    losses = recording.loss(recording.targets(empty))
    assert len(losses) == 12
    for term, recorded in TERMS.items():
        for part, suffix in SUFFIXES.items():
            weight = recording.notes["loss_weights"][recorded + suffix]
            expected = weight * notes["losses_unweighted"][recorded + suffix]
            assert losses[term + part].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert sum(losses.values()).item() == pytest.approx(notes["weighted_total"], rel=1e-6)


def test_gradients(recording: Recording) -> None:
    """Those of boxes differ a little: the reference adds 1e-6 to the areas that it divides by."""
    torch.stack(list(recording.loss(recording.targets()).values())).sum().backward()
    assert recording.logits.grad is not None
    assert recording.boxes.grad is not None
    for layer, part in enumerate(PARTS):
        values = recording.values
        torch.testing.assert_close(recording.logits.grad[layer], values[f"{part}.grad_logits"], atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(recording.boxes.grad[layer], values[f"{part}.grad_boxes"], atol=1e-6, rtol=5e-4)

"""A training step gives the losses, assignments and gradients recorded from Open-GroundingDino."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from tests.golden.files import recorded_json, recorded_path, recorded_tensors
from tests.models.grounding_dino.golden import golden_checkpoint, golden_images
from vg.data.collate import prompt_targets
from vg.losses.config import LossConfig, MatchingConfig
from vg.losses.matcher import match
from vg.models.grounding_dino.checkpoints import write_checkpoint
from vg.models.grounding_dino.config import DenoisingConfig
from vg.models.grounding_dino.model import GroundingDino
from vg.types import Batch, Target, Text

TERMS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
OUTPUTS = {"_layer0": "_0", "_layer1": "_1", "": "", "_encoder": "_interm"}
LAYERS = ["layer0", "layer1", "final", "encoder"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Recording:
    """A batch of two images of different sizes, with the same caption (b) or two captions (c), and its results."""

    def __init__(self, case: str):
        self.results: dict[str, Any] = recorded_json(f"train_step_{case}.json")
        self.values = recorded_tensors(f"train_step_{case}")
        prompts = recorded_tensors({"b": "case_b", "c": "case_c_fixedmask"}[case])
        images, sizes, _ = golden_images("inputs_b2")
        token_ids, mask = prompts["input_ids"], prompts["text_token_mask"]
        names = self.results["class_names"]
        targets = [
            Target(str(i), (1, 1), tuple(names[i]), self.values[f"target_boxes.{i}"], self.values[f"target_labels.{i}"])
            for i in range(2)
        ]
        text = Text(token_ids, mask, self._phrase_tokens(token_ids, names), torch.arange(2))
        self.batch = Batch(
            images=images,
            sizes=sizes,
            text=text,
            targets=targets,
            prompt_targets=prompt_targets(text, targets),
            image_ids=torch.arange(2),
        )

    @staticmethod
    def _phrase_tokens(token_ids: Tensor, names: list[list[str]]) -> Tensor:
        """Search the class names in the captions, which may contain other words; the first match is right here."""
        tokenizer = AutoTokenizer.from_pretrained(recorded_path("tokenizer"))
        found = torch.zeros(len(names), max(map(len, names)), token_ids.shape[1], dtype=torch.bool)
        for row, phrases in enumerate(names):
            for phrase, name in enumerate(phrases):
                words = torch.tensor(tokenizer(name, add_special_tokens=False)["input_ids"])
                starts = (token_ids[row].unfold(0, len(words), 1) == words).all(dim=-1).nonzero()
                found[row, phrase, starts[0, 0] : starts[0, 0] + len(words)] = True
        return found


def model_in_training(folder: Path, denoising: DenoisingConfig | None = None) -> GroundingDino:
    """Build the recorded model with the loss of Open-GroundingDino, without dropout, batching different sizes."""
    checkpoint = golden_checkpoint(folder)
    config = checkpoint.config
    config.text.architecture = (config.text.architecture or {}) | NO_DROPOUT
    config.text.tokenizer = str(recorded_path("tokenizer"))
    config.backbone.drop_path = config.fusion_drop_path = 0.0  # type: ignore[union-attr]
    config.image.mix_sizes = True
    config.loss = LossConfig(class_weight=2, matching=MatchingConfig(class_cost="mean", class_weight=1))
    config.denoising = denoising
    model = config.build(pretrained=False)
    labels = {k: v for k, v in model.own_state_dict().items() if k.startswith("denoising.")}
    model.load_own_state_dict(checkpoint.weights | labels)
    return model.train()


@pytest.mark.parametrize("case", ["b", "c"])
def test_losses_assignments_and_gradients(case: str, tmp_path: Path) -> None:
    recording, model = Recording(case), model_in_training(tmp_path)
    batch, results = recording.batch, recording.results
    output = model(batch)
    losses = {str(name): value for name, value in model.loss(output, batch).items()}
    for term, recorded in TERMS.items():
        for output_name, suffix in OUTPUTS.items():
            expected = results["loss_weights"][recorded + suffix] * results["losses_unweighted"][recorded + suffix]
            assert losses.pop(term + output_name).item() == pytest.approx(expected, rel=1e-5), term + output_name
    assert not losses

    logits = torch.cat((output.logits, output.encoder_logits[None]))
    boxes = torch.cat((output.boxes, output.encoder_boxes[None]))
    found = match(logits, boxes, batch.prompt_targets, batch.text.mask, model.config.loss)
    for layer, name in enumerate(LAYERS):
        for row, (queries, targets) in enumerate(results["matched_[query,target]_per_image"][name]):
            assert found[layer, row, queries].tolist() == targets
            assert (found[layer, row] >= 0).sum() == len(targets)

    torch.stack(list(model.loss(output, batch).values())).sum().backward()
    weights = model.state_dict(keep_vars=True)
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in weights.items()}
    write_checkpoint(gradients, model.config, None, tmp_path / "gradients.pth", "official")
    named = torch.load(tmp_path / "gradients.pth", weights_only=True)["model"]
    norms = {name: norm for name, norm in results["grad_norms"].items() if norm is not None}
    assert norms.keys() <= named.keys()
    for name, norm in norms.items():
        if not name.endswith("attention.self.key.bias"):  # zero up to rounding: it shifts all scores of a query equally
            assert named[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    for name in [name for name in recording.values if name.startswith("grad.")]:
        expected = recording.values[name]
        error = (named[name.removeprefix("grad.")] - expected).norm() / expected.norm()
        assert error.item() < 1e-4, name


def test_denoising_queries_do_not_change_the_other_losses(tmp_path: Path) -> None:
    """All other terms stay as recorded; the denoising terms have gradients for the label table."""
    recording, model = Recording("c"), model_in_training(tmp_path, DenoisingConfig(num_queries=10))
    terms = model.loss(model(recording.batch), recording.batch)
    losses = {str(name): value for name, value in terms.items()}
    for term, recorded in TERMS.items():
        for output_name, suffix in OUTPUTS.items():
            expected = recording.results["loss_weights"][recorded + suffix]
            expected *= recording.results["losses_unweighted"][recorded + suffix]
            assert losses[term + output_name].item() == pytest.approx(expected, rel=1e-5), term + output_name
    denoising = {f"{term}_denoising{layer}" for term in TERMS for layer in ("", "_layer0", "_layer1")}
    assert {name for name in losses if "denoising" in name} == denoising
    assert all(losses[name].isfinite() and losses[name] > 0 for name in denoising)
    torch.stack([losses[name] for name in denoising]).sum().backward()
    assert model.denoising is not None
    assert model.denoising.labels.weight.grad is not None
    assert model.denoising.labels.weight.grad.any()

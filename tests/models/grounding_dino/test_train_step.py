"""A whole training step gives the recorded losses, assignments and gradients of Open-GroundingDino."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from vg.data.prompt import prompt_targets
from vg.losses.config import LossConfig, MatchingConfig
from vg.losses.matcher import match
from vg.models.grounding_dino.checkpoints import read_checkpoint, write_checkpoint
from vg.models.grounding_dino.config import DenoisingConfig
from vg.models.grounding_dino.model import GroundingDino
from vg.types import Batch, Target, Text

RECORDED = Path(__file__).parents[3] / ".." / "shared" / "data" / "golden_official"
TERMS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
PARTS = {"_layer0": "_0", "_layer1": "_1", "": "", "_encoder": "_interm"}
LAYERS = ["layer0", "layer1", "final", "encoder"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

pytestmark = pytest.mark.skipif(not RECORDED.exists(), reason=f"no recorded values in {RECORDED}")


class Recording:
    """Two images of different sizes with one caption (b) or two (c)."""

    def __init__(self, case: str):
        self.notes: dict[str, Any] = json.loads((RECORDED / f"train_step_{case}.json").read_text())
        self.values = load_file(RECORDED / f"train_step_{case}.safetensors")
        prompts = load_file(RECORDED / {"b": "case_b.safetensors", "c": "case_c_fixedmask.safetensors"}[case])
        pictures = load_file(RECORDED / "inputs_b2.safetensors")
        token_ids, mask = prompts["input_ids"], prompts["text_token_mask"]
        real = ~pictures["pixel_mask"]  # [B, H, W]
        names = self.notes["class_names"]
        targets = [
            Target(str(i), (1, 1), tuple(names[i]), self.values[f"target_boxes.{i}"], self.values[f"target_labels.{i}"])
            for i in range(2)
        ]
        text = Text(token_ids, mask, self._phrase_tokens(token_ids, names), torch.arange(2))
        self.batch = Batch(
            images=pictures["pixel_values"],
            sizes=tuple((int(image[:, 0].sum()), int(image[0].sum())) for image in real),
            text=text,
            targets=targets,
            prompt_targets=prompt_targets(text, targets),
        )

    @staticmethod
    def _phrase_tokens(token_ids: Tensor, names: list[list[str]]) -> Tensor:
        """Captions of the reference may hold more than names, so these are searched; the first place is right here."""
        tokenizer = AutoTokenizer.from_pretrained(RECORDED / "tokenizer")
        found = torch.zeros(len(names), max(map(len, names)), token_ids.shape[1], dtype=torch.bool)
        for row, phrases in enumerate(names):
            for phrase, name in enumerate(phrases):
                words = torch.tensor(tokenizer(name, add_special_tokens=False)["input_ids"])
                places = (token_ids[row].unfold(0, len(words), 1) == words).all(dim=-1).nonzero()
                found[row, phrase, places[0, 0] : places[0, 0] + len(words)] = True
        return found


def trained_by_the_reference(denoising: DenoisingConfig | None = None) -> GroundingDino:
    """The recorded model as Open-GroundingDino trains it, but without any dropout; different sizes share a pass."""
    bert = json.loads((RECORDED / "tokenizer" / "config.json").read_text())
    checkpoint = read_checkpoint(RECORDED / "official_tiny.pth", bert)
    config = checkpoint.config
    config.text.architecture = (config.text.architecture or {}) | NO_DROPOUT
    config.text.tokenizer = str(RECORDED / "tokenizer")
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
    recording, model = Recording(case), trained_by_the_reference()
    batch, notes = recording.batch, recording.notes
    output = model(batch)
    losses = {str(name): value for name, value in model.loss(output, batch).items()}
    for term, recorded in TERMS.items():
        for part, suffix in PARTS.items():
            expected = notes["loss_weights"][recorded + suffix] * notes["losses_unweighted"][recorded + suffix]
            assert losses.pop(term + part).item() == pytest.approx(expected, rel=1e-5), term + part
    assert not losses

    logits = torch.cat((output.logits, output.encoder_logits[None]))
    boxes = torch.cat((output.boxes, output.encoder_boxes[None]))
    found = match(logits, boxes, batch.prompt_targets, batch.text.mask, model.config.loss)
    for layer, name in enumerate(LAYERS):
        for row, (queries, shown) in enumerate(notes["matched_[query,target]_per_image"][name]):
            assert found[layer, row, queries].tolist() == shown
            assert (found[layer, row] >= 0).sum() == len(shown)

    torch.stack(list(model.loss(output, batch).values())).sum().backward()
    weights = model.state_dict(keep_vars=True)
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in weights.items()}
    write_checkpoint(gradients, model.config, None, tmp_path / "gradients.pth", "official")
    named = torch.load(tmp_path / "gradients.pth", weights_only=True)["model"]
    norms = {name: norm for name, norm in notes["grad_norms"].items() if norm is not None}
    assert norms.keys() <= named.keys()
    for name, norm in norms.items():
        if not name.endswith("attention.self.key.bias"):  # zero but for rounding: it shifts all scores alike
            assert named[name].norm().item() == pytest.approx(norm, rel=1e-4), name
    for name in [name for name in recording.values if name.startswith("grad.")]:
        expected = recording.values[name]
        error = (named[name.removeprefix("grad.")] - expected).norm() / expected.norm()
        assert error.item() < 1e-4, name


def test_denoising_queries_do_not_disturb_the_others() -> None:
    """They are not seen: all terms stay as recorded, and denoising has its own, which train its table, too."""
    recording, model = Recording("c"), trained_by_the_reference(DenoisingConfig(num_queries=10))
    terms = model.loss(model(recording.batch), recording.batch)
    losses = {str(name): value for name, value in terms.items()}
    for term, recorded in TERMS.items():
        for part, suffix in PARTS.items():
            expected = recording.notes["loss_weights"][recorded + suffix]
            expected *= recording.notes["losses_unweighted"][recorded + suffix]
            assert losses[term + part].item() == pytest.approx(expected, rel=1e-5), term + part
    denoising = {f"{term}_denoising{part}" for term in TERMS for part in ("", "_layer0", "_layer1")}
    assert {name for name in losses if "denoising" in name} == denoising
    assert all(losses[name].isfinite() and losses[name] > 0 for name in denoising)
    torch.stack([losses[name] for name in denoising]).sum().backward()
    assert model.denoising is not None
    assert model.denoising.labels.weight.grad is not None
    assert model.denoising.labels.weight.grad.any()

"""Recorded tensors of the official implementation with tiny random weights, where they are at hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vg.models.grounding_dino.checkpoints.read import read_checkpoint
from vg.models.grounding_dino.model import GroundingDino
from vg.types import Batch, PromptTargets, Text

FOLDER = Path(__file__).parents[3] / ".." / "shared" / "data" / "golden_official"
INPUTS = {"a": "inputs_b1", "b": "inputs_b2", "c_fixedmask": "inputs_b2", "d": "inputs_b1", "e_fixedmask": "inputs_b2"}

needs_golden = pytest.mark.skipif(not FOLDER.exists(), reason="the recorded tensors of the official code are not here")


def golden_model(file: str = "official_tiny.pth") -> GroundingDino:
    """The recorded network, with images of different sizes in one pass as the official code has them."""
    bert = json.loads((FOLDER / "tokenizer" / "config.json").read_text())
    checkpoint = read_checkpoint(FOLDER / file, bert)
    image = replace(checkpoint.config.image, mix_sizes=True)
    model = replace(checkpoint.config, image=image).build(pretrained=False)
    model.load_tokenizer(str(FOLDER / "tokenizer"))
    model.load_own_state_dict(checkpoint.weights)
    return model.eval()


def golden_case(name: str) -> tuple[Batch, dict[str, Tensor], dict[str, Tensor]]:
    """The batch of a case, its recorded outputs, and what was recorded of its images."""
    recorded, inputs = load_file(FOLDER / f"case_{name}.safetensors"), load_file(FOLDER / f"{INPUTS[name]}.safetensors")
    inside = ~inputs["pixel_mask"].bool()  # [B, H, W]
    sizes = tuple((int(mask[:, 0].sum()), int(mask[0].sum())) for mask in inside)
    token_ids = recorded["input_ids"]
    phrase_tokens = torch.zeros(len(token_ids), 1, token_ids.shape[1], dtype=torch.bool)
    text = Text(token_ids, recorded["text_token_mask"].bool(), phrase_tokens, torch.arange(len(token_ids)))
    return Batch(inputs["pixel_values"], sizes, text, [], PromptTargets.without_boxes(text)), recorded, inputs

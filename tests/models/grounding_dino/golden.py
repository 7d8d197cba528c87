"""The network and the cases recorded from the official implementation with tiny random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden.files import SHARED, draw_weights, recorded_json, recorded_path, recorded_tensors
from vg.models.grounding_dino.checkpoints.read import Checkpoint, read_checkpoint
from vg.models.grounding_dino.model import GroundingDino
from vg.types import Batch, PromptTargets, Text

FOLDER = SHARED  # the complete recording
INPUTS = {"a": "inputs_b1", "b": "inputs_b2", "c_fixedmask": "inputs_b2", "d": "inputs_b1", "e_fixedmask": "inputs_b2"}
DRAWN = "drawn from the recorded seed"  # instead of a weight file

needs_golden = pytest.mark.skipif(not FOLDER.exists(), reason=f"needs the complete recording in {FOLDER}")


def golden_checkpoint(folder: Path, file: str = DRAWN) -> Checkpoint:
    """Read a recorded weight file, or an official .pth written to `folder` from the weights that are drawn again."""
    path = folder / "official.pth"
    if file == DRAWN:
        torch.save({"model": draw_weights()}, path)
    else:
        path = recorded_path(file)
    return read_checkpoint(path, recorded_json("tokenizer/config.json"))


def golden_model(folder: Path, file: str = DRAWN) -> GroundingDino:
    """Build the recorded network; like the official code, it batches images of different sizes."""
    checkpoint = golden_checkpoint(folder, file)
    image = replace(checkpoint.config.image, mix_sizes=True)
    model = replace(checkpoint.config, image=image).build(pretrained=False)
    model.load_tokenizer(str(recorded_path("tokenizer")))
    model.load_own_state_dict(checkpoint.weights)
    return model.eval()


def golden_images(name: str) -> tuple[Tensor, tuple[tuple[int, int], ...], dict[str, Tensor]]:
    """Return the padded images [B, 3, H, W], their (height, width), and the recorded image features."""
    recorded = recorded_tensors(name)
    inside = ~recorded["pixel_mask"].bool()  # [B, H, W]
    images = recorded.get("pixel_values")
    if images is None:  # the image of inputs_b1 is the first one of inputs_b2
        images = recorded_tensors("inputs_b2")["pixel_values"][:1, :, : inside.shape[1], : inside.shape[2]]
    return images, tuple((int(mask[:, 0].sum()), int(mask[0].sum())) for mask in inside), recorded


def golden_case(name: str) -> tuple[Batch, dict[str, Tensor], dict[str, Tensor]]:
    """Return the batch of a case, its recorded outputs, and the recorded features of its images."""
    recorded = recorded_tensors(f"case_{name}")
    images, sizes, image_features = golden_images(INPUTS[name])
    token_ids = recorded["input_ids"]
    phrase_tokens = torch.zeros(len(token_ids), 1, token_ids.shape[1], dtype=torch.bool)
    text = Text(token_ids, recorded["text_token_mask"].bool(), phrase_tokens, torch.arange(len(token_ids)))
    return (
        Batch(images, sizes, text, [], PromptTargets.without_boxes(text), torch.arange(len(images))),
        recorded,
        image_features,
    )

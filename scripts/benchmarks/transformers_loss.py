"""The loss that transformers trains Grounding DINO with, called on what a model of vg answers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GroundingDinoConfig
from transformers.loss.loss_grounding_dino import GroundingDinoForObjectDetectionLoss
from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps, build_text_mask

from vg.losses.config import LossConfig, MatchingConfig
from vg.types import PromptTargets, Text

# What transformers weighs and matches by, as settings of our loss.
SETTINGS = LossConfig(class_weight=2.0, matching=MatchingConfig(class_cost="mean", class_weight=1.0))


def transformers_loss(
    logits: Tensor, boxes: Tensor, targets: PromptTargets, text: Text, encoder: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Its code and its default settings, but `auxiliary_loss`, which is off there and which every published model had.

    Args:
        logits: [L, R, Q, T], -inf at tokens that are none.
        boxes: [L, R, Q, 4] cxcywh 0..1.
        text: one prompt per image.
        encoder: logits [R, Q, T] and boxes [R, Q, 4] that the encoder proposed.

    Returns:
        The weighted sum of all terms.
    """
    words = text.phrase_tokens.any(dim=1)  # [R, T]
    # A number of transformers for every phrase, in the order of the prompt. Of token ids it only asks which of them
    # are delimiters, and 0 is one.
    label_maps = build_label_maps(logits[-1], words.int())  # R times [phrases, T]
    labels = [
        {"class_labels": (named[:count].float() @ label_map.T.float()).argmax(dim=1), "boxes": truth[:count]}
        for named, truth, count, label_map in zip(
            targets.tokens, targets.boxes, targets.counts, label_maps, strict=True
        )
    ]
    encoder_logits, encoder_boxes = encoder or (None, None)
    loss, _, _ = GroundingDinoForObjectDetectionLoss(
        logits[-1],
        labels,
        logits.device,
        boxes[-1],
        GroundingDinoConfig(auxiliary_loss=True, decoder_layers=len(logits), two_stage=encoder is not None),
        label_maps,
        build_text_mask(logits[-1], text.mask),
        outputs_class=logits,
        outputs_coord=boxes,
        encoder_logits=encoder_logits,
        encoder_pred_boxes=encoder_boxes,
    )
    return torch.as_tensor(loss)

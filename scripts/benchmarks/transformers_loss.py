"""The loss of Grounding DINO in transformers, computed from the outputs of a model of vg."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GroundingDinoConfig
from transformers.loss.loss_grounding_dino import GroundingDinoForObjectDetectionLoss
from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps, build_text_mask

from vg.losses.config import LossConfig, MatchingConfig
from vg.types import PromptTargets, Text

# The loss weights and matching costs of transformers, as settings of our loss.
SETTINGS = LossConfig(class_weight=2.0, matching=MatchingConfig(class_cost="mean", class_weight=1.0))


def transformers_loss(
    logits: Tensor, boxes: Tensor, targets: PromptTargets, text: Text, encoder: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Compute the loss of transformers with its default settings, except `auxiliary_loss`.

    That one is off by default in transformers, but all published models were trained with it.

    Args:
        logits: [L, R, Q, T], -inf at padding.
        boxes: [L, R, Q, 4] cxcywh 0..1.
        text: one prompt per image.
        encoder: logits [R, Q, T] and boxes [R, Q, 4] proposed by the encoder.

    Returns:
        The weighted sum of all terms.
    """
    words = text.phrase_tokens.any(dim=1)  # [R, T]
    # transformers assigns a label to every phrase in the order of the prompt. It uses token ids only to find
    # delimiters, and 0 is one of them.
    label_maps = build_label_maps(logits[-1], words.int())  # R times [phrases, T]
    labels = [
        {"class_labels": (named[:count].float() @ label_map.T.float()).argmax(dim=1), "boxes": truth[:count]}
        for named, truth, count, label_map in zip(
            targets.positive_map, targets.boxes, targets.counts, label_maps, strict=True
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

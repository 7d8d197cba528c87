"""Loss terms: pure functions from predictions and truth to one number per item."""

from __future__ import annotations

import torch
from torch import Tensor

from vg import boxes as box_ops


def l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Sum of absolute coordinate differences (DETR): [..., 4] cxcywh 0..1 each -> [...]."""
    return (predicted - target).abs().sum(dim=-1)


def giou(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - generalised IoU (Rezatofighi et al. 2019): [..., 4] cxcywh each -> [...], 0..2."""
    return 1 - box_ops.giou(box_ops.cxcywh_to_xyxy(predicted), box_ops.cxcywh_to_xyxy(target))


def diou(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - distance IoU (Zheng et al. 2020): [..., 4] cxcywh each -> [...], 0..2."""
    return 1 - box_ops.diou(box_ops.cxcywh_to_xyxy(predicted), box_ops.cxcywh_to_xyxy(target))


def token_cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    """Cross-entropy between the softmax over all tokens and an equal share for each positive token.

    Args:
        logits: [..., S]
        positive: [..., S] bool, at least one True in each row.

    Returns:
        [...]
    """
    log_probability = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probability * positive).sum(dim=-1) / positive.sum(dim=-1)

"""Loss terms: pure functions of predictions and ground truth, with one value per element."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vg import boxes as box_ops
from vg.losses.config import BoxLossConfig


def l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Sum of absolute coordinate differences (DETR): [..., 4] cxcywh 0..1 each -> [...]."""
    return (predicted - target).abs().sum(dim=-1)


def giou(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - generalized IoU (Rezatofighi et al. 2019): [..., 4] cxcywh each -> [...], 0..2."""
    return 1 - box_ops.giou(box_ops.cxcywh_to_xyxy(predicted), box_ops.cxcywh_to_xyxy(target))


def diou(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - distance IoU (Zheng et al. 2020): [..., 4] cxcywh each -> [...], 0..2."""
    return 1 - box_ops.diou(box_ops.cxcywh_to_xyxy(predicted), box_ops.cxcywh_to_xyxy(target))


BOX_TERMS = {"diou": diou, "l1": l1, "giou": giou}  # by the name of its weight in BoxLossConfig


def box_terms(config: BoxLossConfig, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return the box terms whose weight is not zero, unweighted: [..., 4] cxcywh 0..1 each -> {term: [...]}."""
    weights = config.box_weights()
    return {name: term(predicted, target) for name, term in BOX_TERMS.items() if weights[name]}


def token_cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    """Cross-entropy between the softmax over all tokens and a uniform distribution over the positive tokens.

    Args:
        logits: [..., S]
        positive: [..., S] bool.

    Returns:
        [...], zero if no token is positive.
    """
    log_probability = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probability * positive).sum(dim=-1) / positive.sum(dim=-1).clamp(min=1)


def focal(logits: Tensor, positive: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss (Lin et al. 2017), binary cross-entropy times (1 - p)^gamma: [...], [...] bool -> [...]."""
    margin = torch.where(positive, logits, -logits)  # log-odds of the true class
    discount = (gamma * F.logsigmoid(-margin)).exp()  # (1 - p)^gamma, with a gradient at p = 1 for every gamma
    return -torch.where(positive, alpha, 1 - alpha) * discount * F.logsigmoid(margin)


def alignment(queries: Tensor, text: Tensor, positive: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Contrastive alignment (InfoNCE) of queries with tokens, and of tokens with queries (MDETR, Kamath et al. 2021).

    Args:
        queries: [R, Q, D], normalized here.
        text: [R, T, D], normalized here.
        positive: [R, Q, T] bool, the tokens of the phrase that a query is matched with.
        valid: broadcasts to [R, Q, T] bool, True = neither the query nor the token is padding.
        temperature: cosines are divided by it.

    Returns:
        [R], half the sum over matched queries and positive tokens.
    """
    similarity = F.normalize(queries.float(), dim=-1) @ F.normalize(text.float(), dim=-1).mT / temperature  # [R, Q, T]
    similarity = similarity.masked_fill(~valid, torch.finfo(similarity.dtype).min)
    from_queries = token_cross_entropy(similarity, positive)  # [R, Q]
    from_tokens = token_cross_entropy(similarity.mT, positive.mT)  # [R, T]
    return (from_queries.sum(dim=1) + from_tokens.sum(dim=1)) / 2

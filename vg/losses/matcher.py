"""Which query shows which box: the cheapest assignment (Hungarian matching, as in DETR) for all layers and prompts."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vg.losses import terms
from vg.losses.config import LossConfig
from vg.types import PromptTargets

# Keeps the logarithm of a probability finite, as published; it decides the cost of logits beyond 18.
_EPS = {"mean": 1e-8, "sum": 1e-12}


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: PromptTargets, mask: Tensor, config: LossConfig) -> Tensor:
    """Match the queries of every layer and prompt with the boxes of the prompt.

    Args:
        logits: [L, R, Q, T], anything at tokens that are none.
        boxes: [L, R, Q, 4] cxcywh 0..1.
        mask: [R, T] bool, True = a real token.

    Returns:
        [L, R, Q] int64: the number of the box that a query shows, -1 for none. If there are more boxes than queries,
        those that cost least together are shown. A cost that is not finite is worse than every finite one.
    """
    costs = match_costs(logits, boxes, targets, mask, config).cpu().numpy()  # [L, R, Q, N]
    assignment = np.full(costs.shape[:3], -1)
    for row, count in enumerate(targets.counts):
        for layer in range(len(costs)):
            queries, shown = linear_sum_assignment(_finite(costs[layer, row, :, :count]))
            assignment[layer, row, queries] = shown
    return torch.from_numpy(assignment).to(logits.device, non_blocking=True)


def match_costs(logits: Tensor, boxes: Tensor, targets: PromptTargets, mask: Tensor, config: LossConfig) -> Tensor:
    """What it costs each query to show each box: [L, R, Q, N] float32; see `match`."""
    costs = config.matching
    with torch.autocast(logits.device.type, enabled=False):
        class_cost = _class_cost(logits.float(), targets.tokens, mask, config)  # [L, R, Q, N]
    pair = boxes.float().unsqueeze(-2), targets.boxes.unsqueeze(1)  # [L, R, Q, 1, 4], [R, 1, N, 4]
    return costs.class_weight * class_cost + costs.l1 * terms.l1(*pair) + costs.giou * terms.giou(*pair)


def _class_cost(logits: Tensor, tokens: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """[L, R, Q, T], [R, N, T] bool, [R, T] bool -> [L, R, Q, N], low where the query says what the phrase says."""
    kind, alpha, gamma = config.matching.class_cost, config.focal_alpha, config.focal_gamma
    probability = logits.masked_fill(~mask.unsqueeze(1), 0.0).sigmoid()  # [L, R, Q, T]
    positive = -alpha * (1 - probability) ** gamma * (probability + _EPS[kind]).log()
    negative = -(1 - alpha) * probability**gamma * (1 - probability + _EPS[kind]).log()
    weights = tokens.to(logits.dtype)
    if kind == "mean":
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)
    cost = (positive - negative) @ weights.mT  # [L, R, Q, N]
    if kind == "sum":  # the tokens that do not name the box count as well: negative * (1 - weights)
        cost = cost + (negative * mask.unsqueeze(1)).sum(dim=-1, keepdim=True)
    return cost


def _finite(cost: np.ndarray) -> np.ndarray:
    """[Q, N], where what is not finite costs more than could be saved by it anywhere else."""
    finite = np.isfinite(cost)
    if finite.all():
        return cost
    known = cost[finite].astype(np.float64) if finite.any() else np.zeros(1)
    return np.where(finite, cost, known.max() + (np.ptp(known) + 1) * min(cost.shape))

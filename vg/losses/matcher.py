"""Hungarian matching (Carion et al. 2020): the assignment of boxes to queries with the lowest cost, in every layer."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vg.losses import terms
from vg.losses.config import LossConfig
from vg.types import PromptTargets

# Keep the logarithm of a probability finite. Published values: they determine the cost of logits below -18 (mean) or
# -27 (sum), and of those above 16, where 1 - p is 0 in float32.
_EPS = {"mean": 1e-8, "sum": 1e-12}


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: PromptTargets, mask: Tensor, config: LossConfig) -> Tensor:
    """Match the queries of every layer and prompt with the boxes of the prompt.

    Args:
        logits: [L, R, Q, T]; values at padded tokens are ignored. Padded queries are -inf everywhere, in all layers.
        boxes: [L, R, Q, 4] cxcywh 0..1.
        mask: [R, T] bool, True = a real token.

    Returns:
        [L, R, Q] int64, the index of the matched box, -1 for background and padded queries. If there are more boxes
        than queries without padding, the subset with the lowest cost is matched. Non-finite costs rank below all finite
        ones.
    """
    costs = match_costs(logits, boxes, targets, mask, config)
    is_padding = ~is_valid(logits[0], mask).any(dim=-1)  # [R, Q]
    column = is_padding.expand(costs.shape[:-1]).unsqueeze(-1)  # of the costs, so that one copy to the host is enough
    values = _to_host(torch.cat((costs, column.to(costs.dtype)), dim=-1)).numpy()  # [L, R, Q, N + 1]
    # Page-locked, so that the copy back does not wait for the device.
    assignment = torch.full(costs.shape[:3], -1, pin_memory=costs.is_cuda)
    found = assignment.numpy()  # the same memory
    for row, count in enumerate(targets.counts):
        real = np.flatnonzero(values[0, row, :, -1] == 0)  # indices of the queries without padding
        for layer in range(len(values)):
            cost = values[layer, row, :, :count]
            queries, matched = linear_sum_assignment(_finite(cost if len(real) == len(cost) else cost[real]))
            found[layer, row, real[queries]] = matched
    return assignment.to(costs.device, non_blocking=costs.device.type != "mps")


def _to_host(costs: Tensor) -> Tensor:
    """Copy the costs to the host: the only host-device synchronization of a training step."""
    return torch.empty(costs.shape, dtype=costs.dtype, pin_memory=costs.is_cuda).copy_(costs)


def match_costs(logits: Tensor, boxes: Tensor, targets: PromptTargets, mask: Tensor, config: LossConfig) -> Tensor:
    """Compute the cost of matching every query with every box: [L, R, Q, N] float32; arguments as in `match`."""
    costs = config.matching
    with torch.autocast(logits.device.type, enabled=False):
        class_cost = _class_cost(logits.float(), targets.positive_map, mask, config)  # [L, R, Q, N]
    pair = boxes.float().unsqueeze(-2), targets.boxes.unsqueeze(1)  # [L, R, Q, 1, 4], [R, 1, N, 4]
    return costs.class_weight * class_cost + costs.l1 * terms.l1(*pair) + costs.giou * terms.giou(*pair)


def _class_cost(logits: Tensor, positive_map: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """[L, R, Q, T], [R, N, T] bool, [R, T] bool -> [L, R, Q, N], low if the tokens of the phrase have high logits."""
    reduction, alpha, gamma = config.matching.class_cost, config.focal_alpha, config.focal_gamma
    probability = logits.masked_fill(~mask.unsqueeze(1), 0.0).sigmoid()  # [L, R, Q, T]
    positive = -alpha * (1 - probability) ** gamma * (probability + _EPS[reduction]).log()
    negative = -(1 - alpha) * probability**gamma * (1 - probability + _EPS[reduction]).log()
    weights = positive_map.to(logits.dtype)
    if reduction == "mean":
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)
    cost = (positive - negative) @ weights.mT  # [L, R, Q, N]
    if reduction == "sum":  # tokens of other phrases count, too: negative * (1 - weights)
        cost = cost + (negative * mask.unsqueeze(1)).sum(dim=-1, keepdim=True)
    return cost


def _finite(cost: np.ndarray) -> np.ndarray:
    """Replace non-finite costs [Q, N] by one so high that such a pair is matched only if nothing else is left."""
    finite = np.isfinite(cost)
    if finite.all():
        return cost
    values = cost[finite].astype(np.float64) if finite.any() else np.zeros(1)
    return np.where(finite, cost, values.max() + (np.ptp(values) + 1) * min(cost.shape))


def is_valid(logits: Tensor, mask: Tensor) -> Tensor:
    """[..., R, Q, T], [R, T] bool -> [..., R, Q, T] bool, False where the token or the query is padding."""
    return mask.unsqueeze(1) & ~logits.isneginf()  # padded queries are -inf everywhere; NaN is not padding

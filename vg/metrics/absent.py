"""Tells how well the score of the best box says whether the image shows what a phrase names at all."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc, binary_roc

THRESHOLD = 0.5  # a phrase whose best box scores less is taken for absent
FALSE_ALARMS = (0.01, 0.05, 0.1, 0.2, 0.5)  # where the ROC curve is read


def absent_numbers(scores: np.ndarray, present: np.ndarray, threshold: float = THRESHOLD) -> dict[str, float]:
    """Numbers, all 0..1, about expressions of which some name nothing in their image.

    Args:
        scores: [E] 0..1, of the best box of each expression; 0 where there is none.
        present: [E] bool, whether the expression names something.
        threshold: an expression whose best box scores less is taken to name nothing.

    Returns:
        auc: area under the ROC curve, the probability that an expression that names something scores higher than one
            that names nothing.
        roc@0.01, roc@0.05, ...: points of that curve, the share of those naming something that score above the
            threshold which this share of those naming nothing exceeds.
        n_acc, t_acc: share of expressions naming nothing that score below the threshold, and of those naming something
            that reach it (no-target and target accuracy of Liu et al. 2023, arXiv 2306.00968).
        Only n_acc, or nothing, where there are no expressions of the one or the other kind.
    """
    if present.all():
        return {}
    numbers = {"n_acc": float((scores[~present] < threshold).mean())}
    if present.any():
        score, label = torch.from_numpy(scores).double(), torch.from_numpy(present).long()  # [E]
        false_alarms, hits, _ = binary_roc(score, label)  # [points], both rising from 0 to 1
        numbers["t_acc"] = float((scores[present] >= threshold).mean())
        numbers["auc"] = float(binary_auroc(score, label))
        for share in FALSE_ALARMS:
            last = int(torch.searchsorted(false_alarms, share, right=True)) - 1  # the best point up to this share
            numbers[f"roc@{share}"] = float(hits[last])
    return numbers

"""How well the best score separates phrases with an object in the image from phrases without one."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc, binary_roc

THRESHOLD = 0.5  # a phrase whose best box scores less is predicted absent
FALSE_POSITIVE_RATES = (0.01, 0.05, 0.1, 0.2, 0.5)  # where the ROC curve is sampled


def absence_metrics(scores: np.ndarray, present: np.ndarray, threshold: float = THRESHOLD) -> dict[str, float]:
    """Compute metrics, all in 0..1, of expressions of which some have no object in their image.

    Args:
        scores: [E] 0..1, score of the best box of each expression; 0 without a box.
        present: [E] bool, whether the expression has an object.
        threshold: an expression whose best box scores less is predicted absent.

    Returns:
        auc: area under the ROC curve, the probability that a present expression scores higher than an absent one.
        roc@0.01, roc@0.05, ...: points of that curve, the highest true positive rate at this false positive rate.
        n_acc, t_acc: share of absent expressions that score below the threshold, and of present ones that reach it
            (no-target and target accuracy of Liu et al. 2023, arXiv 2306.00968).
        Only n_acc if all expressions are absent; nothing if all are present.
    """
    if present.all():
        return {}
    metrics = {"n_acc": float((scores[~present] < threshold).mean())}
    if present.any():
        score, label = torch.from_numpy(scores).double(), torch.from_numpy(present).long()  # [E]
        false_positive_rate, true_positive_rate, _ = binary_roc(score, label)  # [points], both ascending from 0 to 1
        metrics["t_acc"] = float((scores[present] >= threshold).mean())
        metrics["auc"] = float(binary_auroc(score, label))
        for rate in FALSE_POSITIVE_RATES:
            last = int(torch.searchsorted(false_positive_rate, rate, right=True)) - 1  # best point up to this rate
            metrics[f"roc@{rate}"] = float(true_positive_rate[last])
    return metrics

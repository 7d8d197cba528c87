"""Metric of generalized expressions, with any number of boxes: the protocol of generalized REC (gRefCOCO)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vg.boxes import giou, to_pixels, to_thousandths
from vg.metrics.absent import FALSE_POSITIVE_RATES, absence_metrics
from vg.metrics.collected import CollectingMetric
from vg.metrics.result import MetricResult
from vg.types import Prediction, Target

SCORE_THRESHOLD = 0.7  # boxes with lower scores are dropped
OVERLAP_THRESHOLD = 0.5


class GrecMetric(CollectingMetric):
    """Collects predictions and targets over all batches and processes and computes the metrics of gRefCOCO.

    `compute` returns these metrics, all but the counts in 0..1 (He et al. 2023, arXiv 2308.16182):
        f1: share of expressions with F1 = 1: every ground-truth box is matched with a predicted box of its own and no
            predicted box is left over; an absent expression has no predicted box.
        n_acc, t_acc: share of absent expressions without a box, and of present expressions with at least one box.
        auc, roc@0.01, ...: of the score of the best box, see `vg.metrics.absent.absence_metrics`.
        num_expressions, num_absent: number of all expressions, and of absent ones.
    """

    label = "F1 = 1"
    protocol = (
        f"all boxes that score at least {SCORE_THRESHOLD}, each expression counts, generalized IoU >= "
        f"{OVERLAP_THRESHOLD} in pixels of the original image"
    )
    metric_names = ("f1", "n_acc", "t_acc", "auc", *(f"roc@{rate}" for rate in FALSE_POSITIVE_RATES))
    columns: ClassVar[dict[str, Tensor]] = {  # of E expressions
        "ids": torch.empty(0, dtype=torch.int64),  # [E] hash of the sample id
        "correct": torch.empty(0, dtype=torch.bool),  # [E] whether F1 = 1
        "present": torch.empty(0, dtype=torch.bool),  # [E] whether there is a ground-truth box
        "top_scores": torch.empty(0),  # [E] of the best box, 0 without a box
    }

    def _rows(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> dict[str, Tensor]:
        kept = [prediction.boxes[prediction.scores >= SCORE_THRESHOLD].float() for prediction in predictions]
        correct = [
            is_correct(boxes, to_pixels(target.boxes.to(boxes.device), target.size))
            for boxes, target in zip(kept, targets, strict=True)
        ]
        return {
            "correct": torch.tensor(correct),
            "present": torch.tensor([len(target.boxes) > 0 for target in targets]),
            "top_scores": torch.tensor([float(p.scores[0]) if len(p.scores) else 0.0 for p in predictions]),
        }

    def compute(self) -> MetricResult:
        ids, values = self.per_sample()
        absent = np.isnan(values["t_acc"])  # [U]
        metrics = {"f1": float(values["f1"].mean())}
        if not absent.all():
            metrics["t_acc"] = float(np.nanmean(values["t_acc"]))
        metrics |= absence_metrics(values["score"], ~absent, SCORE_THRESHOLD)
        return MetricResult(metrics | {"num_expressions": len(ids), "num_absent": int(absent.sum())}, {})

    def _per_sample(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        rows, first, _ = self._collected()
        correct, present, score = (rows[name][first] for name in ("correct", "present", "top_scores"))
        has_box = score >= SCORE_THRESHOLD
        return rows["ids"][first], {
            "f1": correct.astype(np.float64),
            "n_acc": np.where(present, np.nan, ~has_box),
            "t_acc": np.where(present, has_box, np.nan),
            "score": score,
        }


def is_correct(boxes: Tensor, true_boxes: Tensor) -> bool:
    """Return whether F1 = 1 for boxes [K, 4] and ground-truth boxes [N, 4], xyxy pixels.

    Pairs are matched greedily by descending GIoU, as in the published code; the paper uses IoU.
    """
    if len(boxes) != len(true_boxes):
        return False
    overlap = giou(to_thousandths(boxes)[:, None], to_thousandths(true_boxes)[None])  # [K, N]
    for _ in range(len(boxes)):
        best = int(overlap.argmax())
        row, column = divmod(best, len(true_boxes))
        if overlap[row, column] < OVERLAP_THRESHOLD:
            return False
        overlap[row, :] = overlap[:, column] = -1.0
    return True

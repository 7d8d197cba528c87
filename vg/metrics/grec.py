"""Judges any number of boxes per expression, none among them: the protocol of generalized REC (gRefCOCO)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vg.boxes import giou, to_pixels
from vg.metrics.absent import FALSE_ALARMS, absent_numbers
from vg.metrics.collected import CollectingMetric, check_pairs, hashed
from vg.types import Prediction, Target

SCORE_THRESHOLD = 0.7  # boxes that score lower are no answer
OVERLAP_THRESHOLD = 0.5


class GrecMetric(CollectingMetric):
    """Collects predictions and targets over all batches and processes and computes the numbers of gRefCOCO.

    `compute` returns a flat dict, all but the counts in 0..1 (He et al. 2023, arXiv 2308.16182):
        f1: share of all expressions that are answered without any fault (F1 = 1): every thing they name is found by a
            box of its own and no box is left over; where they name nothing, there is no box.
        n_acc, t_acc: share of the expressions naming nothing that get no box, and of the others that get some.
        auc, roc@0.01, ...: of the score of the best box, see `vg.metrics.absent.absent_numbers`.
        num_expressions, num_absent: how many there are, and how many of them name nothing.
    """

    title = "F1 = 1"
    protocol = (
        f"all boxes that score at least {SCORE_THRESHOLD}, each expression counts, generalized IoU >= "
        f"{OVERLAP_THRESHOLD} in pixels of the original image"
    )
    numbers = ("f1", "n_acc", "t_acc", "auc", *(f"roc@{share}" for share in FALSE_ALARMS))
    columns: ClassVar[dict[str, Tensor]] = {  # of E expressions
        "ids": torch.empty(0, dtype=torch.int64),  # [E] hash of the sample id
        "correct": torch.empty(0, dtype=torch.bool),  # [E] answered without a fault
        "present": torch.empty(0, dtype=torch.bool),  # [E] whether there is something to find
        "top_scores": torch.empty(0),  # [E] of the best box, 0 where there is none
    }

    ids: list[Tensor]
    correct: list[Tensor]
    present: list[Tensor]
    top_scores: list[Tensor]

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Add a batch.

        Args:
            predictions: boxes xyxy in pixels of the original image, best first, on any device.
            targets: the same samples in the same order, boxes cxcywh in 0..1.

        Raises:
            ValueError: predictions and targets are not of the same samples.
        """
        check_pairs(predictions, targets)
        if not targets:
            return
        answered = [each.boxes[each.scores >= SCORE_THRESHOLD].float() for each in predictions]
        true_boxes = [
            to_pixels(target.boxes.to(each.device), target.size) for each, target in zip(answered, targets, strict=True)
        ]
        self._append(
            {
                "ids": torch.tensor([hashed(target.id) for target in targets]),
                "correct": torch.tensor([faultless(*pair) for pair in zip(answered, true_boxes, strict=True)]),
                "present": torch.tensor([len(target.boxes) > 0 for target in targets]),
                "top_scores": torch.tensor(
                    [float(each.scores[0]) if len(each.scores) else 0.0 for each in predictions]
                ),
            }
        )

    def compute(self) -> dict[str, float]:
        """The numbers described above, over what all processes have seen; ValueError if that is nothing."""
        ids, values = self._per_sample()
        if not len(ids):
            raise ValueError("GrecMetric saw no expression: the evaluated data is empty or all of it was skipped")
        absent = np.isnan(values["t_acc"])  # [U]
        numbers = {"f1": float(values["f1"].mean())}
        if not absent.all():
            numbers["t_acc"] = float(np.nanmean(values["t_acc"]))
        numbers |= absent_numbers(values["score"], ~absent, SCORE_THRESHOLD)
        return numbers | {"num_expressions": len(ids), "num_absent": int(absent.sum())}

    def _per_sample(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        state = self._collected()
        ids, first = np.unique(state["ids"], return_index=True)  # [U]
        correct, present, score = (state[name][first] for name in ("correct", "present", "top_scores"))
        answered = score >= SCORE_THRESHOLD
        return ids, {
            "f1": correct.astype(np.float64),
            "n_acc": np.where(present, np.nan, ~answered),
            "t_acc": np.where(present, answered, np.nan),
            "score": score,
        }


def faultless(boxes: Tensor, true_boxes: Tensor) -> bool:
    """Whether boxes [K, 4] and true boxes [N, 4], xyxy pixels, are pairs that overlap enough.

    Pairs are made greedily, the best first, and by GIoU, where the paper speaks of IoU: the published code does so.
    """
    if len(boxes) != len(true_boxes):
        return False
    overlap = giou(boxes[:, None], true_boxes[None])  # [K, N]
    for _ in range(len(boxes)):
        best = int(overlap.argmax())
        row, column = divmod(best, len(true_boxes))
        if overlap[row, column] < OVERLAP_THRESHOLD:
            return False
        overlap[row, :] = overlap[:, column] = -1.0
    return True

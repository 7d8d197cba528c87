"""Judges one box per expression: mean IoU, accuracy at IoU thresholds, and average precision through pycocotools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vg.boxes import iou, to_pixels
from vg.metrics.absent import FALSE_ALARMS, absent_numbers
from vg.metrics.average_precision import Boxes, mean_defined, precision_and_recall
from vg.metrics.collected import CollectingMetric, check_pairs, hashed
from vg.types import Prediction, Target

ACCURACY_THRESHOLDS = (0.5, 0.75, 0.9)
RECALL_THRESHOLD = 0.5
RECALL_BOXES = (1, 5, 10)
AP_THRESHOLDS = (0.5, 0.75)
KIND_BYTES = 64  # a kind travels between processes as a row of UTF-8 bytes, padded with zeros


class RecMetric(CollectingMetric):
    """Collects predictions and targets over all batches and processes and computes the numbers of REC.

    `compute` returns a flat dict, all but the counts in 0..1. Of the expressions that name something:
        miou: mean IoU of the best (first) predicted box and the true box; no predicted box counts as IoU 0.
        acc@0.5, acc@0.75, acc@0.9: share of expressions whose best box has at least that IoU.
        recall@1, recall@5, recall@10: share of expressions with an IoU of at least 0.5 among so many best boxes.
        map@50, map@75: COCO average precision of all predicted boxes and their scores at that IoU, where every
            expression is an image of its own with one object of one category.
        num_expressions: how many expressions these are about.
    Where the data has expressions that name nothing in their image (targets without a box):
        n_acc, t_acc, auc, roc@0.01, ...: see `vg.metrics.absent.absent_numbers`.
        num_absent: how many name nothing.
    Samples with a `Target.expression_type` are also reported per kind, as "<kind>/miou" and so on.
    """

    title = "mIoU"
    protocol = "highest-scored box, each expression counts, IoU in pixels of the original image"
    numbers = (
        "miou",
        *(f"acc@{threshold}" for threshold in ACCURACY_THRESHOLDS),
        *(f"recall@{number}" for number in RECALL_BOXES),
        *(f"map@{100 * threshold:.0f}" for threshold in AP_THRESHOLDS),
        *("n_acc", "t_acc", "auc"),
        *(f"roc@{share}" for share in FALSE_ALARMS),
    )
    columns: ClassVar[dict[str, Tensor]] = {  # of E expressions with K predicted boxes altogether
        "ids": torch.empty(0, dtype=torch.int64),  # [E] hash of the sample id
        "kinds": torch.empty(0, KIND_BYTES, dtype=torch.uint8),  # [E, KIND_BYTES]
        "true_boxes": torch.empty(0, 4),  # [E, 4] xyxy pixels; NaN where the expression names nothing
        "counts": torch.empty(0, dtype=torch.int64),  # [E] how many boxes were predicted for each expression
        "boxes": torch.empty(0, 4),  # [K, 4] xyxy pixels, expression after expression, best box first
        "scores": torch.empty(0),  # [K]
    }

    ids: list[Tensor]
    kinds: list[Tensor]
    true_boxes: list[Tensor]
    counts: list[Tensor]
    boxes: list[Tensor]
    scores: list[Tensor]

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Add a batch.

        Args:
            predictions: boxes xyxy in pixels of the original image, best first, on any device.
            targets: the same samples in the same order, each with at most one box, cxcywh in 0..1.

        Raises:
            ValueError: predictions and targets are not of the same samples, a target has several boxes, or the name
                of a kind is too long. Nothing of the batch is added then.
        """
        check_pairs(predictions, targets)
        for target in targets:
            if len(target.boxes) > 1:
                raise ValueError(
                    f"sample {target.id!r} has {len(target.boxes)} true boxes, but RecMetric judges expressions with "
                    "at most one: use a data set of referring expressions or the COCO metric"
                )
        if not targets:
            return
        self._append(
            {
                "ids": torch.tensor([hashed(target.id) for target in targets]),
                "kinds": _encode([target.expression_type for target in targets]),
                "true_boxes": torch.cat([_true_box(target) for target in targets]),
                "counts": torch.tensor([len(prediction.boxes) for prediction in predictions]),
                "boxes": torch.cat([prediction.boxes.reshape(-1, 4) for prediction in predictions]),
                "scores": torch.cat([prediction.scores for prediction in predictions]),
            }
        )

    def compute(self) -> dict[str, float]:
        """The numbers described above, over what all processes have seen.

        Raises:
            ValueError: there is nothing to judge, or different samples share an id.
        """
        judged = self._judged()
        results: dict[str, float] = {}
        for kind in ("", *sorted(set(judged.kinds) - {""})):
            rows = judged.kinds == kind if kind else np.ones(len(judged.ids), dtype=bool)  # [U] of these expressions
            numbers = _numbers(rows, judged.true_boxes, judged.owner, judged.boxes, judged.scores)
            results |= {f"{kind}/{name}" if kind else name: number for name, number in numbers.items()}
        return results

    def _per_sample(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Also `score`, of the best box, 0 where there is none."""
        judged = self._judged()
        present = ~np.isnan(judged.true_boxes[:, 0])  # [U]
        answered, best = np.unique(judged.owner, return_index=True)
        score = np.zeros(len(present))  # [U]
        score[answered] = judged.scores[best]
        overlap = _overlaps(judged.true_boxes, judged.owner, judged.boxes)  # [K]
        top_iou = np.zeros(len(present))  # [U]
        top_iou[answered] = overlap[best]
        values = {"miou": top_iou}
        values |= {f"acc@{threshold}": (top_iou >= threshold).astype(float) for threshold in ACCURACY_THRESHOLDS}
        rank = np.arange(len(judged.owner)) - best[np.searchsorted(answered, judged.owner)]  # [K]
        for limit in RECALL_BOXES:
            values[f"recall@{limit}"] = np.zeros(len(present))
            values[f"recall@{limit}"][judged.owner[(rank < limit) & (overlap >= RECALL_THRESHOLD)]] = 1
        return judged.ids, {name: np.where(present, value, np.nan) for name, value in values.items()} | {"score": score}

    def _judged(self) -> _Judged:
        state = self._collected()
        if not len(state["ids"]):
            raise ValueError("RecMetric saw no expression: the evaluated data is empty or all of it was skipped")

        ids, first, sample = np.unique(state["ids"], return_index=True, return_inverse=True)  # [U], [E] -> 0..U-1
        if not np.allclose(state["true_boxes"], state["true_boxes"][first][sample], rtol=0, atol=0.5, equal_nan=True):
            raise ValueError("samples with the same id have different true boxes: make the ids of the data unique")
        is_first = np.zeros(len(sample), dtype=bool)  # [E]
        is_first[first] = True
        kept = np.repeat(is_first, state["counts"])  # [K]
        return _Judged(
            ids=ids,
            kinds=_decode(state["kinds"][first]),
            true_boxes=state["true_boxes"][first].astype(np.float64),
            owner=np.repeat(sample, state["counts"])[kept],
            boxes=state["boxes"][kept].astype(np.float64),
            scores=state["scores"][kept].astype(np.float64),
        )


class _Judged(NamedTuple):
    """All that was seen of U expressions, each once, with K predicted boxes altogether."""

    ids: np.ndarray  # [U] hashed
    kinds: np.ndarray  # [U] str
    true_boxes: np.ndarray  # [U, 4] xyxy pixels, NaN where there is none
    owner: np.ndarray  # [K] the expression each box was predicted for, 0..U-1
    boxes: np.ndarray  # [K, 4] xyxy pixels, best first within an expression
    scores: np.ndarray  # [K]


def _overlaps(true_boxes: np.ndarray, owner: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """[K] IoU of each predicted box with the true one, 0 where there is none."""
    overlap = iou(torch.from_numpy(boxes), torch.from_numpy(true_boxes[owner])).numpy()
    return np.nan_to_num(overlap)


def _numbers(
    rows: np.ndarray, true_boxes: np.ndarray, owner: np.ndarray, boxes: np.ndarray, scores: np.ndarray
) -> dict[str, float]:
    """The numbers of some of U expressions.

    Args:
        rows: [U] bool, which ones.
        true_boxes: [U, 4] xyxy pixels, NaN where there is none.
        owner: [K] int, the expression that each box was predicted for; `boxes` [K, 4] and `scores` [K] likewise.
    """
    chosen = rows[owner]
    owner, boxes, scores = (np.cumsum(rows) - 1)[owner[chosen]], boxes[chosen], scores[chosen]  # of now M expressions
    true_boxes = true_boxes[rows]  # [M, 4]
    present = ~np.isnan(true_boxes[:, 0])  # [M]
    top_score = np.zeros(len(present))  # [M]
    answered, best, inverse = np.unique(owner, return_index=True, return_inverse=True)
    top_score[answered] = scores[best]
    absent = absent_numbers(top_score, present)
    if absent:
        absent["num_absent"] = int((~present).sum())
        if not present.any():
            return absent

    overlap = _overlaps(true_boxes, owner, boxes)  # [K]
    rank = np.arange(len(owner)) - best[inverse]  # [K] 0 for the best box of an expression
    top_iou = np.zeros(len(present))  # [M]
    top_iou[answered] = overlap[best]
    top_iou = top_iou[present]
    numbers = {"miou": float(top_iou.mean())}
    for threshold in ACCURACY_THRESHOLDS:
        numbers[f"acc@{threshold}"] = float((top_iou >= threshold).mean())
    for limit in RECALL_BOXES:
        found = np.unique(owner[(rank < limit) & (overlap >= RECALL_THRESHOLD)])
        numbers[f"recall@{limit}"] = len(found) / int(present.sum())
    of_present = present[owner]  # [K]
    image = (np.cumsum(present) - 1)[owner[of_present]]
    precision, _ = precision_and_recall(
        int(present.sum()),
        1,
        Boxes(np.arange(present.sum()), np.zeros(present.sum(), int), true_boxes[present]),
        Boxes(image, np.zeros(len(image), int), boxes[of_present]),
        scores[of_present],
        iou_thresholds=AP_THRESHOLDS,
    )
    for threshold, values in zip(AP_THRESHOLDS, precision, strict=True):
        numbers[f"map@{100 * threshold:.0f}"] = mean_defined(values)
    return numbers | {"num_expressions": int(present.sum())} | absent


def _true_box(target: Target) -> Tensor:
    """[1, 4] xyxy pixels; NaN if there is none."""
    return to_pixels(target.boxes, target.size) if len(target.boxes) else target.boxes.new_full((1, 4), float("nan"))


def _encode(kinds: Sequence[str]) -> Tensor:
    """E strings -> [E, KIND_BYTES] uint8."""
    encoded = [kind.encode() for kind in kinds]
    for kind, name in zip(kinds, encoded, strict=True):
        if len(name) > KIND_BYTES:
            raise ValueError(f"the kind {kind!r} has {len(name)} bytes: shorten its name to at most {KIND_BYTES}")
    return torch.from_numpy(np.array(encoded, dtype=f"S{KIND_BYTES}").view(np.uint8).reshape(len(kinds), KIND_BYTES))


def _decode(kinds: np.ndarray) -> np.ndarray:
    """[E, KIND_BYTES] uint8 -> [E] str."""
    return np.char.decode(np.ascontiguousarray(kinds).view(f"S{KIND_BYTES}")[:, 0], "utf-8")

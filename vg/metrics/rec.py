"""Metric of referring expressions, one box each: mean IoU, accuracy at IoU thresholds and average precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vg.boxes import iou, to_pixels
from vg.metrics.absent import FALSE_POSITIVE_RATES, absence_metrics
from vg.metrics.average_precision import Boxes, mean_defined, precision_and_recall
from vg.metrics.collected import CollectingMetric, check_pairs, stable_hash
from vg.metrics.result import MetricResult
from vg.types import Prediction, Target

ACCURACY_THRESHOLDS = (0.5, 0.75, 0.9)
RECALL_THRESHOLD = 0.5
RECALL_BOXES = (1, 5, 10)
AP_THRESHOLDS = (0.5, 0.75)
TYPE_BYTES = 64  # processes exchange an expression type as a row of UTF-8 bytes, padded with zeros


class RecMetric(CollectingMetric):
    """Collects predictions and targets over all batches and processes and computes the metrics of REC.

    `compute` returns these metrics, all but the counts in 0..1. Of the expressions with an object in the image:
        miou: mean IoU of the best (first) predicted box and the ground-truth box; 0 without a predicted box.
        acc@0.5, acc@0.75, acc@0.9: share of expressions whose best box has at least that IoU.
        recall@1, recall@5, recall@10: share of expressions with an IoU of at least 0.5 among that many best boxes.
        map@50, map@75: COCO average precision of all predicted boxes and their scores at that IoU, with every
            expression as an image of its own with one object of one category (computed by pycocotools).
        num_expressions: number of these expressions.
    If the data has absent expressions (targets without a box):
        n_acc, t_acc, auc, roc@0.01, ...: see `vg.metrics.absent.absence_metrics`.
        num_absent: number of absent expressions.
    Each `Target.expression_type` other than "" is a group with the same metrics.
    """

    label = "mIoU"
    protocol = "highest-scored box, each expression counts, IoU in pixels of the original image"
    metric_names = (
        "miou",
        *(f"acc@{threshold}" for threshold in ACCURACY_THRESHOLDS),
        *(f"recall@{limit}" for limit in RECALL_BOXES),
        *(f"map@{100 * threshold:.0f}" for threshold in AP_THRESHOLDS),
        *("n_acc", "t_acc", "auc"),
        *(f"roc@{rate}" for rate in FALSE_POSITIVE_RATES),
    )
    columns: ClassVar[dict[str, Tensor]] = {  # of E expressions with K predicted boxes in total
        "ids": torch.empty(0, dtype=torch.int64),  # [E] hash of the sample id
        "types": torch.empty(0, TYPE_BYTES, dtype=torch.uint8),  # [E, TYPE_BYTES] expression types
        "true_boxes": torch.empty(0, 4),  # [E, 4] xyxy pixels; NaN for an absent expression
        "counts": torch.empty(0, dtype=torch.int64),  # [E] number of predicted boxes
        "boxes": torch.empty(0, 4),  # [K, 4] xyxy pixels, expression by expression, best box first
        "scores": torch.empty(0),  # [K]
    }

    ids: list[Tensor]
    types: list[Tensor]
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
                of an expression type is too long. Nothing of the batch is added then.
        """
        check_pairs(predictions, targets)
        for target in targets:
            if len(target.boxes) > 1:
                raise ValueError(
                    f"sample {target.id!r} has {len(target.boxes)} ground-truth boxes, but RecMetric evaluates "
                    "expressions with at most one: use a dataset of referring expressions or the COCO metric"
                )
        if not targets:
            return
        self._append(
            {
                "ids": torch.tensor([stable_hash(target.id) for target in targets]),
                "types": _encode([target.expression_type for target in targets]),
                "true_boxes": torch.cat([_true_box(target) for target in targets]),
                "counts": torch.tensor([len(prediction.boxes) for prediction in predictions]),
                "boxes": torch.cat([prediction.boxes.reshape(-1, 4) for prediction in predictions]),
                "scores": torch.cat([prediction.scores for prediction in predictions]),
            }
        )

    def compute(self) -> MetricResult:
        """Compute the metrics of all samples of all processes.

        Raises:
            ValueError: there are no samples, or different samples share an id.
        """
        unique = self._unique()
        everything = _metrics(np.ones(len(unique.ids), dtype=bool), unique)
        types = sorted(set(unique.types) - {""})
        return MetricResult(everything, {str(type): _metrics(unique.types == type, unique) for type in types})

    def _per_sample(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Also return `score`, of the best box, 0 without a box."""
        unique = self._unique()
        present = ~np.isnan(unique.true_boxes[:, 0])  # [U]
        has_box, best = np.unique(unique.owner, return_index=True)
        score = np.zeros(len(present))  # [U]
        score[has_box] = unique.scores[best]
        overlap = _overlaps(unique.true_boxes, unique.owner, unique.boxes)  # [K]
        top_iou = np.zeros(len(present))  # [U]
        top_iou[has_box] = overlap[best]
        values = {"miou": top_iou}
        values |= {f"acc@{threshold}": (top_iou >= threshold).astype(float) for threshold in ACCURACY_THRESHOLDS}
        rank = np.arange(len(unique.owner)) - best[np.searchsorted(has_box, unique.owner)]  # [K]
        for limit in RECALL_BOXES:
            values[f"recall@{limit}"] = np.zeros(len(present))
            values[f"recall@{limit}"][unique.owner[(rank < limit) & (overlap >= RECALL_THRESHOLD)]] = 1
        return unique.ids, {name: np.where(present, value, np.nan) for name, value in values.items()} | {"score": score}

    def _unique(self) -> _Unique:
        """Return every expression once; raises ValueError if there are none, or different ones share an id."""
        rows = self._collected()
        if not len(rows["ids"]):
            raise ValueError("RecMetric got no expression: the evaluated data is empty or every sample was skipped")

        ids, first, sample = np.unique(rows["ids"], return_index=True, return_inverse=True)  # [U], [E] -> 0..U-1
        if not np.allclose(rows["true_boxes"], rows["true_boxes"][first][sample], rtol=0, atol=0.5, equal_nan=True):
            raise ValueError("samples with the same id have different ground-truth boxes: make the ids unique")
        is_first = np.zeros(len(sample), dtype=bool)  # [E]
        is_first[first] = True
        kept = np.repeat(is_first, rows["counts"])  # [K]
        return _Unique(
            ids=ids,
            types=_decode(rows["types"][first]),
            true_boxes=rows["true_boxes"][first].astype(np.float64),
            owner=np.repeat(sample, rows["counts"])[kept],
            boxes=rows["boxes"][kept].astype(np.float64),
            scores=rows["scores"][kept].astype(np.float64),
        )


class _Unique(NamedTuple):
    """U expressions without repeats, with K predicted boxes in total."""

    ids: np.ndarray  # [U] hashes
    types: np.ndarray  # [U] str, expression types
    true_boxes: np.ndarray  # [U, 4] xyxy pixels, NaN for an absent expression
    owner: np.ndarray  # [K] index of the expression of each box, 0..U-1
    boxes: np.ndarray  # [K, 4] xyxy pixels, best first within an expression
    scores: np.ndarray  # [K]


def _overlaps(true_boxes: np.ndarray, owner: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return [K] IoU of each predicted box and the ground-truth box of its expression, 0 for absent expressions."""
    overlap = iou(torch.from_numpy(boxes), torch.from_numpy(true_boxes[owner])).numpy()
    return np.nan_to_num(overlap)


def _metrics(rows: np.ndarray, unique: _Unique) -> dict[str, float]:
    """Compute the metrics of the expressions where `rows` [U] is True."""
    kept = rows[unique.owner]
    boxes, scores = unique.boxes[kept], unique.scores[kept]
    owner = (np.cumsum(rows) - 1)[unique.owner[kept]]  # [K] index among the M selected expressions
    true_boxes = unique.true_boxes[rows]  # [M, 4]
    present = ~np.isnan(true_boxes[:, 0])  # [M]
    top_score = np.zeros(len(present))  # [M]
    has_box, best, inverse = np.unique(owner, return_index=True, return_inverse=True)
    top_score[has_box] = scores[best]
    absence = absence_metrics(top_score, present)
    if absence:
        absence["num_absent"] = int((~present).sum())
        if not present.any():
            return absence

    overlap = _overlaps(true_boxes, owner, boxes)  # [K]
    rank = np.arange(len(owner)) - best[inverse]  # [K] 0 for the best box of an expression
    top_iou = np.zeros(len(present))  # [M]
    top_iou[has_box] = overlap[best]
    top_iou = top_iou[present]
    metrics = {"miou": float(top_iou.mean())}
    for threshold in ACCURACY_THRESHOLDS:
        metrics[f"acc@{threshold}"] = float((top_iou >= threshold).mean())
    for limit in RECALL_BOXES:
        matched = np.unique(owner[(rank < limit) & (overlap >= RECALL_THRESHOLD)])
        metrics[f"recall@{limit}"] = len(matched) / int(present.sum())
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
        metrics[f"map@{100 * threshold:.0f}"] = mean_defined(values)
    return metrics | {"num_expressions": int(present.sum())} | absence


def _true_box(target: Target) -> Tensor:
    """Return [1, 4] xyxy pixels, NaN without a box."""
    return to_pixels(target.boxes, target.size) if len(target.boxes) else target.boxes.new_full((1, 4), float("nan"))


def _encode(types: Sequence[str]) -> Tensor:
    """Encode E expression types as [E, TYPE_BYTES] uint8."""
    encoded = [type.encode() for type in types]
    for type, name in zip(types, encoded, strict=True):
        if len(name) > TYPE_BYTES:
            raise ValueError(f"the expression type {type!r} has {len(name)} bytes: use a name of at most {TYPE_BYTES}")
    return torch.from_numpy(np.array(encoded, dtype=f"S{TYPE_BYTES}").view(np.uint8).reshape(len(types), TYPE_BYTES))


def _decode(types: np.ndarray) -> np.ndarray:
    """Decode [E, TYPE_BYTES] uint8 to [E] str."""
    return np.char.decode(np.ascontiguousarray(types).view(f"S{TYPE_BYTES}")[:, 0], "utf-8")

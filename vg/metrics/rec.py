"""Metric of referring expressions, one box each: mean IoU, accuracy at IoU thresholds and average precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vg.boxes import iou, to_pixels, to_thousandths
from vg.metrics.absent import FALSE_POSITIVE_RATES, absence_metrics
from vg.metrics.average_precision import Boxes, mean_defined, precision_and_recall
from vg.metrics.collected import CollectingMetric
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

    def _rows(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> dict[str, Tensor]:
        for target in targets:
            if len(target.boxes) > 1:
                raise ValueError(
                    f"sample {target.id!r} has {len(target.boxes)} ground-truth boxes, but RecMetric evaluates "
                    "expressions with at most one: use a dataset of referring expressions or the COCO metric"
                )
        return {
            "types": _encode([target.expression_type for target in targets]),
            "true_boxes": torch.cat([_true_box(target) for target in targets]),
            "counts": torch.tensor([len(prediction.boxes) for prediction in predictions]),
            "boxes": torch.cat([prediction.boxes.reshape(-1, 4) for prediction in predictions]),
            "scores": torch.cat([prediction.scores for prediction in predictions]),
        }

    def compute(self) -> MetricResult:
        unique = self._unique()
        values = _values(unique)
        types = sorted(set(unique.types) - {""})
        groups = {str(type): _metrics(unique.types == type, unique, values) for type in types}
        return MetricResult(_metrics(np.ones(len(unique.ids), dtype=bool), unique, values), groups)

    def _per_sample(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        unique = self._unique()
        return unique.ids, _values(unique)

    def _unique(self) -> _Unique:
        """Return every expression once; raises ValueError if there are no expressions, or two share an id."""
        rows, first, sample = self._collected()
        if not np.allclose(rows["true_boxes"], rows["true_boxes"][first][sample], rtol=0, atol=0.5, equal_nan=True):
            raise ValueError("samples with the same id have different ground-truth boxes: make the ids unique")
        kept = np.repeat(first[sample] == np.arange(len(sample)), rows["counts"])  # [K] of the first repeat
        return _Unique(
            ids=rows["ids"][first],
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


def _values(unique: _Unique) -> dict[str, np.ndarray]:
    """Return [U] contributions to metrics that are means, NaN for absent expressions, and the `score` of the best box.

    Without a box the score is 0.
    """
    has_box, best, index = np.unique(unique.owner, return_index=True, return_inverse=True)
    boxes, true_boxes = map(torch.from_numpy, (unique.boxes, unique.true_boxes[unique.owner]))  # [K, 4] each
    overlap = iou(boxes, true_boxes).nan_to_num().numpy()  # [K]
    rounded = iou(to_thousandths(boxes), to_thousandths(true_boxes)).nan_to_num().numpy()  # [K] as mAP has it
    score, top_iou, top_rounded = np.zeros((3, len(unique.ids)))  # [U]
    score[has_box], top_iou[has_box], top_rounded[has_box] = unique.scores[best], overlap[best], rounded[best]
    values = {"miou": top_iou}
    values |= {f"acc@{threshold}": (top_rounded >= threshold).astype(float) for threshold in ACCURACY_THRESHOLDS}
    rank = np.arange(len(unique.owner)) - best[index]  # [K] 0 for the best box of an expression
    for limit in RECALL_BOXES:
        values[f"recall@{limit}"] = np.zeros(len(unique.ids))
        values[f"recall@{limit}"][unique.owner[(rank < limit) & (rounded >= RECALL_THRESHOLD)]] = 1
    absent = np.isnan(unique.true_boxes[:, 0])  # [U]
    return {name: np.where(absent, np.nan, value) for name, value in values.items()} | {"score": score}


def _metrics(rows: np.ndarray, unique: _Unique, values: dict[str, np.ndarray]) -> dict[str, float]:
    """Compute the metrics of the expressions where `rows` [U] is True."""
    present = rows & ~np.isnan(values["miou"])  # [U]
    absence = absence_metrics(values["score"][rows], present[rows])
    count = int(present.sum())
    if absence:
        absence["num_absent"] = int(rows.sum()) - count
    if not count:
        return absence
    metrics = {name: float(column[present].mean()) for name, column in values.items() if name != "score"}
    kept = present[unique.owner]  # [K]
    image = (np.cumsum(present) - 1)[unique.owner[kept]]
    precision, _ = precision_and_recall(
        1,
        Boxes(np.arange(count), np.zeros(count, int), unique.true_boxes[present]),
        Boxes(image, np.zeros(len(image), int), unique.boxes[kept]),
        unique.scores[kept],
        iou_thresholds=AP_THRESHOLDS,
    )
    for threshold, at_threshold in zip(AP_THRESHOLDS, precision, strict=True):
        metrics[f"map@{100 * threshold:.0f}"] = mean_defined(at_threshold)
    return metrics | {"num_expressions": count} | absence


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

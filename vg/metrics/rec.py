"""Judges one box per expression: mean IoU, accuracy at IoU thresholds, and average precision through pycocotools."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from vg.boxes import iou, to_pixels
from vg.types import Prediction, Target

ACCURACY_THRESHOLDS = (0.5, 0.75, 0.9)
AP_THRESHOLDS = (0.5, 0.75)
KIND_BYTES = 64  # a kind travels between processes as a row of UTF-8 bytes, padded with zeros

# What every process collects, for E expressions with K boxes altogether.
EMPTY_STATE = {
    "ids": torch.empty(0, dtype=torch.int64),  # [E] hash of the sample id
    "kinds": torch.empty(0, KIND_BYTES, dtype=torch.uint8),  # [E, KIND_BYTES]
    "true_boxes": torch.empty(0, 4),  # [E, 4] xyxy pixels
    "counts": torch.empty(0, dtype=torch.int64),  # [E] how many boxes were predicted for each expression
    "boxes": torch.empty(0, 4),  # [K, 4] xyxy pixels, expression after expression, best box first
    "scores": torch.empty(0),  # [K]
}


class RecMetric(Metric):
    """Collects predictions and targets over all batches and processes and computes the numbers of REC.

    A sample is known by its id: seen twice, as distributed evaluation pads its last batch with repeats, it counts
    once, and neither the order of the samples nor their distribution over processes changes a number.

    `compute` returns a flat dict, all but the last in 0..1:
        miou: mean IoU of the best (first) predicted box and the true box; no predicted box counts as IoU 0.
        acc@0.5, acc@0.75, acc@0.9: share of expressions whose best box has at least that IoU.
        map@50, map@75: COCO average precision of all predicted boxes and their scores at that IoU, where every
            expression is an image of its own with one object of one category.
        num_expressions: how many expressions these are about.
    Samples with a `Target.kind` are also reported per kind, as "<kind>/miou" and so on.
    """

    protocol = "highest-scored box, each expression counts, IoU in pixels of the original image"
    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    ids: list[Tensor]
    kinds: list[Tensor]
    true_boxes: list[Tensor]
    counts: list[Tensor]
    boxes: list[Tensor]
    scores: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in EMPTY_STATE:
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._append(EMPTY_STATE)  # or a process that saw nothing joins the exchange with the wrong shape and type

    def update(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> None:
        """Add a batch.

        Args:
            predictions: boxes xyxy in pixels of the original image, best first, on any device.
            targets: the same samples in the same order, each with exactly one box, cxcywh in 0..1.

        Raises:
            ValueError: predictions and targets are not of the same samples, a target has not exactly one box, or
                the name of a kind is too long. Nothing of the batch is added then.
        """
        if [prediction.id for prediction in predictions] != [target.id for target in targets]:
            raise ValueError(
                "predictions and targets must be of the same samples in the same order, got the ids "
                f"{[prediction.id for prediction in predictions]} and {[target.id for target in targets]}"
            )
        for target in targets:
            if len(target.boxes) != 1:
                raise ValueError(
                    f"sample {target.id!r} has {len(target.boxes)} true boxes, but RecMetric judges expressions with "
                    "exactly one: use a data set of referring expressions or the COCO metric"
                )
        if not targets:
            return
        self._append(
            {
                "ids": torch.tensor([_hash(target.id) for target in targets]),
                "kinds": _encode([target.kind for target in targets]),
                "true_boxes": torch.cat([to_pixels(target.boxes, target.size) for target in targets]),
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
        state = {name: dim_zero_cat(getattr(self, name)).cpu().numpy() for name in EMPTY_STATE}
        if not len(state["ids"]):
            raise ValueError("RecMetric saw no expression: the evaluated data is empty or all of it was skipped")

        _, first, sample = np.unique(state["ids"], return_index=True, return_inverse=True)  # [U], [E] -> 0..U-1
        if not np.allclose(state["true_boxes"], state["true_boxes"][first][sample], rtol=0, atol=0.5):
            raise ValueError("samples with the same id have different true boxes: make the ids of the data unique")
        is_first = np.zeros(len(sample), dtype=bool)  # [E]
        is_first[first] = True
        kept = np.repeat(is_first, state["counts"])  # [K]
        owner = np.repeat(sample, state["counts"])[kept]  # [K'] the expression each box was predicted for, 0..U-1
        boxes, scores = state["boxes"][kept].astype(np.float64), state["scores"][kept].astype(np.float64)
        true_boxes = state["true_boxes"][first].astype(np.float64)  # [U, 4]
        kinds = _decode(state["kinds"][first])  # [U]

        top_iou = np.zeros(len(first))  # [U]
        answered, best = np.unique(owner, return_index=True)
        top_iou[answered] = iou(torch.from_numpy(boxes[best]), torch.from_numpy(true_boxes[answered])).numpy()

        results: dict[str, float] = {}
        for kind in ("", *sorted(set(kinds) - {""})):
            rows = np.flatnonzero(kinds == kind) if kind else np.arange(len(first))  # of these expressions
            prefix = f"{kind}/" if kind else ""
            results[f"{prefix}miou"] = float(top_iou[rows].mean())
            for threshold in ACCURACY_THRESHOLDS:
                results[f"{prefix}acc@{threshold}"] = float((top_iou[rows] >= threshold).mean())
            chosen = np.isin(owner, rows)
            precision = average_precision(rows, true_boxes[rows], owner[chosen], boxes[chosen], scores[chosen])
            for threshold, value in zip(AP_THRESHOLDS, precision, strict=True):
                results[f"{prefix}map@{100 * threshold:.0f}"] = value
            results[f"{prefix}num_expressions"] = len(rows)
        return results

    def _append(self, rows: dict[str, Tensor]) -> None:
        for name, tensor in rows.items():
            getattr(self, name).append(tensor.detach().to(self.device, EMPTY_STATE[name].dtype))


def average_precision(
    image_ids: np.ndarray, true_boxes: np.ndarray, owners: np.ndarray, boxes: np.ndarray, scores: np.ndarray
) -> list[float]:
    """COCO average precision at AP_THRESHOLDS, 0..1, where every image has one object of one category.

    Args:
        image_ids: [E] int.
        true_boxes: [E, 4] xyxy pixels, of these images.
        owners: [K] int, the image that each box was predicted for.
        boxes: [K, 4] xyxy pixels.
        scores: [K].
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(_coco(image_ids, image_ids, true_boxes), _coco(image_ids, owners, boxes, scores), "bbox")
        evaluation.params.iouThrs = np.array(AP_THRESHOLDS)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]  # the convention of COCO
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"].mean(axis=(1, 2, 3, 4)).tolist()  # [thresholds, 101 recalls, 1, 1, 1]


def _coco(image_ids: np.ndarray, owners: np.ndarray, boxes: np.ndarray, scores: np.ndarray | None = None) -> COCO:
    """Boxes [N, 4] xyxy in the data structure of pycocotools, whose own `loadRes` fails where nothing was predicted."""
    corners = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)  # [N, 4] left, top, width, height
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id} for image_id in image_ids.tolist()],
        "categories": [{"id": 1}],
        "annotations": [
            {"id": row, "image_id": image_id, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for row, (image_id, box) in enumerate(zip(owners.tolist(), corners.tolist(), strict=True), start=1)
        ],  # ids from 1: pycocotools takes a match with the object of id 0 for none
    }
    if scores is not None:
        for annotation, score in zip(coco.dataset["annotations"], scores.tolist(), strict=True):
            annotation["score"] = score
    coco.createIndex()
    return coco


def _hash(sample_id: str) -> int:
    """63 bits, the non-negative half of int64; the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "big") >> 1


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

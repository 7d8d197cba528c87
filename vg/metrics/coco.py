"""Metric of detection, many boxes of many categories per image: the COCO metrics, computed by pycocotools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vg.boxes import area, to_pixels, to_thousandths
from vg.metrics.average_precision import ANY_AREA, Boxes, Curves, mean_defined, precision_and_recall, to_xywh
from vg.metrics.collected import CollectingMetric, stable_hash
from vg.metrics.result import MetricResult
from vg.types import Prediction, Target

AREAS = {"": ANY_AREA, "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, ANY_AREA[1])}
LIMITS = (1, 10, 100, 300, 1000)  # boxes per image and category
STANDARD, MOST = 100, 1000
AP_AT = {"50": 0, "75": 5}  # indices in vg.metrics.average_precision.IOU_THRESHOLDS
NO_COVERAGE = np.zeros(0, np.uint8)


class CocoMetric(CollectingMetric):
    """Collects predictions and targets over all batches and processes and computes the 12 COCO metrics, and more.

    A category is a phrase. With one list of phrases for all images these are the usual metrics; an image is not
    evaluated on phrases that are not in its prompt. Predicted boxes are not clipped to the image. The area of an object
    is in `Target.areas`, else it is the area of the box.

    `compute` returns these metrics, 0..1, or -1 without a ground-truth box:
        ap, ap50, ap75: mean over categories of the average precision, over the IoU thresholds 0.5, 0.55, ..., 0.95 or
            at one of them; ap_small, ap_medium, ap_large: of objects below 32 x 32, below 96 x 96 and above.
        ar@1, ar@10, ar@100: mean recall with at most that many boxes per image and category; ar_small, ... with 100.
        ap50@1000, ..., ar@300, ar@1000, ...: with that many boxes instead of 100, as mmdetection prints them.
        num_images, num_boxes, num_categories: number of evaluated images, boxes and categories, without crowd regions.
    Every category with a ground-truth box is a group with ap, ap50, ap75 and num_boxes.
    """

    label = "AP"
    protocol = "COCO average precision, 100 boxes per image and category, IoU in pixels of the original image"
    metric_names: ClassVar[tuple[str, ...]] = (
        *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
        *("ar@1", "ar@10", "ar@100", "ar_small", "ar_medium", "ar_large"),
        *("ap50@1000", "ap75@1000", "ap_small@1000", "ap_medium@1000", "ap_large@1000"),
        *("ar@300", "ar@1000", "ar_small@1000", "ar_medium@1000", "ar_large@1000"),
    )
    columns: ClassVar[dict[str, Tensor]] = {  # of I images with N ground-truth and K predicted boxes in total
        "ids": torch.empty(0, dtype=torch.int64),  # [I] hash of the sample id
        "true_counts": torch.empty(0, dtype=torch.int64),  # [I] number of ground-truth boxes
        "true_boxes": torch.empty(0, 4),  # [N, 4] xyxy pixels, image by image
        "true_phrases": torch.empty(0, dtype=torch.int64),  # [N] hash of the phrase
        "areas": torch.empty(0),  # [N] square pixels
        "crowd": torch.empty(0, dtype=torch.uint8),  # [N] 0 or 1
        "counts": torch.empty(0, dtype=torch.int64),  # [I] number of predicted boxes
        "boxes": torch.empty(0, 4),  # [K, 4] xyxy pixels, image by image
        "phrases": torch.empty(0, dtype=torch.int64),  # [K] hash of the phrase
        "scores": torch.empty(0),  # [K]
        "strings": torch.empty(0, dtype=torch.uint8),  # UTF-8 of ids and phrases, each terminated by a zero byte
    }

    def reset(self) -> None:
        """Remove all rows."""
        super().reset()
        self._known: set[str] = set()  # strings that are in `strings`

    def _rows(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> dict[str, Tensor]:
        for target in targets:
            if len(set(target.phrases)) < len(target.phrases):
                repeated = sorted({phrase for phrase in target.phrases if target.phrases.count(phrase) > 1})
                raise ValueError(
                    f"sample {target.id!r} has phrases more than once ({', '.join(repeated)}): categories need unique "
                    "names"
                )
        true_boxes = [to_pixels(target.boxes, target.size) for target in targets]
        box_areas = [area(to_thousandths(boxes)) / 1e6 for boxes in true_boxes]  # 32 x 32 px: small and medium
        areas = [found if t.areas is None else t.areas for found, t in zip(box_areas, targets, strict=True)]
        crowd = [t.boxes.new_zeros(len(t.boxes)) if t.crowd is None else t.crowd for t in targets]
        return {
            "true_counts": torch.tensor([len(target.boxes) for target in targets]),
            "true_boxes": torch.cat(true_boxes),
            "true_phrases": torch.cat([_hashes(target) for target in targets]),
            "areas": torch.cat(areas),
            "crowd": torch.cat(crowd),
            "counts": torch.tensor([len(prediction.boxes) for prediction in predictions]),
            "boxes": torch.cat([prediction.boxes.reshape(-1, 4) for prediction in predictions]),
            "phrases": torch.cat([_hashes(prediction) for prediction in predictions]),
            "scores": torch.cat([prediction.scores for prediction in predictions]),
            "strings": self._new_strings(predictions, targets),
        }

    def compute(self) -> MetricResult:
        images = self._images()
        curves = precision_and_recall(
            len(images.categories),
            images.truth,
            images.predicted,
            images.scores,
            area_ranges=list(AREAS.values()),
            max_boxes=LIMITS,
            areas=images.areas,
            crowd=images.crowd,
        )
        counts, groups = images.summary(curves.precision[..., 0, LIMITS.index(STANDARD)])
        return MetricResult(_metrics(curves) | counts, groups)

    def detections(self, category_ids: Mapping[str, int]) -> list[dict[str, Any]]:
        """Return the predictions of all processes as rows of a COCO results file; every process must call it.

        Args:
            category_ids: phrase -> `category_id`.

        Returns:
            Rows with `image_id` (int if the sample id is decimal), `category_id`, `bbox` (xywh pixels) and `score`,
            image by image in the order of their ids.

        Raises:
            ValueError: a phrase has no category id.
        """
        with self.sync_context():
            images = self._images(all_phrases=True)
        missing = [phrase for phrase in images.categories if phrase not in category_ids]
        if missing:
            raise ValueError(f"no category id for {', '.join(missing)}; there are ids for {', '.join(category_ids)}")
        image_ids = [int(id) if id.isdecimal() else id for id in images.ids]
        predicted = images.predicted
        order = np.argsort(predicted.images, kind="stable")
        columns = (predicted.images, predicted.categories, to_xywh(predicted.boxes), images.scores)
        return [
            {
                "image_id": image_ids[image],
                "category_id": category_ids[images.categories[category]],
                "bbox": box,
                "score": round(score, 6),
            }
            for image, category, box, score in zip(*(column[order].tolist() for column in columns), strict=True)
        ]

    def _images(self, all_phrases: bool = False) -> _Images:
        """Return every image once; predictions of phrases without a ground-truth box only with `all_phrases`."""
        rows, first, sample = self._collected()
        owner = np.repeat(np.arange(len(sample)), rows["true_counts"])  # [N]
        sums = np.bincount(owner, rows["true_boxes"].sum(axis=1), minlength=len(sample))  # [I] of coordinates
        same = rows["true_counts"] == rows["true_counts"][first][sample]
        if not (same & np.isclose(sums, sums[first][sample], rtol=1e-4, atol=0.5)).all():
            raise ValueError("samples with the same id have different ground-truth boxes: make the ids unique")
        names = {stable_hash(text): text for text in rows["strings"].tobytes().decode().split("\0")}
        ids = [names[id] for id in rows["ids"][first].tolist()]
        order = sorted(range(len(ids)), key=lambda image: _natural(ids[image]))  # as pycocotools orders equal scores
        index = np.argsort(order)[sample]  # [I] 0..U-1

        is_first = first[sample] == np.arange(len(sample))  # [I]
        in_truth, in_predicted = (np.repeat(is_first, rows[name]) for name in ("true_counts", "counts"))  # [N], [K]
        phrases = [rows["true_phrases"][in_truth]] + [rows["phrases"][in_predicted]] * all_phrases
        categories = np.unique(np.concatenate(phrases))  # [C] hashes
        in_predicted &= np.isin(rows["phrases"], categories)

        def select(counts: str, phrases: str, boxes: str, kept: np.ndarray) -> Boxes:
            category = np.searchsorted(categories, rows[phrases][kept])
            return Boxes(np.repeat(index, rows[counts])[kept], category, rows[boxes][kept].astype(np.float64))

        return _Images(
            ids=[ids[image] for image in order],
            categories=[names[phrase] for phrase in categories.tolist()],
            truth=select("true_counts", "true_phrases", "true_boxes", in_truth),
            areas=rows["areas"][in_truth].astype(np.float64),
            crowd=rows["crowd"][in_truth].astype(bool),
            predicted=select("counts", "phrases", "boxes", in_predicted),
            scores=rows["scores"][in_predicted].astype(np.float64),
            coverage=rows["coverage"][in_predicted] if "coverage" in rows else NO_COVERAGE,
        )

    def _new_strings(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> Tensor:
        """Encode ids and phrases that are not in `strings` yet as [bytes] uint8."""
        ids = {target.id for target in targets}
        new = ids.union(*(p.phrases for p in predictions), *(t.phrases for t in targets)) - self._known
        self._known |= new
        return torch.tensor(list("".join(f"{text}\0" for text in sorted(new)).encode()))


class _Images(NamedTuple):
    """U images, N ground-truth and K predicted boxes of C categories; indices start at 0."""

    ids: list[str]  # U
    categories: list[str]  # C phrases
    truth: Boxes  # N
    areas: np.ndarray  # [N] square pixels
    crowd: np.ndarray  # [N] bool
    predicted: Boxes  # K
    scores: np.ndarray  # [K]
    coverage: np.ndarray  # [K], or empty, see FederatedMetric

    def summary(self, precision: np.ndarray) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
        """Return counts, and for each category with a ground-truth box its average precision and number of boxes.

        Args:
            precision: [T, 101, C]
        """
        num_boxes = np.bincount(self.truth.categories[~self.crowd], minlength=len(self.categories))  # [C]
        counts = {
            "num_images": len(self.ids),
            "num_boxes": int(num_boxes.sum()),
            "num_categories": int(np.count_nonzero(num_boxes)),
        }
        groups: dict[str, dict[str, float]] = {}
        for category in np.flatnonzero(num_boxes):
            own = precision[:, :, category]  # [T, 101]
            at_iou = {f"ap{name}": mean_defined(own[index]) for name, index in AP_AT.items()}
            count = int(num_boxes[category])
            groups[self.categories[category]] = {"ap": mean_defined(own), **at_iou, "num_boxes": count}
        return counts, groups


def _metrics(curves: Curves) -> dict[str, float]:
    """Return the metrics over all categories, in the order of `CocoMetric.metric_names`."""
    values: dict[str, float] = {}
    for limit, suffix in ((STANDARD, ""), (MOST, f"@{MOST}")):
        m = LIMITS.index(limit)
        for a, area_name in enumerate(AREAS):
            values[f"ap{area_name}{suffix}"] = mean_defined(curves.precision[:, :, :, a, m])
            values[f"ar{area_name}{suffix}"] = mean_defined(curves.recall[:, :, a, m])
        for name, index in AP_AT.items():
            values[f"ap{name}{suffix}"] = mean_defined(curves.precision[index, :, :, 0, m])
    for m, limit in enumerate(LIMITS):
        values[f"ar@{limit}"] = mean_defined(curves.recall[:, :, 0, m])
    return {name: values[name] for name in CocoMetric.metric_names}


def _hashes(item: Prediction | Target) -> Tensor:
    """Return [boxes] int64, the hash of the phrase of each box."""
    return _phrase_hashes(tuple(item.phrases)).to(item.phrase_ids.device)[item.phrase_ids]


@lru_cache(maxsize=64)
def _phrase_hashes(phrases: tuple[str, ...]) -> Tensor:
    """[P] int64; the images of a dataset often have the same phrases, up to 1,203 in LVIS."""
    return torch.tensor(list(map(stable_hash, phrases)), dtype=torch.int64)


def _natural(id: str) -> tuple[bool, int, str]:
    """Sort key: decimal ids by value, before all other ids."""
    return (False, int(id), "") if id.isdecimal() else (True, 0, id)

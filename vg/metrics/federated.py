"""Metric of federated detection data such as LVIS, whose images are annotated for some of the classes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vg.metrics.average_precision import Boxes, mean_defined, precision_and_recall
from vg.metrics.coco import AP_AT, AREAS, CocoMetric
from vg.metrics.result import MetricResult
from vg.types import Coverage, Prediction, Target

LIMIT = 10_000  # boxes of a category in all images together
FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}
_EVERYWHERE = np.array([-1e6, -1e6, 1e6, 1e6])  # xyxy pixels


class FederatedMetric(CocoMetric):
    """Computes the fixed average precision of LVIS (Dave et al., "Evaluating Large-Vocabulary Object Detectors: The
    Devil is in the Details", arXiv 2102.01066, section 4.1).

    Of every category the `LIMIT` best boxes in all images count, any number in an image. An image is evaluated on the
    categories that annotators searched for in it, found or not (Gupta et al., "LVIS", arXiv 1908.03195, section 3);
    where they did not mark all objects of a category, predictions without a match are ignored. All else is as in
    `CocoMetric`; every target needs `Target.coverage`.

    `compute` returns ap, ap_rare, ap_common and ap_frequent, the means over the categories of each frequency; ap50,
    ap75, ap_small, ap_medium, ap_large; ar, the mean recall with all boxes; and the counts and groups of CocoMetric.

    Args:
        frequencies: phrase -> "r", "c" or "f": how many training images have the category.
    """

    label = "fixed AP"
    protocol = (
        f"fixed average precision of LVIS, the best {LIMIT:,} boxes of each category in all images, IoU in pixels of "
        "the original image"
    )
    metric_names = (
        *("ap", "ap_rare", "ap_common", "ap_frequent", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar"),
    )
    columns: ClassVar[dict[str, Tensor]] = CocoMetric.columns | {
        "coverage": torch.empty(0, dtype=torch.uint8),  # [K] of the phrase of a predicted box in its image
    }

    def __init__(self, frequencies: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.frequencies = dict(frequencies)

    def _rows(self, predictions: Sequence[Prediction], targets: Sequence[Target]) -> dict[str, Tensor]:
        found = []
        for prediction, target in zip(predictions, targets, strict=True):
            if target.coverage is None or tuple(prediction.phrases) != tuple(target.phrases):
                raise ValueError(f"sample {target.id!r}: the coverage of its phrases is unknown, or they are others")
            found.append(target.coverage[prediction.phrase_ids.cpu()])
        return super()._rows(predictions, targets) | {"coverage": torch.cat(found)}

    def compute(self) -> MetricResult:
        images = self._images()
        predicted, scores, coverage = images.predicted, images.scores, images.coverage
        kept = _is_best(predicted, scores) & (coverage > Coverage.UNKNOWN)  # [K]
        predicted, scores, coverage = Boxes(*(x[kept] for x in predicted)), scores[kept], coverage[kept]
        # pycocotools ignores predictions inside a crowd region that match nothing else.
        pairs = np.stack([predicted.images, predicted.categories], axis=1)[coverage == Coverage.SOME]
        pairs = np.unique(pairs, axis=0)  # [pairs, 2]
        regions = Boxes(pairs[:, 0], pairs[:, 1], np.tile(_EVERYWHERE, (len(pairs), 1)))
        curves = precision_and_recall(
            len(images.categories),
            Boxes(*map(np.concatenate, zip(images.truth, regions, strict=True))),
            predicted,
            scores,
            area_ranges=list(AREAS.values()),
            max_boxes=(LIMIT,),
            areas=np.concatenate([images.areas, np.ones(len(pairs))]),
            crowd=np.concatenate([images.crowd, np.ones(len(pairs), bool)]),
        )
        precision = curves.precision[..., 0]  # [T, 101, C, A]
        values = {"ap": mean_defined(precision[:, :, :, 0])}
        found = np.array([self.frequencies.get(name, "") for name in images.categories])  # [C]
        values |= {f"ap_{name}": mean_defined(precision[:, :, found == key, 0]) for name, key in FREQUENCIES.items()}
        values |= {f"ap{name}": mean_defined(precision[index, :, :, 0]) for name, index in AP_AT.items()}
        values |= {f"ap{name}": mean_defined(precision[..., a]) for a, name in enumerate(AREAS) if name}
        values["ar"] = mean_defined(curves.recall[:, :, 0])
        counts, groups = images.summary(precision[..., 0])
        return MetricResult(values | counts, groups)


def _is_best(predicted: Boxes, scores: np.ndarray) -> np.ndarray:
    """Return which boxes are among the LIMIT best ones of their category, [K] bool."""
    order = np.lexsort((predicted.images, -scores, predicted.categories))
    categories = predicted.categories[order]
    rank = np.arange(len(order)) - np.searchsorted(categories, categories)  # within the category
    kept = np.zeros(len(order), bool)
    kept[order] = rank < LIMIT
    return kept

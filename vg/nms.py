"""Non-maximum suppression in NumPy, for models, tiles of an image and the web page alike, also without torch."""

from __future__ import annotations

import numpy as np


def nms(boxes: np.ndarray, scores: np.ndarray, threshold: float, groups: np.ndarray) -> np.ndarray:
    """Drop a box if its IoU with a better kept box of its group is above the threshold.

    Args:
        boxes: [K, 4] xyxy, any unit.
        scores: [K]
        groups: [K] integers, such as phrase_ids.

    Returns:
        Indices of the kept boxes, best first (equal scores in the order given).
    """
    left = np.argsort(-scores, kind="stable")  # candidates, best first
    kept: list[int] = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        suppressed = (groups[left] == groups[best]) & (box_iou(boxes[best], boxes[left]) > threshold)
        left = left[~suppressed]
    return np.array(kept, np.int64)


def box_iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box [4] and others [K, 4] -> [K]; zero for inverted and empty boxes."""
    size = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    intersection = size.clip(min=0).prod(axis=1)
    area, areas = (np.clip(x[..., 2:] - x[..., :2], 0, None).prod(axis=-1) for x in (box, boxes))
    union = area + areas - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)

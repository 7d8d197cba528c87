"""Non-maximum suppression against cases by hand and a loop over boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vg import boxes as box_ops
from vg.nms import nms


def test_nms_worked_out_by_hand() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10], [50, 50, 60, 60], [0, 0, 10, 10]])
    scores = np.array([0.5, 0.9, 0.4, 0.1, 0.5])
    one_group = np.zeros(5, np.int64)
    assert nms(boxes, scores, 0.4, one_group).tolist() == [1, 3], "IoU of neighbors is 6/14 = 0.43"
    assert nms(boxes, scores, 0.45, one_group).tolist() == [1, 0, 2, 3], "the second of twins goes"
    assert nms(boxes, scores, 1.0, one_group).tolist() == [1, 0, 4, 2, 3], "IoU must be above the threshold"
    scores = np.array([0.9, 0.8, 0.7, 0.1, 0.2])
    assert nms(boxes, scores, 0.4, one_group).tolist() == [0, 2, 3], "what is suppressed suppresses no other"
    groups = np.array([0, 1, 1, 0, 2])
    assert nms(boxes, scores, 0.4, groups).tolist() == [0, 1, 4, 3]


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_nms_equals_the_loop_over_boxes(threshold: float) -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        corners = random.random((60, 2))
        boxes = np.concatenate((corners, corners + random.random((60, 2))), axis=1)
        scores, groups = (20 * random.random(60)).round(), random.integers(0, 3, 60)  # with ties
        stay: list[int] = []
        for i in sorted(range(60), key=lambda i: -float(scores[i])):
            rivals = [j for j in stay if groups[j] == groups[i]]
            if not rivals or box_ops.iou(torch.tensor(boxes[i]), torch.tensor(boxes[rivals])).max() <= threshold:
                stay.append(i)
        assert nms(boxes, scores, threshold, groups).tolist() == stay


def test_nms_of_nothing() -> None:
    nothing = np.zeros(0, np.int64)
    assert nms(np.zeros((0, 4)), np.zeros(0), 0.5, nothing).tolist() == []

"""Validation of samples."""

from dataclasses import replace

import numpy as np
import pytest

from vg.data.source import checked
from vg.errors import BadSampleError
from vg.types import Sample


def make(box=(10, 20, 50, 40), **changes) -> Sample:
    sample = Sample(
        id="made/val/7",
        image=np.zeros((60, 80, 3), np.uint8),
        phrases=("red circle",),
        boxes=np.array([box], np.float32),
        phrase_ids=np.zeros(1, np.int64),
    )
    return replace(sample, **changes)


def test_a_valid_sample_is_unchanged():
    sample = make()
    np.testing.assert_array_equal(checked(sample).boxes, sample.boxes)
    assert checked(make(boxes=np.zeros((0, 4), np.float32), phrase_ids=np.zeros(0, np.int64))).boxes.shape == (0, 4)


def test_a_box_is_clipped_by_up_to_one_pixel():
    assert checked(make((-1, -0.5, 81, 60.25))).boxes.tolist() == [[0, 0, 80, 60]]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((10, 20, float("nan"), 40), "not finite"),
        ((10, 20, float("inf"), 40), "not finite"),
        ((10, 20, 10, 40), "no area"),
        ((79.9, 20, 80.5, 20), "no area"),
        ((80.2, 20, 80.9, 40), "no area"),
        ((10, 20, 82, 40), "lies outside"),
        ((-1.5, 20, 30, 40), "lies outside"),
        ((0.25, 0.5, 0.75, 1), "in 0..1 of the image .*; multiply left and right by the width"),
        ((40, 30, 20, 10), "was xywh read as xyxy"),
        ((30, 20, 30 + 70, 20 + 55), "was xyxy read as xywh"),
    ],
)
def test_invalid_boxes(box, message):
    with pytest.raises(BadSampleError, match=f"made/val/7.*{message}"):
        checked(make(box))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phrases": ()}, "empty phrase"),
        ({"phrases": ("  ",)}, "empty phrase"),
        ({"phrases": "dog"}, "phrases are 'dog', expected a tuple of str"),
        ({"phrases": (None,)}, r"phrases are \(None,\), expected a tuple of str"),
        ({"image": [[[0, 0, 0]]]}, "image is of type list, expected a NumPy array"),
        ({"boxes": [[0.0, 0.0, 1.0, 1.0]]}, "boxes is of type list, expected a NumPy array"),
        ({"image": np.zeros((60, 80), np.uint8)}, "image is uint8"),
        ({"image": np.zeros((60, 80, 3), np.float32)}, "image is float32"),
        ({"image": np.zeros((0, 80, 3), np.uint8)}, "image is uint8"),
        ({"boxes": np.zeros((1, 4))}, "boxes are float64"),
        ({"boxes": np.zeros(4, np.float32)}, "boxes are"),
        ({"phrase_ids": np.zeros(2, np.int64)}, "one for each of the 1 boxes"),
        ({"phrase_ids": np.zeros(1, np.int32)}, "phrase_ids are int32"),
        ({"phrase_ids": np.array([1])}, "exceed the 1 phrases"),
        ({"phrase_ids": np.array([-1])}, "exceed the 1 phrases"),
        ({"crowd": np.zeros(2, bool)}, "crowd is bool .*one for each of the 1 boxes"),
        ({"crowd": np.zeros(1, np.int64)}, "crowd is int64 .*expected bool"),
        ({"areas": np.zeros(1)}, "areas is float64 .*expected float32"),
    ],
)
def test_other_invalid_fields(changes, message):
    with pytest.raises(BadSampleError, match=message):
        checked(make(**changes))

"""Grids show predictions beside the ground truth, hits and misses, and annotated images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.inference.test_draw import gray, pixels_of
from vg.boxes import from_pixels, to_pixels
from vg.inference.draw import PREDICTED, TRUE
from vg.inference.grids import HIT, MISS, UNKNOWN, _verdict, draw_comparison, image_grid, prediction_grid
from vg.types import Prediction, Sample


def sample_with_prediction(
    true_box: list[float] | None, box: list[float] | None, phrase: str = "the red star"
) -> tuple[Sample, Prediction]:
    boxes = np.array([true_box] if true_box else [], np.float32).reshape(-1, 4)
    sample = Sample("scene/7", gray(120, 160), (phrase,), boxes, np.zeros(len(boxes), np.int64))
    predicted = torch.tensor([box] if box else [], dtype=torch.float32).reshape(-1, 4)
    scores, phrase_ids = torch.full((len(predicted),), 0.7), torch.zeros(1).long()
    return sample, Prediction(sample.id, predicted, scores, phrase_ids, (phrase,))


def test_grid_shows_hit_miss_and_unknown(tmp_path: Path) -> None:
    hit = sample_with_prediction([10, 10, 60, 60], [10, 10, 60, 50])
    miss = sample_with_prediction([10, 10, 60, 60], [90, 10, 140, 60], "die größte Tür " * 20)
    no_box = sample_with_prediction([10, 10, 60, 60], None)
    unknown = sample_with_prediction(None, [10, 10, 60, 60])
    prediction_grid([hit, miss, no_box, unknown], 2, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    body = grid[56:]  # below the legend
    middle_x, middle_y = body.shape[1] // 2, body.shape[0] // 2
    cards = [
        body[:middle_y, :middle_x],
        body[:middle_y, middle_x:],
        body[middle_y:, :middle_x],
        body[middle_y:, middle_x:],
    ]
    shown = [[bool(len(pixels_of(card, color))) for color in (HIT, MISS, UNKNOWN, PREDICTED, TRUE)] for card in cards]
    assert shown == [
        [True, False, False, True, True],
        [False, True, False, True, True],
        [False, True, False, False, True],
        [False, False, True, True, False],
    ]


def test_an_iou_equal_to_the_threshold_is_a_hit() -> None:
    size = (480, 640)
    sample = Sample(
        "scene/7", gray(*size), ("cat",), np.array([[7.37, 3.25, 21.37, 34.25]], np.float32), np.zeros(1, int)
    )
    box = to_pixels(from_pixels(torch.tensor([[7.37, 3.25, 14.37, 34.25]]), size), size)
    prediction = Prediction("scene/7", box, torch.tensor([0.9]), torch.zeros(1).long(), ("cat",))
    assert _verdict(sample, prediction) == ("hit, IoU 0.50, score 0.90", HIT)


@pytest.mark.parametrize(
    ("phrase_ids", "verdict"), [([0, 1, 0], "2 of 2 found"), ([1, 0, 1], "0 of 2 found"), ([0, 0, 1], "1 of 2 found")]
)
def test_grid_shows_as_many_predicted_boxes_as_true_boxes(phrase_ids: list[int], verdict: str, tmp_path: Path) -> None:
    boxes = torch.tensor([[10.0, 10, 60, 60], [80, 10, 130, 60], [100, 90, 140, 110]])
    sample = Sample("scene/7", gray(120, 160), ("cat", "dog"), boxes[:2].numpy(), np.array([0, 1]))
    scores = torch.tensor([0.9, 0.8, 0.7])
    prediction = Prediction("scene/7", boxes, scores, torch.tensor(phrase_ids), ("cat", "dog"))
    found = verdict.startswith("2")
    assert _verdict(sample, prediction) == (f"{verdict}, score 0.90", HIT if found else MISS)
    prediction_grid([(sample, prediction)], 1, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))[56:]
    assert len(pixels_of(grid, HIT if found else MISS))
    outlines = pixels_of(grid[:300], PREDICTED)
    assert outlines[:, 1].max() < 170, "the third box is not shown"


def test_a_grid_of_one_card_is_wide_enough_for_the_legend(tmp_path: Path) -> None:
    prediction_grid([sample_with_prediction([10, 10, 60, 60], [10, 10, 60, 60])], 5, tmp_path / "grid.png")
    legend = np.asarray(Image.open(tmp_path / "grid.png"))[:50]
    assert len(pixels_of(legend, MISS))
    assert (legend[:, -16:] == 255).all(), "its last word is not cut off"


def test_a_comparison_is_scaled_before_drawing_and_shows_both_boxes_where_they_are_equal() -> None:
    box = np.array([[300.0, 300, 1500, 900]])
    drawn = np.asarray(draw_comparison(gray(1200, 1800), box, box, (420, 420)))
    assert drawn.shape == (280, 420, 3)
    predicted, true = pixels_of(drawn, PREDICTED), pixels_of(drawn, TRUE)
    assert predicted.min(axis=0).tolist() == true.min(axis=0).tolist() == [70, 70]
    assert len(predicted) > 500, "a line of 4 pixels, beside and between the dashes"


def test_an_empty_grid_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        prediction_grid([], 2, tmp_path / "grid.png")


def test_grid_of_annotated_images(tmp_path: Path) -> None:
    boxes = np.array([[10.0, 10, 60, 60], [80, 10, 130, 60]])
    images = [
        ("train: a.jpg", gray(120, 160), boxes, ["cat", "dog"]),
        ("train: an image without boxes", gray(400, 100), np.zeros((0, 4)), []),
        ("val: " + "a very long reason " * 20, gray(120, 160), boxes[:1], ["dog"]),
    ]
    image_grid(images, 2, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (16 + 2 * 364, 16 + 2 * 416, 3)
    first, second = pixels_of(grid, PREDICTED), pixels_of(grid, TRUE)
    assert first.max(axis=0)[1] < 300, "the color of cats is in the first image only"
    assert second.max(axis=0)[1] > 380, "the color of dogs is also in the last"
    assert (grid[:16] == 255).all()

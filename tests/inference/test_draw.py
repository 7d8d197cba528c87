"""Boxes and labels are drawn at the right position and in the right color; invalid input raises."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from vg.boxes import from_pixels, to_pixels
from vg.inference.draw import (
    HIT,
    MISS,
    PREDICTED,
    TRUE,
    UNKNOWN,
    _font,
    _verdict,
    _wrap,
    draw_boxes,
    image_grid,
    prediction_grid,
    save_image,
)
from vg.types import Prediction, Sample


def pixels_of(image: np.ndarray, color: str) -> np.ndarray:
    """Return x and y [n, 2] of the pixels of exactly this color."""
    return np.argwhere((image == ImageColor.getrgb(color)).all(axis=-1))[:, ::-1]


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def sample_with_prediction(
    true_box: list[float] | None, box: list[float] | None, phrase: str = "the red star"
) -> tuple[Sample, Prediction]:
    boxes = np.array([true_box] if true_box else [], np.float32).reshape(-1, 4)
    sample = Sample("scene/7", gray(120, 160), (phrase,), boxes, np.zeros(len(boxes), np.int64))
    predicted = torch.tensor([box] if box else [], dtype=torch.float32).reshape(-1, 4)
    scores, phrase_ids = torch.full((len(predicted),), 0.7), torch.zeros(1).long()
    return sample, Prediction(sample.id, predicted, scores, phrase_ids, (phrase,))


def test_a_box_is_drawn_at_its_position_on_a_copy() -> None:
    image = gray(200, 300)
    drawn = draw_boxes(image, [[50, 60, 150, 120]], colors=["#ff0000"])
    found = pixels_of(drawn, "#ff0000")
    assert found.min(axis=0).tolist() == [50, 60]
    assert found.max(axis=0).tolist() == [150, 120]
    assert (drawn[70:110, 60:140] == 128).all(), "the inside is unchanged"
    assert (image == 128).all(), "so is the given image"
    assert drawn.flags.writeable
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8


def test_line_width_scales_with_the_image() -> None:
    def thickness(side: int) -> int:
        middle_row = draw_boxes(gray(side, side), [[side / 4] * 2 + [side / 2] * 2], colors=["#ff0000"])[side * 3 // 8]
        return len(pixels_of(middle_row[None], "#ff0000")) // 2

    assert thickness(100) == 2
    assert thickness(1800) == 10


@pytest.mark.parametrize("box", [[0, 0, 40, 30], [260, 0, 300, 20], [-50, -50, 400, 400], [280, 180, 300, 200]])
def test_labels_stay_inside_the_image(box: list[float]) -> None:
    without = draw_boxes(gray(200, 300), [box])
    with_label = draw_boxes(gray(200, 300), [box], ["the star 0.91"])
    changed = np.argwhere((without != with_label).any(axis=-1))
    assert np.ptp(changed[:, 0]) + 1 >= 12, "the complete height of the label is visible"
    assert np.ptp(changed[:, 1]) + 1 >= 60, "and its complete width"


def test_no_boxes_and_degenerate_boxes_are_drawn() -> None:
    assert (draw_boxes(gray(20, 20), np.zeros((0, 4))) == 128).all()
    assert len(pixels_of(draw_boxes(gray(20, 20), torch.tensor([[5.0, 5, 5, 5]])), PREDICTED))


@pytest.mark.parametrize(
    ("image", "boxes", "labels", "message"),
    [
        (gray(9, 9), [[0, 0, 5, 5]], ["a", "b"], "2 labels for 1 boxes"),
        (gray(9, 9), [[5, 0, 0, 5]], [], r"\[5.0, 0.0, 0.0, 5.0\] is not a box"),
        (gray(9, 9), [[0, 0, float("nan"), 5]], [], "is not a box"),
        (np.zeros((3, 9, 9), np.uint8), [], [], r"must be \[H, W, 3\] uint8, got \[3, 9, 9\]"),
        (np.zeros((9, 9, 3)), [], [], "got .* float64"),
    ],
)
def test_invalid_input_raises(image: np.ndarray, boxes: list, labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_boxes(image, boxes, labels)


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
    assert _verdict(sample, prediction) == ("hit   IoU 0.50   score 0.90", HIT)


@pytest.mark.parametrize(
    ("phrase_ids", "verdict"), [([0, 1, 0], "2 of 2 found"), ([1, 0, 1], "0 of 2 found"), ([0, 0, 1], "1 of 2 found")]
)
def test_grid_shows_as_many_predicted_boxes_as_true_boxes(phrase_ids: list[int], verdict: str, tmp_path: Path) -> None:
    boxes = torch.tensor([[10.0, 10, 60, 60], [80, 10, 130, 60], [100, 90, 140, 110]])
    sample = Sample("scene/7", gray(120, 160), ("cat", "dog"), boxes[:2].numpy(), np.array([0, 1]))
    scores = torch.tensor([0.9, 0.8, 0.7])
    prediction = Prediction("scene/7", boxes, scores, torch.tensor(phrase_ids), ("cat", "dog"))
    found = verdict.startswith("2")
    assert _verdict(sample, prediction) == (f"{verdict}   score 0.90", HIT if found else MISS)
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


def test_captions_wrap_between_words_and_end_with_an_ellipsis_if_cut() -> None:
    font = _font(17)
    lines = _wrap("the small red star left of the big blue circle " * 3, font, 200, lines=2)
    assert len(lines) == 2
    assert all(font.getlength(line) <= 200 for line in lines)
    assert lines[0] in "the small red star left of the big blue circle"
    assert lines[1].endswith("…")
    assert _wrap("a star", font, 200, lines=2) == ["a star"]
    assert _wrap("a" * 100, font, 200, lines=2)[0].endswith("…")
    assert _wrap("", font, 200, lines=2) == [""]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_and_leaves_the_former_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (4, 4))
    save_image(image, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self: Path, content: bytes) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match=r"No space left on device.*a\.png"):
        save_image(Image.new("RGB", (5, 5)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_very_long_captions_take_no_time() -> None:
    start = time.perf_counter()
    (line,) = _wrap("word " * 100_000, _font(12), 300, lines=1)
    assert line.endswith("…")
    assert time.perf_counter() - start < 5


def test_drawing_boxes_imports_neither_torch_nor_pyplot() -> None:
    code = (
        "import sys, numpy; from vg.inference.draw import draw_boxes;"
        "draw_boxes(numpy.zeros((50, 50, 3), 'uint8'), [[5, 5, 20, 20]], ['a']);"
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Boxes and labels are drawn at the right position and in the right color; invalid input raises."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from vg.evaluation.curves import LINE_COLORS
from vg.inference.draw import COLORS, HALO, PREDICTED, draw_boxes, font_size, save_image
from vg.inference.grids import HIT, MISS, UNKNOWN
from vg.inference.result import Result

# Colors as they are seen without one kind of cones, from linear RGB to linear RGB: Machado, Oliveira and Fernandes, "A
# physiologically-based model for simulation of color vision deficiency", 2009, severity 1.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def pixels_of(image: np.ndarray, color: str) -> np.ndarray:
    """Return x and y [n, 2] of the pixels of exactly this color."""
    return np.argwhere((image == ImageColor.getrgb(color)).all(axis=-1))[:, ::-1]


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


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
    assert thickness(1800) == 8
    assert thickness(8000) == 33


@pytest.mark.parametrize("box", [[0, 0, 40, 30], [260, 0, 300, 20], [-50, -50, 400, 400], [280, 180, 300, 200]])
def test_labels_stay_inside_the_image(box: list[float]) -> None:
    without = draw_boxes(gray(200, 300), [box])
    with_label = draw_boxes(gray(200, 300), [box], ["the star 0.91"])
    changed = np.argwhere((without != with_label).any(axis=-1))
    assert np.ptp(changed[:, 0]) + 1 >= 12, "the complete height of the label is visible"
    assert np.ptp(changed[:, 1]) + 1 >= 60, "and its complete width"


def linear(color: str) -> np.ndarray:
    """Return linear RGB [3], 0..1."""
    encoded = np.array(ImageColor.getrgb(color)) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Return the ratio of WCAG 2, 1..21."""
    darker, brighter = sorted(linear(color) @ TO_XYZ[1] for color in (one, other))
    return (brighter + 0.05) / (darker + 0.05)


def lab(color: str, vision: str) -> np.ndarray:
    """Return CIELAB of a color (D65) as it is seen."""
    seen = np.clip(np.array(VISION[vision]) @ linear(color), 0, 1)
    x, y, z = np.cbrt(np.maximum(TO_XYZ @ seen / (0.95047, 1, 1.08883), 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(("colors", "least"), [(COLORS, 35), (LINE_COLORS, 30), ((HIT, MISS, UNKNOWN), 20)])
def test_colors_differ_for_every_color_vision(colors: tuple[str, ...], least: float, vision: str) -> None:
    distances = {pair: np.linalg.norm(lab(pair[0], vision) - lab(pair[1], vision)) for pair in combinations(colors, 2)}
    assert min(distances.values()) >= least, f"{min(distances, key=distances.__getitem__)} look alike"


def test_lines_contrast_with_every_image() -> None:
    for color in COLORS:
        assert contrast(color, HALO) >= 4.5, "with its halo, on a bright image, and with a black image"
    for color in (*LINE_COLORS, HIT, MISS, UNKNOWN):
        assert contrast(color, "white") >= 2.5


@pytest.mark.parametrize("side", [64, 640, 4000])
def test_labels_cover_neither_labels_nor_their_objects(side: int) -> None:
    boxes = side * np.array([[0.05, 0.3, 0.4, 0.95], [0.6, 0.3, 0.95, 0.95]])
    drawn = draw_boxes(gray(side, side), boxes, ["a", "b"], ["#ff0000", "#00ff00"])
    for color, (left, top, right, _) in zip(("#ff0000", "#00ff00"), boxes, strict=True):
        above = pixels_of(drawn[: int(top)], color)
        assert np.ptp(above[:, 1]) >= font_size((side, side)) - 2, "the complete height of the label"
        assert above[:, 0].min() >= int(left)
        assert above[:, 0].max() <= right


def test_labels_without_room_are_left_out_of_tiny_and_crowded_images() -> None:
    crowd = [[8.0, 8, 14, 14], [10, 9, 16, 15], [12, 10, 18, 16], [30, 30, 60, 60]]
    drawn = draw_boxes(gray(64, 64), crowd, ["a very long name 0.91"] * 4, ["#ff0000", "#00ff00", "#0000ff", "#ffff00"])
    without = draw_boxes(gray(64, 64), crowd, (), ["#ff0000", "#00ff00", "#0000ff", "#ffff00"])
    rows = np.flatnonzero((drawn != without).any(axis=(1, 2)))
    assert 0 < len(rows) < 64 - 20, "some label is there, and most of the image as well"
    assert (drawn[34:50, 34:56] == 128).all(), "most of the object of the last box is visible"


def test_lines_leave_small_objects_visible() -> None:
    drawn = draw_boxes(gray(4000, 4000), [[100, 100, 112, 112]], colors=["#ff0000"])
    assert (drawn[104:109, 104:109] == 128).all()


def test_the_first_box_is_on_top() -> None:
    masks = np.ones((2, 100, 100), bool)
    drawn = draw_boxes(gray(100, 100), [[20, 20, 80, 80]] * 2, (), ["#ff0000", "#0000ff"], masks)
    assert len(pixels_of(drawn, "#ff0000"))
    assert not len(pixels_of(drawn, "#0000ff"))
    assert drawn[50, 50, 0] > drawn[50, 50, 2]


def result(side: int, phrases: tuple[str, ...], masks: bool = False) -> Result:
    """One box per phrase, in a row."""
    left = np.linspace(0.1, 0.9, len(phrases), endpoint=False) * side
    boxes = np.stack((left, left * 0 + 0.4 * side, left + 0.1 * side, left * 0 + 0.6 * side), axis=1)
    marked = np.zeros((len(phrases), side // 2, side), bool)
    marked[:, side // 4 : side // 3, : side // 8] = True
    scores = np.linspace(1, 0.5, len(phrases))
    return Result(
        "a",
        gray(side // 2, side),
        phrases,
        boxes / (1, 2, 1, 2),
        scores,
        np.arange(len(phrases)),
        marked if masks else None,
    )


@pytest.mark.parametrize("side", [64, 640, 2000])
@pytest.mark.parametrize("masks", [False, True])
def test_a_drawing_has_the_size_of_the_image_or_the_one_wanted(side: int, masks: bool) -> None:
    found = result(side, ("cat", "dog"), masks)
    assert found.draw().shape == (side // 2, side, 3)
    assert found.draw(side=640).shape == (320, 640, 3)
    assert len(pixels_of(found.draw(side=640), COLORS[1])) >= 640, "boxes are scaled as well"
    assert result(side, (), masks).draw(side=300, legend=True).shape == (150, 300, 3)


def test_a_legend_below_the_image_names_the_phrases() -> None:
    phrases = tuple(f"the phrase number {number}" for number in range(8))
    drawn = result(640, phrases).draw(legend=True)
    assert drawn.shape[1] == 640
    strip = drawn[320:]
    assert [bool(len(pixels_of(strip, color))) for color in COLORS] == [True] * 6
    assert len(pixels_of(strip, "white")) > 0.5 * strip[..., 0].size
    assert (drawn[:320] != gray(320, 640)).any()


def test_phrases_are_in_a_legend_only_if_they_have_no_room_at_the_boxes() -> None:
    assert result(640, ("cat", "dog")).draw(legend=None).shape == (320, 640, 3)
    assert len(result(640, ("a very long description of a cat",) * 12).draw(legend=None)) > 320


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


def test_drawing_boxes_imports_neither_torch_nor_pyplot() -> None:
    code = (
        "import sys, numpy; from vg.inference.draw import draw_boxes;"
        "draw_boxes(numpy.zeros((50, 50, 3), 'uint8'), [[5, 5, 20, 20]], ['a']);"
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_and_leaves_the_former_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self: Path, content: bytes) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match=r"No space left on device.*a\.png"):
        save_image(Image.new("RGB", (5, 5)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]

"""Draws boxes, labels, masks and legends on images, readable at any size and with any color vision.

By Pillow: figures of matplotlib resample the image, and supervision, whose annotators need sizes of fonts and lines for
each image, is optional.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from vg.files import write_bytes
from vg.inference.labels import BLACK, WHITE, Label, make_label, place_labels, write_label

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from vg.inference.result import Result

# Distinguishable with protanopia, deuteranopia and tritanopia, and bright enough for lines on a black image.
COLORS = ("#ffb000", "#00c8ff", "#e10f96", "#f0ffc3", "#a53cff", "#5a873c")
PREDICTED, TRUE = COLORS[:2]
INK, FAINT_INK, PAPER = "#1c2430", "#66707c", WHITE
HALO = BLACK  # around colored lines, to make them visible on a bright image


def draw_boxes(
    image: np.ndarray,
    boxes: ArrayLike,
    labels: Sequence[str] = (),
    colors: Sequence[str] = COLORS,
    masks: np.ndarray | None = None,
) -> np.ndarray:
    """Draw boxes and their labels on a copy of an image; line width and font size grow with it.

    The first box is on top, and its label is placed first. Labels do not hide each other; one that has no room
    (`vg.inference.labels.place_labels`) is left out.

    Args:
        image: [H, W, 3] uint8, RGB.
        boxes: [N, 4] xyxy in pixels, clipped to the image.
        labels: one per box, or none; they are shortened to the width of the image.
        colors: color names or hex codes of PIL, used cyclically.
        masks: [N, H, W] bool, tinted in the colors of the boxes.

    Returns:
        [H, W, 3] uint8, RGB.

    Raises:
        ValueError: a malformed image or box, or the number of labels differs from that of boxes.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the image must be [H, W, 3] uint8, got {list(image.shape)} {image.dtype}")
    rows = np.asarray(boxes, dtype=float).reshape(-1, 4)  # [N, 4]
    if labels and len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} boxes: give one label per box, or none")
    box_colors = list(islice(cycle(colors), len(rows)))
    canvas = Image.fromarray(image if masks is None else _tinted(image, masks, box_colors))
    for box, color in list(zip(rows, box_colors, strict=True))[::-1]:
        outline(canvas, box, color, line_width(canvas.size))
    for color, (label, corner) in zip(box_colors, _placed(labels, rows, canvas.size), strict=False):
        if corner:  # after all outlines, to stay visible
            write_label(canvas, label, corner, color)
    return np.array(canvas)


def draw_result(result: Result, side: int | None, legend: bool | None) -> np.ndarray:
    """See `Result.draw`."""
    image, boxes, masks = result.image, result.boxes, result.masks
    if side is not None:
        resized, scale = fit(Image.fromarray(image), (side, side))
        image, boxes = np.array(resized), scale * boxes
        if masks is not None:
            small = [np.array(Image.fromarray(mask).resize(resized.size)) for mask in masks]
            masks = np.array(small, bool).reshape(-1, *image.shape[:2])
    size = image.shape[1], image.shape[0]
    labels = [f"{phrase} {score:.2f}" for phrase, score, _ in result]
    if legend is None:
        legend = any(corner is None for _, corner in _placed(labels, boxes, size))
    ids = result.phrase_ids.tolist()
    if legend:
        labels = [f"{index + 1}: {score:.2f}" for index, score in zip(ids, result.scores, strict=True)]
    colors = [COLORS[index % len(COLORS)] for index in ids]
    drawn = draw_boxes(image, boxes, labels, colors or COLORS, masks)
    if not legend or not ids:
        return drawn
    entries = {str(index + 1): (result.phrases[index], COLORS[index % len(COLORS)]) for index in sorted(set(ids))}
    return np.concatenate((drawn, _legend(entries, size)))


def _placed(
    texts: Sequence[str], boxes: np.ndarray, size: tuple[int, int]
) -> list[tuple[Label, tuple[int, int] | None]]:
    """Return the label of each box, and its upper left corner if it has room; `size` is (width, height)."""
    labels = [make_label(text, font_size(size), size[0]) for text in texts]
    inside = np.clip(boxes[: len(labels)], 0, size * 2)
    return list(zip(labels, place_labels([(label.width, label.height) for label in labels], inside, size), strict=True))


def fit(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, float]:
    """Resize an image to fit into `size` (width, height); return it and the scale factor.

    To be done before drawing, because lines and texts get unreadable if they are resized.
    """
    scale = min(size[0] / image.width, size[1] / image.height)
    width, height = (max(1, round(scale * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS), scale


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write an image in the format of the suffix; an existing file stays if that fails, see vg.files.replacing."""
    content = BytesIO()
    image.save(content, Image.registered_extensions()[Path(path).suffix.lower()])
    write_bytes(Path(path), content.getvalue())


def line_width(size: tuple[int, int]) -> int:
    """Return the width of lines for an image of `size` (width, height), in pixels."""
    return max(2, round((size[0] * size[1]) ** 0.5 / 240))


def font_size(size: tuple[int, int]) -> int:
    """Return the size of labels for an image of `size` (width, height), in pixels."""
    return round(8 + (size[0] * size[1]) ** 0.5 / 80)


def outline(canvas: Image.Image, box: np.ndarray, color: str, width: int, dash: int = 0) -> None:
    """Draw the outline of one box, xyxy in pixels; `dash` is the length of dashes in pixels, 0 for a solid line."""
    if not np.isfinite(box).all() or (box[2:] < box[:2]).any():
        raise ValueError(f"{box.tolist()} is not a box: it must be (left, top, right, bottom) in pixels")
    left, top, right, bottom = np.clip(np.round(box), 0, np.array(canvas.size * 2) - 1).astype(int).tolist()
    width = min(width, max(1, min(right - left, bottom - top) // 6))  # small objects must remain visible
    draw, halo = ImageDraw.Draw(canvas), max(1, width // 4)
    if not dash:
        draw.rectangle((left - halo, top - halo, right + halo, bottom + halo), outline=HALO, width=width + 2 * halo)
        draw.rectangle((left, top, right, bottom), outline=color, width=width)
        return
    strokes = []
    for x in range(left, right + 1, 2 * dash):
        strokes += [(x, y, min(x + dash, right), y + width - 1) for y in (top, bottom - width + 1)]
    for y in range(top, bottom + 1, 2 * dash):
        strokes += [(x, y, x + width - 1, min(y + dash, bottom)) for x in (left, right - width + 1)]
    for x0, y0, x1, y1 in strokes:
        draw.rectangle((x0 - halo, y0 - halo, x1 + halo, y1 + halo), fill=HALO)
    for stroke in strokes:
        draw.rectangle(stroke, fill=color)


def _tinted(image: np.ndarray, masks: np.ndarray, colors: Sequence[str]) -> np.ndarray:
    """Blend the pixels of each mask [N, H, W] with its color; the first mask is on top."""
    image = image.copy()
    for mask, color in list(zip(masks, colors, strict=True))[::-1]:
        image[mask] = np.round(0.55 * image[mask] + 0.45 * np.array(ImageColor.getrgb(color)[:3])).astype(np.uint8)
    return image


def _legend(entries: Mapping[str, tuple[str, str]], size: tuple[int, int]) -> np.ndarray:
    """Draw number -> (phrase, color) in as many lines as needed -> [h, W, 3] uint8, to put below an image of `size`."""
    text_size, width = font_size(size), size[0]
    gap = text_size // 2
    left, top, placed = gap, gap, []
    for number, (phrase, color) in entries.items():
        tag = make_label(number, text_size, width)
        text = make_label(phrase, text_size, max(1, width - 2 * gap - tag.width))
        if left > gap and left + tag.width + text.width + gap > width:
            left, top = gap, top + tag.height + gap
        placed += [(tag, (left, top), color), (text, (left + tag.width, top), PAPER)]
        left += tag.width + text.width + gap
    canvas = Image.new("RGB", (width, top + placed[-1][0].height + gap), PAPER)
    for label, corner, color in placed:
        write_label(canvas, label, corner, color)
    return np.array(canvas)

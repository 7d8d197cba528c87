"""Draws boxes on images and grids of predictions with the ground truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from vg.files import write_bytes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from vg.types import Prediction, Sample

COLORS = ("#ffb000", "#00c8ff", "#ff5cae", "#7ee04a", "#b58cff", "#ff7a45")  # distinguishable with color blindness
PREDICTED, TRUE = COLORS[:2]
HIT, MISS, UNKNOWN = "#1a8f4c", "#d3323f", "#8a929c"
INK, FAINT_INK, PAPER = "#1c2430", "#66707c", "#ffffff"
BACKGROUND = "#eef0f3"  # around images that do not fill their area
HALO = "#000000"  # around colored lines, to make them visible on any image

HIT_IOU = 0.5
CARD_WIDTH, IMAGE_HEIGHT, CAPTION_LINES, TEXT_SIZE = 400, 300, 2, 17  # of the grid, in pixels
LINE_HEIGHT, PADDING, GAP, FRAME, DASH = 24, 12, 16, 4, 7
LEGEND_WIDTH = 560  # minimum width of a grid


def draw_boxes(
    image: np.ndarray, boxes: ArrayLike, labels: Sequence[str] = (), colors: Sequence[str] = COLORS
) -> np.ndarray:
    """Draw boxes and their labels on a copy of an image; line width and font size scale with it.

    Args:
        image: [H, W, 3] uint8, RGB.
        boxes: [N, 4] xyxy in pixels, clipped to the image.
        labels: one per box, or none; they are shortened to the width of the image.
        colors: color names or hex codes of PIL, used cyclically.

    Returns:
        [H, W, 3] uint8, RGB.

    Raises:
        ValueError: a malformed image or box, or the number of labels differs from that of boxes.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the image must be [H, W, 3] uint8, got {list(image.shape)} {image.dtype}")
    canvas = Image.fromarray(image)
    rows = np.asarray(boxes, dtype=float).reshape(-1, 4)  # [N, 4]
    if labels and len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} boxes: give one label per box, or none")
    width = max(2, round(min(canvas.size) / 180))
    for box, color in zip(rows, cycle(colors), strict=False):
        _outline(canvas, box, color, width)
    font = _font(max(11, round(min(canvas.size) / 28)))
    for box, color, label in zip(rows, cycle(colors), labels, strict=False):  # after all outlines, to stay visible
        _label(canvas, box, color, label, font)
    return np.array(canvas)


def prediction_grid(items: Sequence[tuple[Sample, Prediction]], columns: int, path: str | Path) -> None:
    """Write an image file with one card per sample: its best predicted boxes, its true boxes and hit or miss.

    The number of predicted boxes shown equals the number of true boxes; a true box is found if one of them has the same
    phrase and IoU >= `HIT_IOU`.

    Args:
        items: samples and their predictions. A sample without true boxes is shown with the best predicted box and
            without hit or miss.
        columns: cards per row.
        path: file to write; its suffix determines the format (".png").

    Raises:
        ValueError: no samples or no columns.
    """
    if not items or columns < 1:
        raise ValueError("nothing to draw: give at least one sample with its prediction and at least one column")
    cards = [_card(sample, prediction) for sample, prediction in items]
    canvas = _grid(cards, columns, top=GAP + LINE_HEIGHT + GAP, min_width=LEGEND_WIDTH)
    _legend(canvas)
    save_image(canvas, path)


def image_grid(
    images: Sequence[tuple[str, np.ndarray, np.ndarray, Sequence[str]]], columns: int, path: str | Path
) -> None:
    """Write an image file with a grid of annotated images; equal names have equal colors.

    Args:
        images: tuples of caption, image [H, W, 3] uint8, boxes [N, 4] xyxy in pixels, and the names of the boxes.
        columns: images per row.
        path: file to write; its suffix determines the format (".png").
    """
    color_of = cycle(COLORS)
    colors = {name: next(color_of) for name in dict.fromkeys(name for *_, names in images for name in names)}
    font, cards = _font(TEXT_SIZE - 3), []
    for caption, image, boxes, names in images:
        card = Image.new("RGB", (CARD_WIDTH, IMAGE_HEIGHT + 2 * LINE_HEIGHT), PAPER)
        thumbnail, scale = _thumbnail(image, CARD_WIDTH)
        drawn = draw_boxes(np.array(thumbnail), scale * boxes, names, [colors[name] for name in names] or COLORS)
        card.paste(Image.fromarray(drawn))
        text = "\n".join(_wrap(caption, font, CARD_WIDTH, lines=2))
        ImageDraw.Draw(card).text((0, IMAGE_HEIGHT), text, fill=INK, font=font)
        cards.append(card)
    save_image(_grid(cards, columns), path)


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write an image in the format of the suffix; an existing file stays if that fails, see vg.files.replacing."""
    content = BytesIO()
    image.save(content, Image.registered_extensions()[Path(path).suffix.lower()])
    write_bytes(Path(path), content.getvalue())


def _grid(cards: Sequence[Image.Image], columns: int, top: int = GAP, min_width: int = 0) -> Image.Image:
    """Paste cards of one size row by row, with gaps around them."""
    columns = min(columns, len(cards))
    width, height = cards[0].width + GAP, cards[0].height + GAP
    size = (max(min_width, GAP + columns * width), top + math.ceil(len(cards) / columns) * height)
    canvas = Image.new("RGB", size, PAPER)
    for index, card in enumerate(cards):
        row, column = divmod(index, columns)
        canvas.paste(card, (GAP + column * width, top + row * height))
    return canvas


def _outline(canvas: Image.Image, box: np.ndarray, color: str, width: int, dash: int = 0) -> None:
    """Draw the outline of one box, xyxy in pixels; `dash` is the length of dashes in pixels, 0 for a solid line."""
    if not np.isfinite(box).all() or (box[2:] < box[:2]).any():
        raise ValueError(f"{box.tolist()} is not a box: it must be (left, top, right, bottom) in pixels")
    left, top, right, bottom = (int(side) for side in np.clip(np.round(box), 0, np.array(canvas.size * 2) - 1))
    draw = ImageDraw.Draw(canvas)
    if not dash:
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=HALO, width=width + 2)
        draw.rectangle((left, top, right, bottom), outline=color, width=width)
        return
    strokes = []
    for x in range(left, right + 1, 2 * dash):
        strokes += [(x, y, min(x + dash, right), y + width - 1) for y in (top, bottom - width + 1)]
    for y in range(top, bottom + 1, 2 * dash):
        strokes += [(x, y, x + width - 1, min(y + dash, bottom)) for x in (left, right - width + 1)]
    for x0, y0, x1, y1 in strokes:
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), fill=HALO)
    for stroke in strokes:
        draw.rectangle(stroke, fill=color)


def _label(canvas: Image.Image, box: np.ndarray, color: str, text: str, font: ImageFont.FreeTypeFont) -> None:
    """Write on a colored background above the box, or inside at its upper edge if there is no room above."""
    width, height = canvas.size
    margin = max(2, round(font.size / 4))
    (text,) = _wrap(text, font, width - 2 * margin, lines=1)
    label_width, label_height = font.getlength(text) + 2 * margin, sum(font.getmetrics()) + margin
    left = min(max(box[0], 0), width - label_width)
    top = min(max(box[1] - label_height if box[1] >= label_height else box[1], 0), height - label_height)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, top, left + label_width - 1, top + label_height - 1), fill=color)
    red, green, blue = ImageColor.getrgb(color)[:3]
    ink = HALO if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else PAPER  # perceived brightness (ITU-R BT.601)
    draw.text((left + margin, top + margin / 2), text, fill=ink, font=font)


def _card(sample: Sample, prediction: Prediction) -> Image.Image:
    """Draw one image with its boxes, its phrases and hit or miss."""
    verdict, color = _verdict(sample, prediction)
    caption = ", ".join(dict.fromkeys(sample.phrases[id] for id in sample.phrase_ids)) or ", ".join(sample.phrases)
    height = 2 * FRAME + IMAGE_HEIGHT + (CAPTION_LINES + 1) * LINE_HEIGHT + 3 * PADDING
    card = Image.new("RGB", (CARD_WIDTH, height), PAPER)
    image, scale = _thumbnail(sample.image, CARD_WIDTH - 2 * FRAME)
    for box in prediction.boxes[: max(1, len(sample.boxes))].numpy():  # drawn now because lines must not be resized
        _outline(image, scale * box, PREDICTED, width=4)
    for box in sample.boxes:
        _outline(image, scale * box, TRUE, width=2, dash=DASH)
    card.paste(BACKGROUND, (0, 0, CARD_WIDTH, FRAME + IMAGE_HEIGHT))
    card.paste(image, ((CARD_WIDTH - image.width) // 2, FRAME + (IMAGE_HEIGHT - image.height) // 2))
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, CARD_WIDTH - 1, height - 1), outline=color, width=FRAME)
    left, top = FRAME + PADDING, FRAME + IMAGE_HEIGHT + PADDING
    for line in _wrap(caption, _font(TEXT_SIZE), CARD_WIDTH - 2 * left, CAPTION_LINES):
        draw.text((left, top), line, fill=INK, font=_font(TEXT_SIZE))
        top += LINE_HEIGHT
    bottom = height - FRAME - PADDING - LINE_HEIGHT
    draw.text((left, bottom), verdict, fill=color, font=_font(TEXT_SIZE - 2, bold=True))
    return card


def _verdict(sample: Sample, prediction: Prediction) -> tuple[str, str]:
    """Return the result line of a card and its color."""
    from vg.boxes import iou, to_thousandths  # needs torch, which the rest of this file does not

    score = f"score {float(prediction.scores[0]):.2f}" if len(prediction.boxes) else "no box predicted"
    if not len(sample.boxes):
        return score, UNKNOWN
    boxes = prediction.boxes[: len(sample.boxes)]
    true_boxes = prediction.boxes.new_tensor(sample.boxes)  # [N, 4]
    overlaps = iou(to_thousandths(true_boxes)[:, None], to_thousandths(boxes)[None]).numpy()  # [N, K]
    same_phrase = sample.phrase_ids[:, None] == prediction.phrase_ids[: len(boxes)].numpy()  # [N, K]
    best = overlaps.max(axis=1, initial=0.0, where=same_phrase)  # [N]
    found = int((best >= HIT_IOU).sum())
    verdict = f"{'hit' if found else 'miss'}   IoU {best[0]:.2f}" if len(best) == 1 else f"{found} of {len(best)} found"
    return f"{verdict}   {score}", HIT if found == len(best) else MISS


def _thumbnail(array: np.ndarray, width: int) -> tuple[Image.Image, float]:
    """Resize an image [H, W, 3] to fit into width x IMAGE_HEIGHT; return it and the scale factor."""
    image = Image.fromarray(array)
    scale = min(width / image.width, IMAGE_HEIGHT / image.height)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    return image.resize(size, Image.Resampling.LANCZOS), scale


def _legend(canvas: Image.Image) -> None:
    """Draw the legend in one line at the upper edge of the grid."""
    draw, font, left = ImageDraw.Draw(canvas), _font(TEXT_SIZE - 2), GAP
    entries = {"predicted": PREDICTED, "true": TRUE, f"hit: IoU ≥ {HIT_IOU}": HIT, "miss": MISS}
    for text, color in entries.items():
        swatch = np.array((left, GAP + 1, left + 32, GAP + 20))
        if color == PREDICTED:
            _outline(canvas, swatch, color, width=4)
        elif color == TRUE:
            _outline(canvas, swatch, color, width=2, dash=DASH)
        else:
            draw.rectangle(swatch.tolist(), outline=color, width=FRAME)
        draw.text((left + 42, GAP + 1), text, fill=INK, font=font)
        left += 42 + round(font.getlength(text)) + 2 * GAP


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """Wrap words into lines of at most `width` pixels; text beyond the last line is replaced by an ellipsis."""
    wrapped: list[str] = []
    words = text[: int(lines * width)].split()  # no more fit, at a pixel each
    while words and len(wrapped) < lines:
        count = next((n for n in range(len(words), 1, -1) if font.getlength(" ".join(words[:n])) <= width), 1)
        is_last = len(wrapped) == lines - 1
        line = " ".join(words if is_last else words[:count])
        words = [] if is_last else words[count:]
        if font.getlength(line) > width:
            while line and font.getlength(f"{line}…") > width:
                line = line[:-1]
            line = f"{line.rstrip()}…"
        wrapped.append(line)
    return wrapped or [""]


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which comes with matplotlib; the font of PIL has ASCII letters only."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' * bold}.ttf"), size)

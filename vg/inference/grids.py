"""Grids of images with boxes: predictions beside the ground truth, and annotated images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from vg.inference.draw import COLORS, INK, PAPER, PREDICTED, TRUE, draw_boxes, fit, outline, save_image
from vg.inference.labels import typeset, wrap

if TYPE_CHECKING:
    from vg.types import Prediction, Sample

HIT, MISS, UNKNOWN = "#006652", "#d9372c", "#8a929c"
BACKGROUND = "#eef0f3"  # around images that do not fill their area
HIT_IOU = 0.5
CARD_WIDTH, IMAGE_HEIGHT, CAPTION_LINES, TEXT_SIZE = 400, 300, 2, 17  # in pixels
LINE_HEIGHT, PADDING, GAP, FRAME, DASH = 24, 12, 16, 4, 7
LEGEND_WIDTH = 560  # minimum width of a grid of predictions


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
    cards = []
    for caption, image, boxes, names in images:
        card = Image.new("RGB", (CARD_WIDTH, IMAGE_HEIGHT + 2 * LINE_HEIGHT), PAPER)
        thumbnail, scale = fit(Image.fromarray(image), (CARD_WIDTH, IMAGE_HEIGHT))
        drawn = draw_boxes(np.array(thumbnail), scale * boxes, names, [colors[name] for name in names] or COLORS)
        card.paste(Image.fromarray(drawn))
        _write(card, (0, IMAGE_HEIGHT), caption, TEXT_SIZE - 3, CARD_WIDTH, lines=2)
        cards.append(card)
    save_image(_grid(cards, columns), path)


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


def draw_comparison(image: np.ndarray, true_boxes: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Resize an image and draw the predicted boxes as lines and the true boxes as dashes on top.

    Args:
        image: [H, W, 3] uint8, RGB.
        true_boxes: [N, 4] xyxy in pixels of the image.
        boxes: [K, 4] xyxy in pixels of the image.
        size: width and height into which the drawing fits, in pixels.
    """
    canvas, scale = fit(Image.fromarray(image), size)
    for box in boxes:
        outline(canvas, scale * box, PREDICTED, width=4)
    for box in true_boxes:
        outline(canvas, scale * box, TRUE, width=2, dash=DASH)
    return canvas


def _card(sample: Sample, prediction: Prediction) -> Image.Image:
    """Draw one image with its boxes, its phrases and hit or miss."""
    verdict, color = _verdict(sample, prediction)
    caption = ", ".join(dict.fromkeys(sample.phrases[id] for id in sample.phrase_ids)) or ", ".join(sample.phrases)
    height = 2 * FRAME + IMAGE_HEIGHT + (CAPTION_LINES + 1) * LINE_HEIGHT + 3 * PADDING
    card = Image.new("RGB", (CARD_WIDTH, height), PAPER)
    boxes = prediction.boxes[: max(1, len(sample.boxes))].numpy()
    image = draw_comparison(sample.image, sample.boxes, boxes, (CARD_WIDTH - 2 * FRAME, IMAGE_HEIGHT))
    card.paste(BACKGROUND, (0, 0, CARD_WIDTH, FRAME + IMAGE_HEIGHT))
    card.paste(image, ((CARD_WIDTH - image.width) // 2, FRAME + (IMAGE_HEIGHT - image.height) // 2))
    ImageDraw.Draw(card).rectangle((0, 0, CARD_WIDTH - 1, height - 1), outline=color, width=FRAME)
    left, top = FRAME + PADDING, FRAME + IMAGE_HEIGHT + PADDING
    _write(card, (left, top), caption, TEXT_SIZE, CARD_WIDTH - 2 * left, CAPTION_LINES)
    bottom = height - FRAME - PADDING - LINE_HEIGHT
    _write(card, (left, bottom), verdict, TEXT_SIZE - 2, CARD_WIDTH - 2 * left, lines=1, color=color, bold=True)
    return card


def _write(
    card: Image.Image,
    corner: tuple[int, int],
    text: str,
    size: int,
    width: int,
    lines: int,
    color: str = INK,
    bold: bool = False,
) -> None:
    """Write at most `lines` lines of at most `width` pixels below the upper left corner."""
    text, font = typeset(text, size, bold)
    left, top = corner
    for line in wrap(text, font, width, lines):
        ImageDraw.Draw(card).text((left, top), line, fill=color, font=font)
        top += LINE_HEIGHT


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
    verdict = f"{'hit' if found else 'miss'}, IoU {best[0]:.2f}" if len(best) == 1 else f"{found} of {len(best)} found"
    return f"{verdict}, {score}", HIT if found == len(best) else MISS


def _legend(canvas: Image.Image) -> None:
    """Draw the legend in one line at the upper edge of the grid."""
    draw, left = ImageDraw.Draw(canvas), GAP
    entries = {"predicted": PREDICTED, "true": TRUE, f"hit: IoU ≥ {HIT_IOU}": HIT, "miss": MISS}
    for text, color in entries.items():
        swatch = np.array((left, GAP + 1, left + 32, GAP + 20))
        if color == PREDICTED:
            outline(canvas, swatch, color, width=4)
        elif color == TRUE:
            outline(canvas, swatch, color, width=2, dash=DASH)
        else:
            draw.rectangle(swatch.tolist(), outline=color, width=FRAME)
        text, font = typeset(text, TEXT_SIZE - 2)
        draw.text((left + 42, GAP + 1), text, fill=INK, font=font)
        left += 42 + round(font.getlength(text)) + 2 * GAP

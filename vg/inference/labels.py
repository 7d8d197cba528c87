"""Texts on images: fonts that have their characters, lines that fit, and positions that cover little.

Pillow sets them, with its text layout engine Raqm right-to-left scripts too. The annotators of supervision are an
optional package; they have one font for all texts, and push labels apart without regard to the objects below.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

MAX_CHARACTERS = 400  # of a text; longer ones do not fit on any image
MAX_COVERED = 0.5  # of objects by a label: half of one, or quarters of two
BLACK, WHITE = "#000000", "#ffffff"


class Label(NamedTuple):
    """A text that fits, on a background of its size."""

    text: str
    font: ImageFont.FreeTypeFont
    width: int  # of the background, in pixels
    height: int


def make_label(text: str, size: int, max_width: int) -> Label:
    """Return a label of font size `size` in pixels, at most `max_width` wide; a score at the end of the text stays."""
    text, font = typeset(text, size)
    margin = _margin(font)
    score = re.search(r" \d\.\d+$", text)
    text = shorten(text, font, max_width - 2 * margin, end=score[0] if score else "")
    width = int(np.ceil(font.getlength(text))) + 2 * margin
    return Label(text, font, min(width, max_width), sum(font.getmetrics()) + margin)


def write_label(canvas: Image.Image, label: Label, corner: tuple[int, int], color: str) -> None:
    """Write a label on a background of the given color, in black or white, whichever is more readable."""
    draw, margin, (left, top) = ImageDraw.Draw(canvas), _margin(label.font), corner
    draw.rectangle((left, top, left + label.width - 1, top + label.height - 1), fill=color)
    red, green, blue = ImageColor.getrgb(color)[:3]
    ink = BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else WHITE  # perceived brightness (ITU-R BT.601)
    draw.text((left + margin, top + margin // 2), label.text, fill=ink, font=label.font)


def _margin(font: ImageFont.FreeTypeFont) -> int:
    return max(1, round(font.size / 5))


def place_labels(
    sizes: Sequence[tuple[int, int]], boxes: np.ndarray, size: tuple[int, int]
) -> list[tuple[int, int] | None]:
    """Find a position for each label next to or in its box, the first label first.

    A position covers no other label and as little as possible of the objects; among equally good ones it is the first
    of: above, below, to the right, to the left, inside. A label has no position if it is larger than the image, or if
    each one covers another label or more than `MAX_COVERED` of the objects.

    Args:
        sizes: width and height of each label in pixels.
        boxes: [N, 4] xyxy in pixels, inside the image.
        size: width and height of the image.

    Returns:
        Left and top of each label in pixels, or None.
    """
    steps = np.array([0, 1, 0.5, 0.25, 0.75])  # along a side of the box
    areas = np.maximum(boxes[:, 2:] - boxes[:, :2], 1).prod(axis=1)  # [N]
    used = np.zeros((0, 4))
    found: list[tuple[int, int] | None] = []
    for label, (left, top, right, bottom) in zip(np.array(sizes, float), boxes, strict=True):
        width, height = label
        xs, ys = left + steps * (right - left - width), top + steps * (bottom - top - height)
        rows = (top - height, bottom), (top, bottom - height, (top + bottom - height) / 2)  # outside, inside
        columns = (right, left - width)
        corners = [(x, y) for y in rows[0] for x in xs]
        corners += [(x, y) for x in columns for y in ys]
        corners += [(x, y) for y in rows[1] for x in xs]
        corner = np.clip(np.round(corners), 0, np.maximum(np.array(size) - label, 0))  # [C, 2]
        places = np.concatenate((corner, corner + label), axis=1)  # [C, 4]
        covered = (_common(places, boxes) / areas).sum(axis=1)  # [C] of objects, 1 for a whole object
        covered[_common(places, used).any(axis=1)] = np.inf
        best = np.argmin(covered + 0.005 * np.arange(len(places)))
        if covered[best] <= MAX_COVERED and (label <= size).all():
            used = np.concatenate((used, places[best : best + 1]))
            found.append((int(corner[best, 0]), int(corner[best, 1])))
        else:
            found.append(None)
    return found


def _common(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Area of intersection in pixels, [C, 4] and [N, 4] xyxy -> [C, N]."""
    left, top, right, bottom = boxes.T  # [N] each
    widths = np.minimum(places[:, 2:3], right) - np.maximum(places[:, 0:1], left)
    heights = np.minimum(places[:, 3:4], bottom) - np.maximum(places[:, 1:2], top)
    return widths.clip(0) * heights.clip(0)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """Wrap words into lines of at most `width` pixels; text beyond the last line is replaced by an ellipsis."""
    wrapped: list[str] = []
    words = text.split()
    while words and len(wrapped) < lines - 1:
        fitting = range(1, len(words) + 1)
        count = max(1, bisect_right(fitting, width, key=lambda n: font.getlength(" ".join(words[:n]))))
        wrapped.append(shorten(" ".join(words[:count]), font, width))
        words = words[count:]
    return [*wrapped, shorten(" ".join(words), font, width)] if words else wrapped or [""]


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float, end: str = "") -> str:
    """Replace characters before `end` by an ellipsis, as many as make the text at most `width` pixels long."""
    if font.getlength(text) <= width:
        return text
    start = text.removesuffix(end)
    count = bisect_right(range(1, len(start)), width, key=lambda n: font.getlength(f"{start[:n]}…{end}"))
    return f"{start[:count].rstrip()}…{end}"


def typeset(text: str, size: int, bold: bool = False) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return a text in one line, and a font with its characters.

    The font is DejaVu Sans, or the first installed one that has all characters. If none has, symbols are replaced by
    their names ("(dog face)") and letters by their codes ("\\u72ac"), so that nothing is an empty box.
    """
    text = " ".join(text[:MAX_CHARACTERS].split())
    path, known = _dejavu(bold)
    characters = frozenset(map(ord, text))
    missing = characters - known
    if missing and (other := _font_file_with(characters)):
        return text, _font(other, size)
    written = (_description(character) if ord(character) in missing else character for character in text)
    return "".join(written), _font(path, size)


def _description(character: str) -> str:
    name = unicodedata.name(character, "")
    if name and unicodedata.category(character).startswith("S"):
        return f"({name.lower()})"
    return character.encode("unicode_escape").decode()


@cache
def _dejavu(bold: bool) -> tuple[str, frozenset[int]]:
    """File and code points of DejaVu Sans, which comes with matplotlib; that of Pillow has little but Latin letters."""
    from matplotlib import get_data_path

    path = str(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' * bold}.ttf"))
    return path, frozenset(_characters(path).tolist())


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def _characters(path: str) -> np.ndarray:
    """Code points of a font file, uint32; none if it cannot be read or has no outlines."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return np.zeros(0, np.uint32)
    return np.fromiter(font.get_charmap() if font.scalable else (), np.uint32)


@lru_cache(maxsize=256)
def _font_file_with(characters: frozenset[int]) -> str | None:
    """Return an installed font with all characters, upright and of normal weight if there is one."""
    wanted = np.fromiter(characters, np.uint32)
    return next((file for file in _font_files() if np.isin(wanted, _characters(file)).all()), None)


@cache
def _font_files() -> list[str]:
    """List installed fonts and those of matplotlib, upright ones of normal weight first.

    matplotlib keeps its list on disk and never looks again, so fonts installed since are added to it here.
    """
    from matplotlib import get_data_path
    from matplotlib.font_manager import findSystemFonts, fontManager

    listed = {font.fname for font in fontManager.ttflist}
    for file in {*findSystemFonts(), *findSystemFonts(get_data_path())} - listed:
        with suppress(OSError, RuntimeError):  # a file that cannot be read
            fontManager.addfont(file)
    fonts = sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400, font.name))
    # "Last Resort" has all characters, but draws the same box for all letters of a script.
    return [font.fname for font in fonts if "Last Resort" not in font.name]

"""Synthetic dataset: colored digits and letters in several fonts and sizes, with referring expressions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vg.data.synthetic.layout import (
    GENERIC_NOUN,
    Box,
    Grid,
    Noun,
    Scene,
    SceneObject,
    Style,
    laid_out,
    pick,
    smooth_background,
    some,
)
from vg.data.synthetic.scenes import COLORS
from vg.data.synthetic.world import World, WorldConfig
from vg.errors import DataError

DIGITS = "0123456789"
LETTERS = "ACEHJKLMNPTUVWXY"
"""Without letters that are similar to other glyphs, so that small ones are readable: B (8), D (0), F (E), G (6), I (1),
O (0), Q (0), R (P), S (5) and Z (2)."""
GLYPH_COLORS = ("red", "green", "blue", "purple", "orange", "black")  # all that are dark enough for the background
FONTS = (  # files that matplotlib includes
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-BoldItalic", "STIXGeneralBol", "cmtt10"),
)
STYLES = {  # the scale of a glyph is its height
    "plain": Style(counts=(3, 6), scales=(0.16, 0.36), small=0.22, big=0.29, gap=0.025, min_side=56),
    "crowded": Style(counts=(8, 14), scales=(0.10, 0.22), small=0.135, big=0.18, gap=0.015, min_side=96),
}
_DRAWN_HEIGHT = 160  # pixels of a glyph before it is scaled down
_KINDS: dict[str, Noun] = {"digit": ("digit", "number"), "letter": ("letter",)}


@dataclass
class GlyphsConfig(WorldConfig):
    """Settings of the drawn digits and letters."""

    name: Literal["glyphs"] = "glyphs"

    @classmethod
    def miniature(cls, folder: Path) -> GlyphsConfig:
        """Return settings of a tiny dataset, for tests; nothing is written to the folder."""
        return cls(split="val", size=4, image_size=64)

    def build(self) -> Glyphs:
        return Glyphs(self, STYLES)


@dataclass(frozen=True)
class Glyph(SceneObject):
    """One digit or letter in a scene."""

    character: str
    font: str  # one of FONTS
    color: str  # one of GLYPH_COLORS
    size: str
    box: Box
    paint: tuple[int, int, int]  # RGB, close to COLORS[color]

    @property
    def nouns(self) -> tuple[Noun, ...]:
        kind = "digit" if self.character in DIGITS else "letter"
        names = (self.character, f"{kind} {self.character}")
        return GENERIC_NOUN, _KINDS[kind], names[1:] if self.character == "A" else names  # "A" alone is an article

    @property
    def areas(self) -> tuple[float, ...]:
        """Return the areas of the box and of a square of its height: a 1 is narrower than a W of the same font size."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top), (bottom - top) ** 2


class Glyphs(World[Glyph, Grid]):
    """Drawn digits and letters."""

    def scene(self, rng: np.random.Generator, epoch: int) -> Scene[Glyph, Grid]:
        return random_scene(rng, self.settings.image_size, self.style)

    def draw(self, scene: Scene[Glyph, Grid]) -> np.ndarray:
        return draw(scene)


def random_scene(rng: np.random.Generator, size: int = 128, style: Style = STYLES["plain"]) -> Scene[Glyph, Grid]:
    """Sample a scene of size x size pixels with few colors and characters, each glyph in a font of its own."""
    colors = some(rng, GLYPH_COLORS, int(rng.integers(2, 4)))
    characters = some(rng, DIGITS + LETTERS, int(rng.integers(2, 5)))

    def choose() -> tuple[str, str]:
        return pick(rng, characters), pick(rng, FONTS)

    def sides(choice: tuple[str, str], height: float) -> tuple[float, float]:
        mask = _mask(*choice)
        return height * mask.width / mask.height, height

    glyphs = []
    for (character, font), word, box in laid_out(rng, size, style, choose, sides):
        color = pick(rng, colors)
        paint = np.clip(np.add(COLORS[color], rng.integers(-8, 9, size=3)), 0, 255)
        glyphs.append(Glyph(character, font, color, word, box, tuple(paint.tolist())))
    if len(glyphs) < style.counts[0]:
        return random_scene(rng, size, style)
    cells = pick(rng, (1, 4, 16))  # plain, soft gradient, paper
    levels = rng.integers(225, 245) + rng.integers(-10, 11, size=(cells, cells))
    return Scene(tuple(glyphs), size, tuple(map(tuple, levels.tolist())))


def draw(scene: Scene[Glyph, Grid]) -> np.ndarray:
    """Draw a scene with antialiased edges: [H, W, 3] uint8, RGB."""
    image = smooth_background(scene)
    for glyph in scene.objects:
        left, top, right, bottom = glyph.box
        image.paste(glyph.paint, (left, top), _scaled_mask(glyph.character, glyph.font, right - left, bottom - top))
    return np.array(image)


@cache  # some thousand small masks
def _scaled_mask(character: str, font: str, width: int, height: int) -> Image.Image:
    return _mask(character, font).resize((width, height), Image.Resampling.BOX)


@cache
def _mask(character: str, font: str) -> Image.Image:
    """Return the coverage (0..255) of each pixel by a large glyph that touches all four sides of the image."""
    face = _font(font)
    left, top, right, bottom = map(round, face.getbbox(character))
    mask = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), character, font=face, fill=255)
    return mask.crop(mask.getbbox())


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    """Load a font; raises DataError if Pillow has no FreeType or matplotlib no such font."""
    import matplotlib  # late: it takes longer to import than all other modules of the data

    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    try:
        return ImageFont.truetype(str(file), _DRAWN_HEIGHT, layout_engine=ImageFont.Layout.BASIC)
    except (OSError, ImportError) as error:
        raise DataError(
            f"glyphs: cannot load {file} ({error}); reinstall matplotlib, which includes the font, "
            "and Pillow with FreeType"
        ) from error

"""Digits and letters: every expression refers to exactly one glyph, boxes are tight, glyphs are readable."""

import itertools
import re
from collections import Counter
from functools import partial

import matplotlib
import numpy as np
import pytest
from PIL import ImageFont

from tests.data.synthetic.reader import Reader
from tests.data.synthetic.words import VOCABULARY
from vg.data.synthetic import glyphs
from vg.data.synthetic.expressions import described_scene
from vg.data.synthetic.glyphs import (
    DIGITS,
    FONTS,
    GLYPH_COLORS,
    LETTERS,
    STYLES,
    Glyph,
    GlyphsConfig,
    draw,
    random_scene,
)
from vg.data.synthetic.layout import Scene
from vg.errors import DataError
from vg.models.encoders import SMALL_VOCABULARY, read_tokenizer

TYPES = ("attribute", "superlative", "relation", "ordinal", "chain")
NOUN = (
    r"(?:the )?(?:(?P<{0}small>small|little) |(?P<{0}big>big|large) )?"
    r"(?:(?P<{0}color>red|green|blue|purple|orange|black) )?"
    r"(?:(?:digit |letter )?(?P<{0}character>[A-Z0-9])|(?P<{0}digit>digit|number)|(?P<{0}letter>letter)|thing|object)"
)

RECORDED = [
    ("E", [84.0, 73.0, 101.0, 94.0]),
    ("lowest purple thing", [28.0, 70.0, 56.0, 114.0]),
    ("black thing under the blue 0", [77.0, 82.0, 101.0, 116.0]),
    ("second lowest red letter", [31.0, 50.0, 49.0, 73.0]),
    ("blue P above third leftmost letter P", [30.0, 27.0, 67.0, 66.0]),
]


def height(glyph: Glyph) -> int:
    return glyph.box[3] - glyph.box[1]


def fitting(match: re.Match, prefix: str, scene: Scene) -> list[Glyph]:
    small, big, color, character, digit, letter = (
        match[f"{prefix}{name}"] for name in ("small", "big", "color", "character", "digit", "letter")
    )
    style = STYLES["crowded" if len(scene.objects) > 6 else "plain"]
    border = (style.small + style.big) / 2 * scene.size  # in the middle of the ambiguous sizes
    return [
        glyph
        for glyph in scene.objects
        if (not small or height(glyph) < border)
        and (not big or height(glyph) > border)
        and color in (None, glyph.color)
        and character in (None, glyph.character)
        and (not digit or glyph.character.isdigit())
        and (not letter or glyph.character.isalpha())
    ]


@pytest.fixture(scope="module")
def described() -> list:
    rng = np.random.default_rng(0)
    samplers = [partial(random_scene, style=style) for style in STYLES.values()]
    return [(t, *described_scene(rng, t, sample)) for t in TYPES for sample in samplers for _ in range(500)]


@pytest.mark.parametrize("size", [height, lambda glyph: np.sqrt(height(glyph) * (glyph.box[2] - glyph.box[0]))])
def test_every_expression_refers_to_its_target_only(described, size):
    """By whichever of the two sizes "largest" is understood: of the font, or of the box."""
    read = Reader(NOUN, fitting, size).read
    for expression_type, scene, expression in described:
        assert expression.type == expression_type
        assert read(expression.text, scene) == (expression_type, [expression.target]), (expression, scene)


def test_expressions_are_varied_and_no_word_is_unknown_to_the_small_vocabulary(described):
    words = Counter(word for _, _, expression in described for word in expression.text.split())
    assert set(words) == {*VOCABULARY, *GLYPH_COLORS, "digit", "number", "letter", *DIGITS, *LETTERS}
    assert min(words.values()) > 20
    tokens = read_tokenizer(str(SMALL_VOCABULARY)).tokenize(" ".join(words))
    assert "[UNK]" not in tokens
    assert "".join(token.removeprefix("##") for token in tokens) == "".join(words).lower()
    assert not any(re.search(r"(?<!letter )\bA\b", expression.text) for *_, expression in described), "an article"


@pytest.mark.parametrize("size", [STYLES["plain"].min_side, 128])
def test_boxes_are_tight_and_glyphs_have_contrast(size):
    rng = np.random.default_rng(1)
    for _ in range(60):
        scene = random_scene(rng, size)
        empty = draw(Scene((), size, scene.background)).astype(int)
        assert empty.min() > 200, "a light background"
        for glyph in scene.objects:
            difference = abs(draw(Scene((glyph,), size, scene.background)) - empty).max(axis=2)  # [H, W]
            rows, columns = (np.flatnonzero((difference > 8).any(axis=axis)) for axis in (1, 0))
            found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert np.abs(np.subtract(found, glyph.box)).max() <= 1, glyph
            assert 0 <= min(glyph.box) <= max(glyph.box) <= size
            assert difference.max() > 60


def test_small_glyphs_differ_in_every_font():
    """The letters that were left out are those that do not: I and 1, B and 8, E and F."""

    def distance(font: str, a: str, b: str) -> float:
        one, other = (np.asarray(glyphs._scaled_mask(glyph, font, 7, 10), float) / 255 for glyph in (a, b))
        return float(abs(one - other).mean())

    pairs = list(itertools.combinations(DIGITS + LETTERS, 2))
    assert min(distance(font, *pair) for font in FONTS for pair in pairs) > 0.05
    assert not set("BDFGIOQRSZ") & set(LETTERS)


def test_splits_epochs_and_recorded_values():
    source = GlyphsConfig(split="test", kinds=TYPES).build()
    samples = [source.load(index, 0) for index in range(5)]
    assert [(sample.phrases[0], sample.boxes[0].tolist()) for sample in samples] == RECORDED
    assert [sample.expression_type for sample in samples] == list(TYPES)
    assert source.provenance.data == "glyphs (seed 0)"
    images = {
        GlyphsConfig(split=split, seed=seed).build().load(0, epoch).image.tobytes()
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(images) == 4 + 2 + 2, "train differs in every epoch"


def test_a_missing_font_is_named(monkeypatch):
    glyphs._font.cache_clear()
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: "/nowhere")
    with pytest.raises(DataError, match=r"/nowhere/fonts/ttf/cmtt10\.ttf.*reinstall matplotlib"):
        glyphs._font("cmtt10")
    monkeypatch.undo()

    def without_freetype(*args: object, **kwargs: object) -> None:
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(ImageFont, "truetype", without_freetype)
    with pytest.raises(DataError, match="FreeType"):
        glyphs._font("cmtt10")

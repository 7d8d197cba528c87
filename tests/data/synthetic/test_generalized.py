"""Expressions of no object and of several: they fit the boxes and nothing else, but nearly fit other objects."""

import re
from collections import Counter

import numpy as np
import pytest

from tests.data.synthetic.reader import RELATION, x, y
from tests.data.synthetic.test_shapes import NOUN, crowded_scene, fitting
from vg.data.source import checked
from vg.data.synthetic.collage import CollageConfig
from vg.data.synthetic.expressions import by_several, described_scene
from vg.data.synthetic.glyphs import GlyphsConfig
from vg.data.synthetic.layout import Scene
from vg.data.synthetic.scenes import Shape, random_scene
from vg.data.synthetic.shapes import ShapesConfig
from vg.models.encoders import SMALL_VOCABULARY, read_tokenizer

RELATED = re.compile(NOUN.format("t_") + RELATION)
SEVERAL = re.compile(r"(?P<number>all the|all|both|the two|the three|the) (?P<phrase>.+)")
PLURAL = re.compile(r"(?<=cross)es$|s$")
SIDES = {"left": (x, -1), "right": (x, 1), "above": (y, -1), "below": (y, 1)}


@pytest.fixture(scope="module")
def described() -> dict:
    rng = np.random.default_rng(0)
    return {
        kind: [described_scene(rng, kind, sample) for sample in (random_scene, crowded_scene) for _ in range(600)]
        for kind in ("absent", "several")
    }


def test_an_absent_expression_fits_no_object_but_its_words_do(described):
    forms = Counter()
    for scene, expression in described["absent"]:
        assert (expression.type, expression.targets) == ("absent", ())
        if match := RELATED.fullmatch(expression.text):
            anchor = re.fullmatch(NOUN.format("a_"), match["anchor"])
            (other,) = fitting(anchor, "a_", scene)
            side, sign = SIDES[match["side"] or ("above" if match["above"] else "below")]
            assert not match["near"]
            candidates = [shape for shape in fitting(match, "t_", scene) if shape is not other]
            assert candidates
            assert all(sign * (side(shape) - side(other)) < 0 for shape in candidates), (expression, scene)
            forms["relation"] += 1
            continue
        match = re.fullmatch(NOUN.format(""), expression.text)
        assert fitting(match, "", scene) == [], (expression, scene)
        words = [name for name in ("small", "big", "color", "form") if match[name]]
        assert len(words) >= 2
        assert not match["color"] or match["color"] in {shape.color for shape in scene.objects}
        assert not match["form"] or match["form"] in {shape.form for shape in scene.objects}
        forms[" ".join(words)] += 1
    assert min(forms.values()) > 10, forms
    assert forms["relation"] < 0.65 * len(described["absent"])


def test_several_fits_all_of_its_objects_and_no_other(described):
    counts = Counter()
    for scene, expression in described["several"]:
        match = SEVERAL.fullmatch(expression.text)
        phrase = re.fullmatch(NOUN.format(""), PLURAL.sub("", match["phrase"]))
        assert phrase, expression.text
        assert fitting(phrase, "", scene) == list(expression.targets), (expression, scene)
        number = {"both": 2, "the two": 2, "the three": 3}.get(match["number"])
        assert number in (None, len(expression.targets))
        counts[len(expression.targets)] += 1
    assert min(counts) == 2
    assert min(counts[number] for number in (2, 3, 4)) > 50


@pytest.mark.parametrize(
    ("noun", "plural"),
    [("cross", "crosses"), ("star", "stars"), ("person", "people"), ("sheep", "sheep"), ("wine glass", "wine glasses")],
)
def test_plurals(noun, plural):
    class Named(Shape):
        nouns = ((noun,),)

    objects = tuple(Named("", "", "", (left, 0, left + 9, 9), (0, 0, 0)) for left in (0, 20, 40, 60))
    expression = by_several(np.random.default_rng(0), Scene(objects, 100, ((0,),)))
    assert expression.text.removeprefix("all ").removeprefix("the ") == plural


@pytest.mark.parametrize("settings", [ShapesConfig, GlyphsConfig, CollageConfig])
def test_samples_of_every_dataset(settings, tmp_path):
    config = settings.miniature(tmp_path)
    config.kinds, config.size = ("absent", "attribute", "several", "relation"), 40
    source = config.build()
    assert source.provenance.task == "generalized", "which selects the metric of gRefCOCO"
    samples = [checked(source.load(index, 0)) for index in range(40)]
    assert Counter(sample.expression_type for sample in samples) == dict.fromkeys(config.kinds, 10)
    for sample in samples:
        number = len(sample.boxes)
        assert {"absent": number == 0, "several": number > 1}.get(sample.expression_type, number == 1)
    assert len({sample.id for sample in samples}) == 40
    del config.kinds
    assert settings.miniature(tmp_path).build().provenance.task == "expressions"


def test_no_word_is_unknown_to_the_small_vocabulary(described):
    tokenizer = read_tokenizer(str(SMALL_VOCABULARY))
    words = {word for pairs in described.values() for _, expression in pairs for word in expression.text.split()}
    pieces = {word: tokenizer.tokenize(word) for word in words}
    plurals = {word for word, tokens in pieces.items() if len(tokens) > 1}
    regular = ("circle", "square", "triangle", "star", "diamond", "thing", "object")
    assert plurals == {"crosses", *(f"{noun}s" for noun in regular)}
    assert pieces["stars"] == ["star", "##s"]
    assert pieces["crosses"] == ["cross", "##e", "##s"]

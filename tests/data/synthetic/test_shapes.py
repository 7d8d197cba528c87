"""The drawn data set: every expression names its object and no other, and everything is a function of the seed.

The reader below shares nothing with the code under test: it has its own grammar, and takes what it knows of a scene
from forms, colors and boxes, with the plain meaning of the words and no margins.
"""

import math
import re
import time
from collections import Counter

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from vg.data.refcoco.source import samples_of
from vg.data.synthetic.expressions import VOCABULARY, described_scene
from vg.data.synthetic.scenes import FORMS, STYLES, Scene, Shape, draw, random_scene
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import DataError

KINDS = ("attribute", "superlative", "relation")
HARD_KINDS = ("ordinal", "chain")
PLAIN, CROWDED = STYLES["plain"], STYLES["crowded"]
NOUN = (
    r"(?:the )?(?:(?P<{0}small>small|little) |(?P<{0}big>big|large) )?"
    r"(?:(?P<{0}color>red|green|blue|yellow|purple|orange|black|white) )?"
    r"(?:(?P<{0}form>circle|square|triangle|star|cross|diamond)|thing|object)"
)
RELATION = re.compile(
    NOUN.format("t_")
    + r" (?:(?:(?:to|on) the )?(?P<side>left|right) of|(?P<above>above)|(?P<below>below|under)"
    + r"|(?P<near>closest to|nearest to|next to)) (?P<anchor>.+)"
)
SUPERLATIVE = re.compile(
    r"(?:the )?(?:(?P<ordinal>second|third) )?"
    r"(?P<word>leftmost|rightmost|topmost|highest|bottommost|lowest|smallest|largest|biggest) (?P<noun>.+)"
    r"|(?P<far_noun>.+) on the far (?P<far>left|right)"
)


def x(shape: Shape) -> float:
    return (shape.box[0] + shape.box[2]) / 2


def y(shape: Shape) -> float:
    return (shape.box[1] + shape.box[3]) / 2


def side(shape: Shape) -> float:
    return math.sqrt((shape.box[2] - shape.box[0]) * (shape.box[3] - shape.box[1]))


def fitting(match: re.Match, prefix: str, scene: Scene) -> list[Shape]:
    small, big, color, form = (match[f"{prefix}{name}"] for name in ("small", "big", "color", "form"))
    style = CROWDED if len(scene.shapes) > PLAIN.counts[1] else PLAIN
    border = (style.small + style.big) / 2 * scene.size  # in the middle of the sizes nobody should call small or big
    return [
        shape
        for shape in scene.shapes
        if (not small or side(shape) < border)
        and (not big or side(shape) > border)
        and color in (None, shape.color)
        and form in (None, shape.form)
    ]


def read(text: str, scene: Scene) -> tuple[str, list[Shape]]:
    """The kind of an expression and all shapes that satisfy it."""
    if match := RELATION.fullmatch(text):
        anchor_kind, (anchor,) = read(match["anchor"], scene)
        assert anchor_kind in ("attribute", "superlative", "ordinal"), "a relation of a relation can be read two ways"
        assert anchor_kind == "attribute" or not text.endswith(("left", "right")), "left of what?"
        kind = "relation" if anchor_kind == "attribute" else "chain"
        candidates = [shape for shape in fitting(match, "t_", scene) if shape is not anchor]
        assert len(candidates) >= 2, "the relation does not matter"
        if match["near"]:
            distances = [math.hypot(x(shape) - x(anchor), y(shape) - y(anchor)) for shape in candidates]
            return kind, [s for s, d in zip(candidates, distances, strict=True) if d == min(distances)]
        if match["side"]:
            sign = 1 if match["side"] == "right" else -1
            return kind, [shape for shape in candidates if sign * (x(shape) - x(anchor)) > 0]
        sign = 1 if match["below"] else -1
        return kind, [shape for shape in candidates if sign * (y(shape) - y(anchor)) > 0]
    if match := SUPERLATIVE.fullmatch(text):
        noun = re.fullmatch(NOUN.format(""), match["noun"] or match["far_noun"])
        assert noun, text
        candidates = fitting(noun, "", scene)
        place = {None: 0, "second": 1, "third": 2}[match["ordinal"]]
        assert len(candidates) >= 2 + place, "the superlative does not matter"
        word = match["word"] or {"left": "leftmost", "right": "rightmost"}[match["far"]]
        measure = {
            "leftmost": lambda shape: -x(shape),
            "rightmost": x,
            "topmost": lambda shape: -y(shape),
            "highest": lambda shape: -y(shape),
            "bottommost": y,
            "lowest": y,
            "smallest": lambda shape: -side(shape),
            "largest": side,
            "biggest": side,
        }[word]
        values = sorted(map(measure, candidates), reverse=True)
        kind = "ordinal" if match["ordinal"] else "superlative"
        return kind, [shape for shape in candidates if measure(shape) == values[place]]
    match = re.fullmatch(NOUN.format(""), text)
    assert match, f"not in the grammar: {text}"
    return "attribute", fitting(match, "", scene)


@pytest.fixture(scope="module")
def described() -> list:
    rng = np.random.default_rng(0)
    return [(kind, *described_scene(rng, kind)) for kind in KINDS for _ in range(1500)]


def test_every_expression_names_its_target_and_nothing_else(described):
    for kind, scene, expression in described:
        assert expression.kind == kind
        assert read(expression.text, scene) == (kind, [expression.target]), (expression, scene)


@pytest.fixture(scope="module")
def hard() -> list:
    rng = np.random.default_rng(5)
    return [(kind, *described_scene(rng, kind, style=CROWDED)) for kind in KINDS + HARD_KINDS for _ in range(400)]


def test_expressions_for_crowded_scenes_name_their_target_and_nothing_else(hard):
    for kind, scene, expression in hard:
        assert expression.kind == kind
        assert read(expression.text, scene) == (kind, [expression.target]), (expression, scene)


def test_crowded_scenes_are_hard(hard):
    fewest, most = CROWDED.counts
    assert {len(scene.shapes) for _, scene, _ in hard} == set(range(fewest, most + 1))
    sides = [side(shape) / scene.size for _, scene, _ in hard for shape in scene.shapes]
    assert 0.07 < min(sides) < 0.09 < 0.19 < max(sides) < 0.21
    alike = [
        sum(shape.form == e.target.form or shape.color == e.target.color for shape in scene.shapes) - 1
        for _, scene, e in hard
    ]
    assert np.mean(alike) > 4
    lengths = {kind: np.mean([len(e.text.split()) for k, _, e in hard if k == kind]) for kind in KINDS + HARD_KINDS}
    assert lengths["chain"] > lengths["relation"] + 0.5


def test_hard_expressions_are_found_in_plain_scenes_too():
    rng = np.random.default_rng(6)
    for kind in HARD_KINDS:
        for _ in range(300):
            scene, expression = described_scene(rng, kind)
            assert read(expression.text, scene) == (kind, [expression.target]), (expression, scene)


def test_other_shapes_share_color_or_form_with_the_target(described):
    alike = [
        any((s.color == e.target.color) != (s.form == e.target.form) for s in scene.shapes if s is not e.target)
        for _, scene, e in described
    ]
    assert np.mean(alike) > 0.85


def test_wordings_are_varied(described, hard):
    words = Counter(word for _, _, expression in described + hard for word in expression.text.split())
    assert set(words) == set(VOCABULARY)
    assert list(VOCABULARY) == sorted(VOCABULARY)
    assert len(VOCABULARY) < 80
    assert min(words.values()) > 20
    assert len({expression.text for _, _, expression in described}) > 2000
    numbers = Counter(len(scene.shapes) for _, scene, _ in described)
    assert set(numbers) == {3, 4, 5, 6}
    assert min(numbers.values()) > 0.1 * len(described)


@pytest.mark.parametrize("size", [PLAIN.min_side, 128, 256])
def test_boxes_are_tight(size):
    rng = np.random.default_rng(1)
    forms = Counter()
    for _ in range(60):
        scene = random_scene(rng, size)
        empty = draw(Scene((), size, scene.background)).astype(int)
        for shape in scene.shapes:
            forms[shape.form] += 1
            drawn = abs(draw(Scene((shape,), size, scene.background)) - empty).max(axis=2) > 8  # [H, W]
            rows, columns = (np.flatnonzero(drawn.any(axis=axis)) for axis in (1, 0))
            found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert np.abs(np.subtract(found, shape.box)).max() <= 1, shape
            assert 0 <= min(shape.box) <= max(shape.box) <= size
    assert set(forms) == set(FORMS)


def test_shapes_keep_apart():
    rng = np.random.default_rng(2)
    for _ in range(200):
        scene = random_scene(rng)
        for number, shape in enumerate(scene.shapes):
            assert 0.13 < side(shape) / scene.size < 0.36
            for other in scene.shapes[:number]:
                (left, top, right, bottom), (a, b, c, d) = shape.box, other.box
                assert max(left - c, a - right, top - d, b - bottom) >= PLAIN.gap * scene.size


def test_drawing_shows_the_shapes():
    scene = Scene((Shape("square", "red", "big", (10, 20, 50, 60), (200, 0, 0)),), 64, ((160,),))
    image = draw(scene)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert (image[20:60, 10:50] == (200, 0, 0)).all()
    image[20:60, 10:50] = 160
    assert (image == 160).all()


def same(a, b) -> bool:
    return (
        (a.id, a.phrases, a.expression_type) == (b.id, b.phrases, b.expression_type)
        and np.array_equal(a.image, b.image)
        and np.array_equal(a.boxes, b.boxes)
        and np.array_equal(a.phrase_ids, b.phrase_ids)
    )


@pytest.mark.parametrize("view", ["expression", "detection"])
def test_a_sample_is_a_function_of_seed_split_epoch_and_index(view):
    def samples(split="train", seed=0, epoch=0):
        source = ShapesConfig(split=split, seed=seed, view=view).build()
        return [source.load(index, epoch) for index in range(20)]

    def pictures(samples):
        return {sample.image.tobytes() for sample in samples}

    first = samples()
    assert all(map(same, first, samples()))
    assert len(pictures(first)) == 20
    for other in (samples(epoch=1), samples(seed=1), samples(split="val"), samples(split="test")):
        assert not pictures(first) & pictures(other)
    for split in ("val", "test"):
        assert all(map(same, samples(split), samples(split, epoch=7)))


def test_the_test_split_is_the_same_everywhere():
    """Golden values: results on this split are compared between machines and over time."""
    source = ShapesConfig(split="test").build()
    samples = [source.load(index, 0) for index in (0, 1, 2, 1199)]
    assert [(sample.phrases[0], sample.boxes[0].tolist()) for sample in samples] == [
        ("the large black object", [76.0, 76.0, 117.0, 115.0]),
        ("rightmost object", [90.0, 78.0, 113.0, 101.0]),
        ("square right of the little triangle", [82.0, 93.0, 105.0, 116.0]),
        ("the red thing closest to the green thing", [76.0, 36.0, 114.0, 69.0]),
    ]


def test_the_crowded_test_split_is_the_same_everywhere():
    source = ShapesConfig(split="test", scenes="crowded", kinds=KINDS + HARD_KINDS).build()
    samples = [source.load(index, 0) for index in range(5)]
    assert [(sample.phrases[0], sample.boxes[0].tolist()) for sample in samples] == [
        ("the orange circle", [71.0, 7.0, 94.0, 30.0]),
        ("the lowest white thing", [102.0, 47.0, 121.0, 66.0]),
        ("blue triangle next to the big black triangle", [58.0, 28.0, 85.0, 51.0]),
        ("third lowest orange object", [33.0, 76.0, 47.0, 90.0]),
        ("the blue circle closest to second rightmost blue cross", [56.0, 66.0, 68.0, 78.0]),
    ]


def test_splits_and_kinds():
    for split, size in (("train", 16_000), ("val", 300), ("test", 1_200)):
        assert len(ShapesConfig(split=split).build()) == size
    source = ShapesConfig(split="test").build()
    samples = [source.load(index, 0) for index in range(len(source))]
    assert Counter(sample.expression_type for sample in samples) == dict.fromkeys(KINDS, 400)
    assert len({sample.id for sample in samples}) == 1_200
    assert source.provenance.split == "test"
    only = ShapesConfig(size=10, kinds=("relation",)).build()
    assert {only.load(index, 0).expression_type for index in range(10)} == {"relation"}


def test_rows_have_the_schema_of_the_hub():
    source = ShapesConfig(split="val", image_size=96).build()
    row = source.row(5)
    left, top, width, height = row["bbox"]
    assert {name: type(value) for name, value in row.items() if name != "image"} == {
        "question_id": str,
        "question": str,
        "answer": list,
        "bbox": list,
        "segmentation": list,
        "iscrowd": int,
        "file_name": str,
        "kinds": list,
    }
    assert row["image"].size == (96, 96)
    assert row["image"].mode == "RGB"
    assert len(row["answer"]) == len(row["kinds"]) == 1
    assert all(isinstance(number, float) for number in row["bbox"])
    xs, ys = row["segmentation"][::2], row["segmentation"][1::2]
    assert (min(xs), min(ys), max(xs), max(ys)) == (left, top, left + width, top + height)
    (sample,) = samples_of(row, "shapes", "val")
    assert same(sample, source.load(5, 0))
    assert sample.boxes.tolist() == [[left, top, left + width, top + height]]


def test_detection_view_boxes_everything_that_fits():
    source = ShapesConfig(view="detection").build()
    several = 0
    for index in range(300):
        sample = source.load(index, 0)
        scene = random_scene(np.random.default_rng([0, 0, 0, index]))
        assert np.array_equal(draw(scene), sample.image)
        assert 1 <= len(set(sample.phrases)) == len(sample.phrases) <= 4
        expected = [
            (number, shape.box)
            for number, phrase in enumerate(sample.phrases)
            for shape in fitting(re.fullmatch(NOUN.format(""), phrase), "", scene)
        ]
        found = zip(sample.phrase_ids.tolist(), map(tuple, sample.boxes.tolist()), strict=True)
        assert sorted(found) == sorted(expected)
        assert set(sample.phrase_ids.tolist()) == set(range(len(sample.phrases)))
        several += len(set(map(tuple, sample.boxes.tolist()))) < len(sample.boxes)
        assert sample.boxes.dtype == np.float32
        assert sample.phrase_ids.dtype == np.int64
    assert several > 30, "a shape may fit two phrases"


def test_wrong_settings_say_what_to_change():
    for settings, named in (
        ({"split": "testA"}, "train, val, test"),
        ({"image_size": 20}, "at least"),
        ({"image_size": 64, "scenes": "crowded"}, "at least 80"),
        ({"seed": -1}, "seed"),
        ({"size": 0}, "size"),
        ({"kinds": ("color",)}, "attribute, superlative, relation, ordinal, chain"),
    ):
        with pytest.raises(DataError, match=named):
            ShapesConfig(**settings).build()
    with pytest.raises(ValidationError, match="image_sise"):
        TypeAdapter(ShapesConfig).validate_python({"image_sise": 64})
    with pytest.raises(IndexError, match="there are 300"):
        ShapesConfig(split="val").build().load(300, 0)


def test_drawing_is_fast_enough_to_draw_every_epoch_anew():
    source = ShapesConfig().build()
    start = time.process_time()
    for index in range(300):
        source.load(index, 0)
    assert (time.process_time() - start) / 300 < 0.005  # seconds; about 0.0006 measured, with room for slow machines

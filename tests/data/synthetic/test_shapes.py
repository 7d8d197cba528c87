"""The drawn dataset: every expression refers to exactly one shape, and samples depend on the seed only."""

import re
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from tests.data.synthetic.reader import Reader, side
from tests.data.synthetic.words import VOCABULARY
from vg.data.synthetic.expressions import described_scene
from vg.data.synthetic.scenes import COLORS, FORMS, STYLES, Scene, Shape, draw, random_scene
from vg.data.synthetic.shapes import ShapesConfig
from vg.errors import DataError

TYPES = ("attribute", "superlative", "relation")
HARD_TYPES = ("ordinal", "chain")
PLAIN, CROWDED = STYLES["plain"], STYLES["crowded"]
crowded_scene = partial(random_scene, style=CROWDED)
NOUN = (
    r"(?:the )?(?:(?P<{0}small>small|little) |(?P<{0}big>big|large) )?"
    r"(?:(?P<{0}color>red|green|blue|yellow|purple|orange|black|white) )?"
    r"(?:(?P<{0}form>circle|square|triangle|star|cross|diamond)|thing|object)"
)


def fitting(match: re.Match, prefix: str, scene: Scene) -> list[Shape]:
    small, big, color, form = (match[f"{prefix}{name}"] for name in ("small", "big", "color", "form"))
    style = CROWDED if len(scene.objects) > PLAIN.counts[1] else PLAIN
    border = (style.small + style.big) / 2 * scene.size  # in the middle of the ambiguous sizes
    return [
        shape
        for shape in scene.objects
        if (not small or side(shape) < border)
        and (not big or side(shape) > border)
        and color in (None, shape.color)
        and form in (None, shape.form)
    ]


read = Reader(NOUN, fitting).read


@pytest.fixture(scope="module")
def described() -> list:
    rng = np.random.default_rng(0)
    return [(type_, *described_scene(rng, type_, random_scene)) for type_ in TYPES for _ in range(1500)]


def test_every_expression_refers_to_its_target_only(described):
    for expression_type, scene, expression in described:
        assert expression.type == expression_type
        assert read(expression.text, scene) == (expression_type, [expression.target]), (expression, scene)


@pytest.fixture(scope="module")
def hard() -> list:
    rng = np.random.default_rng(5)
    return [(type_, *described_scene(rng, type_, crowded_scene)) for type_ in TYPES + HARD_TYPES for _ in range(400)]


def test_every_expression_in_a_crowded_scene_refers_to_its_target_only(hard):
    for expression_type, scene, expression in hard:
        assert expression.type == expression_type
        assert read(expression.text, scene) == (expression_type, [expression.target]), (expression, scene)


def test_crowded_scenes_are_hard(hard):
    fewest, most = CROWDED.counts
    assert {len(scene.objects) for _, scene, _ in hard} == set(range(fewest, most + 1))
    sides = [side(shape) / scene.size for _, scene, _ in hard for shape in scene.objects]
    assert 0.07 < min(sides) < 0.09 < 0.19 < max(sides) < 0.21
    alike = [
        sum(shape.form == e.target.form or shape.color == e.target.color for shape in scene.objects) - 1
        for _, scene, e in hard
    ]
    assert np.mean(alike) > 4
    lengths = {type_: np.mean([len(e.text.split()) for t, _, e in hard if t == type_]) for type_ in TYPES + HARD_TYPES}
    assert lengths["chain"] > lengths["relation"] + 0.5


def test_hard_expressions_exist_in_plain_scenes():
    rng = np.random.default_rng(6)
    for expression_type in HARD_TYPES:
        for _ in range(300):
            scene, expression = described_scene(rng, expression_type, random_scene)
            assert read(expression.text, scene) == (expression_type, [expression.target]), (expression, scene)


def test_other_shapes_share_color_or_form_with_the_target(described):
    alike = [
        any((s.color == e.target.color) != (s.form == e.target.form) for s in scene.objects if s is not e.target)
        for _, scene, e in described
    ]
    assert np.mean(alike) > 0.85


def test_wordings_are_varied(described, hard):
    words = Counter(word for _, _, expression in described + hard for word in expression.text.split())
    assert set(words) == {*VOCABULARY, *COLORS, *FORMS}
    assert len(words) < 80
    assert min(words.values()) > 20
    assert len({expression.text for _, _, expression in described}) > 2000
    counts = Counter(len(scene.objects) for _, scene, _ in described)
    assert set(counts) == {3, 4, 5, 6}
    assert min(counts.values()) > 0.1 * len(described)


@pytest.mark.parametrize("size", [PLAIN.min_side, 128, 256])
def test_boxes_are_tight(size):
    rng = np.random.default_rng(1)
    forms = Counter()
    for _ in range(60):
        scene = random_scene(rng, size)
        empty = draw(Scene((), size, scene.background)).astype(int)
        for shape in scene.objects:
            forms[shape.form] += 1
            drawn = abs(draw(Scene((shape,), size, scene.background)) - empty).max(axis=2) > 8  # [H, W]
            rows, columns = (np.flatnonzero(drawn.any(axis=axis)) for axis in (1, 0))
            found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert np.abs(np.subtract(found, shape.box)).max() <= 1, shape
            assert 0 <= min(shape.box) <= max(shape.box) <= size
    assert set(forms) == set(FORMS)


def test_shapes_do_not_touch():
    rng = np.random.default_rng(2)
    for _ in range(200):
        scene = random_scene(rng)
        for index, shape in enumerate(scene.objects):
            assert 0.13 < side(shape) / scene.size < 0.36
            for other in scene.objects[:index]:
                (left, top, right, bottom), (a, b, c, d) = shape.box, other.box
                assert max(left - c, a - right, top - d, b - bottom) >= PLAIN.gap * scene.size


def test_draw_paints_the_shapes():
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

    def images(samples):
        return {sample.image.tobytes() for sample in samples}

    first = samples()
    assert all(map(same, first, samples()))
    assert len(images(first)) == 20
    for other in (samples(epoch=1), samples(seed=1), samples(split="val"), samples(split="test")):
        assert not images(first) & images(other)
    for split in ("val", "test"):
        assert all(map(same, samples(split), samples(split, epoch=7)))


def test_test_split_equals_recorded_values():
    """Results on this split are compared between machines and versions."""
    source = ShapesConfig(split="test").build()
    samples = [source.load(index, 0) for index in (0, 1, 2, 1199)]
    assert [(sample.phrases[0], sample.boxes[0].tolist()) for sample in samples] == [
        ("the large black object", [76.0, 76.0, 117.0, 115.0]),
        ("rightmost object", [90.0, 78.0, 113.0, 101.0]),
        ("square right of the little triangle", [82.0, 93.0, 105.0, 116.0]),
        ("the red thing closest to the green thing", [76.0, 36.0, 114.0, 69.0]),
    ]


def test_crowded_test_split_equals_recorded_values():
    source = ShapesConfig(split="test", scenes="crowded", kinds=TYPES + HARD_TYPES).build()
    samples = [source.load(index, 0) for index in range(5)]
    assert [(sample.phrases[0], sample.boxes[0].tolist()) for sample in samples] == [
        ("the orange circle", [71.0, 7.0, 94.0, 30.0]),
        ("the lowest white thing", [102.0, 47.0, 121.0, 66.0]),
        ("blue triangle next to the big black triangle", [58.0, 28.0, 85.0, 51.0]),
        ("third lowest orange object", [33.0, 76.0, 47.0, 90.0]),
        ("the blue circle closest to second rightmost blue cross", [56.0, 66.0, 68.0, 78.0]),
    ]


def test_splits_and_expression_types():
    for split, size in (("train", 16_000), ("val", 300), ("test", 1_200)):
        assert len(ShapesConfig(split=split).build()) == size
    source = ShapesConfig(split="test").build()
    samples = [source.load(index, 0) for index in range(len(source))]
    assert Counter(sample.expression_type for sample in samples) == dict.fromkeys(TYPES, 400)
    assert len({sample.id for sample in samples}) == 1_200
    assert source.provenance.split == "test"
    only = ShapesConfig(size=10, kinds=("relation",)).build()
    assert {only.load(index, 0).expression_type for index in range(10)} == {"relation"}


def test_detection_view_has_a_box_for_every_matching_shape():
    source = ShapesConfig(view="detection").build()
    several = 0
    for index in range(300):
        sample = source.load(index, 0)
        scene = random_scene(np.random.default_rng([0, 0, 0, index]))
        assert np.array_equal(draw(scene), sample.image)
        assert 1 <= len(set(sample.phrases)) == len(sample.phrases) <= 4
        expected = [
            (phrase_id, shape.box)
            for phrase_id, phrase in enumerate(sample.phrases)
            for shape in fitting(re.fullmatch(NOUN.format(""), phrase), "", scene)
        ]
        found = zip(sample.phrase_ids.tolist(), map(tuple, sample.boxes.tolist()), strict=True)
        assert sorted(found) == sorted(expected)
        assert set(sample.phrase_ids.tolist()) == set(range(len(sample.phrases)))
        several += len(set(map(tuple, sample.boxes.tolist()))) < len(sample.boxes)
        assert sample.boxes.dtype == np.float32
        assert sample.phrase_ids.dtype == np.int64
    assert several > 30, "a shape may match two phrases"


def test_errors_of_invalid_settings_say_how_to_fix_them():
    for settings, message in (
        ({"image_size": 20}, "at least"),
        ({"image_size": 64, "scenes": "crowded"}, "at least 80"),
        ({"view": "detection", "expressions_per_scene": 2}, "a scene is one sample; set it to 1"),
    ):
        with pytest.raises(DataError, match=message):
            ShapesConfig(**settings).build()
    for settings, message in (
        ({"image_sise": 64}, "image_sise"),
        ({"split": "testA"}, "'train', 'val' or 'test'"),
        ({"seed": -1}, "seed\n.*greater than or equal to 0"),
        ({"size": 0}, "size\n.*greater than 0"),
        ({"kinds": ["color"]}, "'attribute', 'superlative', 'relation', 'closest', 'ordinal', 'chain'"),
        ({"kinds": []}, "kinds\n.*at least 1 item"),
    ):
        with pytest.raises(ValidationError, match=message):
            TypeAdapter(ShapesConfig).validate_python(settings)
    with pytest.raises(IndexError, match="has 300 samples"):
        ShapesConfig(split="val").build().load(300, 0)


def test_drawing_is_fast_enough_to_generate_every_epoch():
    source = ShapesConfig().build()
    start = time.process_time()
    for index in range(300):
        source.load(index, 0)
    assert (time.process_time() - start) / 300 < 0.005  # seconds; about 0.0006 measured

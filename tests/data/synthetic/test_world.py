"""Several expressions of one scene, each a sample of its own."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.data.synthetic.test_shapes import read
from vg.config import load_config
from vg.data.images import decoded_once
from vg.data.source import checked
from vg.data.synthetic.comparisons import POSITION_LEAD
from vg.data.synthetic.expressions import RELATIONS, Expression, ExpressionType, described_scene, further_expressions
from vg.data.synthetic.glyphs import GlyphsConfig
from vg.data.synthetic.layout import Grid, Scene
from vg.data.synthetic.scenes import Shape, random_scene
from vg.data.synthetic.shapes import ShapesConfig
from vg.data.synthetic.world import WorldConfig
from vg.errors import ConfigError

DEMO = Path(__file__).parents[3] / "configs" / "demo_rec.yaml"
TYPES = ("attribute", "superlative", "relation", "ordinal", "chain")


def test_further_expressions_refer_to_their_targets_only() -> None:
    rng = np.random.default_rng(0)
    for index in range(300):
        types = [TYPES[(index + i) % len(TYPES)] for i in range(4)]
        scene, first = described_scene(rng, types[0], random_scene)
        further = further_expressions(rng, scene, first, types[1:])
        assert len(further) == 3
        for expression in further:
            assert read(expression.text, scene) == (expression.type, [expression.target]), (expression, scene)


def test_a_scene_without_any_of_the_types_repeats_the_first_expression() -> None:
    rng = np.random.default_rng(0)
    scene, first = described_scene(rng, "attribute", random_scene)
    lonely: Scene = Scene((first.target,), scene.size, scene.background)
    assert further_expressions(rng, lonely, first, ["ordinal", "chain"]) == [first, first]


@pytest.mark.parametrize("settings", [ShapesConfig, GlyphsConfig])
def test_samples_of_a_scene_share_its_image(settings: type[WorldConfig]) -> None:
    source = settings(size=42, expressions_per_scene=4, kinds=TYPES).build()  # type: ignore[attr-defined]
    samples = [checked(source.load(index, 3)) for index in range(42)]
    groups = source.image_groups(3)
    assert Counter(groups.tolist()) == {**dict.fromkeys(range(10), 4), 10: 2}
    for one, other in pairwise(samples):
        same = groups[int(one.id.split("/")[-2])] == groups[int(other.id.split("/")[-2])]
        assert np.array_equal(one.image, other.image) == same
    assert len({sample.id for sample in samples}) == 42
    assert len(Counter(sample.phrases for sample in samples)) > 35
    assert set(Counter(sample.expression_type for sample in samples)) == set(TYPES)
    in_another_order = [source.load(index, 3) for index in reversed(range(42))]
    for sample, again in zip(samples, reversed(in_another_order), strict=True):
        assert sample.phrases == again.phrases
        np.testing.assert_array_equal(sample.image, again.image)
    with decoded_once():
        assert source.load(0, 3).image is source.load(3, 3).image
    assert source.load(0, 3).image is not source.load(3, 3).image
    with pytest.raises(IndexError, match="there is no sample 42"):
        source.load(42, 3)


def test_a_smaller_margin_makes_harder_expressions_of_one_object() -> None:
    smallest = {}
    for margin in (1.0, 0.5):

        def sample(rng: np.random.Generator, margin: float = margin) -> Scene[Shape, Grid]:
            return replace(random_scene(rng), margin=margin)

        rng = np.random.default_rng(0)
        described = [(t, *described_scene(rng, t, sample)) for t in TYPES for _ in range(300)]
        for expression_type, scene, expression in described:
            assert read(expression.text, scene) == (expression_type, [expression.target]), (expression, scene)
        smallest[margin] = min(
            lead(scene, expression.target)
            for _, scene, expression in described
            if expression.text in {"leftmost thing", "leftmost object", "the leftmost thing", "the leftmost object"}
        )
    assert POSITION_LEAD / 2 <= smallest[0.5] < POSITION_LEAD <= smallest[1.0]


def lead(scene: Scene[Shape, Grid], target: Shape) -> float:
    """Return how far left of all others an object is."""
    return min(item.center[0] - target.center[0] for item in scene.objects if item != target) / scene.size


def test_the_anchor_decides_which_object_is_closest() -> None:
    for scene, expression in some_scenes("closest", 200):
        assert read(expression.text, scene) == ("relation", [expression.target]), (expression, scene)
        assert decided_by_anchor(scene, expression)
    relations = [pair for pair in some_scenes("relation", 1000) if words_of_closeness(pair[1])]
    assert 0.3 < np.mean([decided_by_anchor(*pair) for pair in relations]) < 0.8  # the others can be guessed


def some_scenes(expression_type: ExpressionType, count: int) -> list[tuple[Scene[Shape, Grid], Expression[Shape]]]:
    rng = np.random.default_rng(0)
    return [described_scene(rng, expression_type, random_scene) for _ in range(count)]


def words_of_closeness(expression: Expression[Shape]) -> str | None:
    return next((words for words in RELATIONS["near"] if words in expression.text), None)


def decided_by_anchor(scene: Scene[Shape, Grid], expression: Expression[Shape]) -> bool:
    """Whether something else is closest to another one of the objects that the words before the relation fit."""
    _, candidates = read(expression.text.split(f" {words_of_closeness(expression)} ")[0], scene)
    anchors = [item for item in scene.objects if item not in candidates]
    return any(min(candidates, key=item.distance) != expression.target for item in anchors)


def test_margins_are_settings_of_a_world() -> None:
    whole, half = (ShapesConfig(size=400, margin=margin, kinds=("superlative",)).build() for margin in (1.0, 0.5))
    differing = sum(whole.load(index, 0).phrases != half.load(index, 0).phrases for index in range(400))
    assert differing > 40
    with pytest.raises(ConfigError, match=r"margin.*greater than 0"):
        load_config(DEMO, ["data.train.margin=0"])


def test_the_first_expression_of_a_scene_does_not_depend_on_their_number() -> None:
    one, four = (ShapesConfig(size=4, expressions_per_scene=number).build() for number in (1, 4))
    assert one.load(0, 0).phrases == four.load(0, 0).phrases
    np.testing.assert_array_equal(one.load(0, 0).image, four.load(0, 0).image)

"""Several expressions of one scene, each a sample of its own."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from tests.data.synthetic.test_shapes import read
from vg.data.source import checked
from vg.data.synthetic.expressions import described_scene, further_expressions
from vg.data.synthetic.glyphs import GlyphsConfig
from vg.data.synthetic.layout import Scene
from vg.data.synthetic.scenes import random_scene
from vg.data.synthetic.shapes import ShapesConfig
from vg.data.synthetic.world import WorldConfig

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
    with pytest.raises(IndexError, match="there is no sample 42"):
        source.load(42, 3)


def test_the_first_expression_of_a_scene_does_not_depend_on_their_number() -> None:
    one, four = (ShapesConfig(size=4, expressions_per_scene=number).build() for number in (1, 4))
    assert one.load(0, 0).phrases == four.load(0, 0).phrases
    np.testing.assert_array_equal(one.load(0, 0).image, four.load(0, 0).image)

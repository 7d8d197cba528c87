"""Augmentation: boxes follow the image, phrases stay true, and the seed determines the result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vg.data.augment import AugmentConfig, ResizeConfig
from vg.types import Caption, Sample

SEEDS = [(0, 0, index) for index in range(60)]


def make(boxes: list[list[int]] | None = None) -> Sample:
    """A noisy image, 40 high and 60 wide; every box is filled with its own color."""
    image = np.random.default_rng(0).integers(100, 140, (40, 60, 3), dtype=np.uint8)
    array = np.array([[5, 10, 15, 30], [40, 4, 58, 20]] if boxes is None else boxes, np.float32).reshape(-1, 4)
    for index, (left, top, right, bottom) in enumerate(array.astype(int)):
        image[top:bottom, left:right] = (250, 10, 40 * index)
    return Sample(
        "a", image, ("left red box", "box on the right"), array, np.arange(len(array), dtype=np.int64), "color"
    )


def colored_region(sample: Sample, index: int) -> list[float]:
    """Return the region (xyxy) that has the color of a box."""
    rows, columns = np.nonzero((sample.image == (250, 10, 40 * index)).all(axis=-1))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_flip_moves_boxes_and_swaps_words() -> None:
    augment = AugmentConfig(flip=1).build()
    assert augment is not None
    sample, flipped = make(), augment(make(), (0, 0, 0))
    np.testing.assert_array_equal(flipped.image, sample.image[:, ::-1])
    np.testing.assert_allclose(flipped.boxes, [[45, 10, 55, 30], [2, 4, 20, 20]], atol=1e-4)
    assert flipped.boxes.dtype == np.float32
    assert flipped.phrases == ("right red box", "box on the left")
    assert flipped.phrase_ids.tolist() == [0, 1]
    assert (flipped.id, flipped.expression_type) == ("a", "color")
    twice = augment(flipped, (0, 0, 1))
    np.testing.assert_array_equal(twice.image, sample.image)
    np.testing.assert_allclose(twice.boxes, sample.boxes, atol=1e-4)
    assert twice.phrases == sample.phrases


def test_a_sample_with_a_doubtful_phrase_is_not_flipped() -> None:
    augment = AugmentConfig(flip=1).build()
    assert augment is not None
    sample = replace(make(), phrases=("left red box", "half of the box left"))
    result = augment(sample, (0, 0, 0))
    assert result.phrases == sample.phrases
    np.testing.assert_array_equal(result.image, sample.image)
    np.testing.assert_array_equal(result.boxes, sample.boxes)


def test_a_caption_is_flipped_only_if_its_words_stay() -> None:
    """Swapped words would move the characters that its phrases refer to."""
    augment = AugmentConfig(flip=1).build()
    assert augment is not None
    for text, is_flipped in (
        ("a red box and a box", True),
        ("a red box left of a box", False),
        ("half is left", False),
    ):
        phrases = ("a red box", "box")
        sample = replace(make(), phrases=phrases, caption=Caption(text, (((0, 9),), ((6, 9),))))
        result = augment(sample, (0, 0, 0))
        assert (result.phrases, result.caption) == (phrases, sample.caption)
        assert np.array_equal(result.image, sample.image) != is_flipped
        assert np.array_equal(result.boxes, sample.boxes) != is_flipped


def test_flip_probability() -> None:
    augment = AugmentConfig(flip=0.25).build()
    assert augment is not None
    flips = [augment(make(), (0, 0, index)).phrases[0] == "right red box" for index in range(400)]
    assert 60 < sum(flips) < 140


def test_crop_contains_all_boxes() -> None:
    augment = AugmentConfig(crop=1).build()
    assert augment is not None
    sizes = set()
    for seed in SEEDS:
        sample, cropped = make(), augment(make(), seed)
        height, width = cropped.image.shape[:2]
        sizes.add((height, width))
        assert len(cropped.boxes) == 2
        assert cropped.phrases == sample.phrases
        np.testing.assert_allclose(cropped.boxes[:, 2:] - cropped.boxes[:, :2], [[10, 20], [18, 16]], atol=1e-3)
        assert (cropped.boxes >= -1e-3).all()
        assert (cropped.boxes <= np.array([width, height, width, height]) + 1e-3).all()
        for index, box in enumerate(cropped.boxes):
            np.testing.assert_allclose(box, colored_region(cropped, index), atol=1e-3)
    assert len(sizes) > 10, "crops differ"


def test_crop_contains_boxes_of_fractions_of_pixels() -> None:
    augment = AugmentConfig(crop=1).build()
    assert augment is not None
    for height, width in ((40, 60), (2, 3), (1, 1)):
        inset = min(height, width) * 0.3001
        box = np.array([[inset, inset, width - inset, height - inset]], np.float32)
        for seed in SEEDS:
            sample = Sample("a", np.zeros((height, width, 3), np.uint8), ("x",), box, np.zeros(1, np.int64))
            cropped = augment(sample, seed)
            np.testing.assert_allclose(cropped.boxes[:, 2:] - cropped.boxes[:, :2], box[:, 2:] - box[:, :2], atol=1e-3)


def test_color_jitter_keeps_boxes_phrases_and_hues() -> None:
    augment = AugmentConfig(color=0.3).build()
    assert augment is not None
    sample = make()
    for seed in SEEDS[:20]:
        changed = augment(sample, seed)
        assert not np.array_equal(changed.image, sample.image)
        assert changed.image.dtype == np.uint8
        np.testing.assert_array_equal(changed.boxes, sample.boxes)
        assert changed.phrases == sample.phrases
        red = changed.image[20, 10].astype(int)
        assert red[0] > red[1] + 50, "red stays red"
        assert red[0] > red[2] + 50, "red stays red"


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(flip=0.5),
        AugmentConfig(crop=1),
        AugmentConfig(0.5, 0.3, 0.5),
        AugmentConfig(resize=ResizeConfig(crop_sides=(200, 400))),
    ],
)
def test_result_depends_on_sample_and_seed_only(config: AugmentConfig) -> None:
    one, other = config.build(), config.build()
    assert one is not None
    assert other is not None
    before = make()
    for seed in SEEDS[:10]:
        one(make(), (9, 9, 9))  # earlier calls do not matter
        np.random.seed(1)  # noqa: NPY002 - nor does the global generator
        a, b = one(before, seed), other(make(), seed)
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        assert a.phrases == b.phrases
    np.testing.assert_array_equal(before.image, make().image, "the given sample is not modified")
    images = {one(make(), seed).image.tobytes() for seed in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), *SEEDS]}
    assert len(images) > 1


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(flip=1),
        AugmentConfig(crop=1),
        AugmentConfig(1, 0.3, 1),
        AugmentConfig(resize=ResizeConfig(crop=1)),
    ],
)
def test_image_without_boxes(config: AugmentConfig) -> None:
    augment = config.build()
    assert augment is not None
    sample = replace(make([]), phrases=("left of nothing",))
    changed = augment(sample, (0, 0, 0))
    assert changed.boxes.shape == (0, 4)
    assert changed.phrase_ids.shape == (0,)


def test_boxes_at_the_image_border_are_kept() -> None:
    augment = AugmentConfig(flip=0.5, crop=1).build()
    assert augment is not None
    sample = replace(make([[0, 0, 60, 40]]), boxes=np.array([[0, 0, 60, 40], [59.3, 0, 60, 0.4]], np.float32))
    sample = replace(sample, phrase_ids=np.array([0, 1]))
    for seed in SEEDS:
        changed = augment(sample, seed)
        assert changed.phrase_ids.tolist() == [0, 1]
        assert changed.image.shape == (40, 60, 3)


def crowded() -> Sample:
    """1000 x 600 pixels, a grid of boxes, some of them crowd regions."""
    x, y = (axis.ravel() * 50.0 for axis in np.meshgrid(np.arange(20), np.arange(12)))
    boxes = np.stack([x, y, x + 40.5, y + 30.25], axis=1).astype(np.float32)
    index = np.arange(len(boxes))
    rows, columns = np.indices((600, 1000))
    image = np.stack([columns % 256, rows % 256, columns // 256 * 16 + rows // 256], axis=-1).astype(np.uint8)
    areas = np.full(len(boxes), 9.0, np.float32)
    return Sample("grid", image, ("cell", "odd cell"), boxes, index % 2, crowd=index % 7 == 0, areas=areas)


def corner(sample: Sample) -> tuple[int, int]:
    """Return the position (left, top) in `crowded` of the first pixel of a crop."""
    red, green, blue = sample.image[0, 0].tolist()
    return red + 256 * (blue // 16), green + 256 * (blue % 16)


def test_published_resize_and_crop() -> None:
    augment = AugmentConfig(resize=ResizeConfig()).build()
    assert augment is not None
    before = crowded()
    scales, num_cropped, corners = set(), 0, set()
    for index in range(300):
        sample = augment(before, (0, 0, index))
        scales.add(sample.shortest)
        height, width = sample.image.shape[:2]
        if (height, width) == (600, 1000):
            np.testing.assert_array_equal(sample.boxes, before.boxes)
            continue
        num_cropped += 1
        corners.add(corner(sample))
        # 384 to 600 pixels after resizing the shorter side from 600 to 400, 500 or 600
        assert 384 <= width <= 900
        assert 384 <= height <= 600
        left, top = corner(sample)
        inside = np.clip(before.boxes - [left, top, left, top], 0, [width, height, width, height])
        visible = (inside[:, 2:] > inside[:, :2]).all(axis=1)
        np.testing.assert_allclose(sample.boxes, inside[visible], atol=1e-3)
        np.testing.assert_array_equal(sample.phrase_ids, before.phrase_ids[visible])
        np.testing.assert_array_equal(sample.crowd, before.crowd[visible])
        assert sample.areas is None, "cropping changes areas"
        assert sample.phrases == before.phrases
    assert scales == set(range(480, 801, 32))
    assert 110 < num_cropped < 190
    assert len(corners) > 0.8 * num_cropped


def test_crop_sides_are_drawn_between_the_limits_of_each_side() -> None:
    """RandomCrop(absolute_range) of mmdetection: uniform between min(side, 384) and min(side, 600) of each side.

    So few crops of a 640x480 image keep its full height, although it is below 600 after resizing to 400 or 500 pixels.
    """
    augment = AugmentConfig(resize=ResizeConfig(crop=1)).build()
    assert augment is not None
    sample = replace(make(), image=np.zeros((480, 640, 3), np.uint8))
    crops = [augment(sample, (0, 0, index)).image.shape[:2] for index in range(1000)]
    expected = 1000 * (1 / 17 + 1 / 117 + 1 / 217) / 3  # full heights of 400, 500 and 600 pixels
    assert 0.5 * expected < sum(height == 480 for height, _ in crops) < 2 * expected
    heights = np.array([height for height, _ in crops]) / 480
    np.testing.assert_allclose(heights.mean(), np.mean([392 / 400, 442 / 500, 492 / 600]), atol=0.01)
    widths = np.array([width for _, width in crops]) / 640
    np.testing.assert_allclose(widths.mean(), np.mean([458.5 / 533, 492 / 667, 492 / 800]), atol=0.01)


def test_resize_without_crop_and_crops_of_small_images() -> None:
    augment = AugmentConfig(resize=ResizeConfig(shortest=[64], crop=0)).build()
    assert augment is not None
    sample = augment(make(), (0, 0, 0))
    np.testing.assert_array_equal(sample.image, make().image)
    assert sample.shortest == 64
    always = AugmentConfig(resize=ResizeConfig(crop=1)).build()
    assert always is not None
    for seed in SEEDS:  # the crop has the size it would have after enlarging the image
        cropped = always(make(), seed)
        assert cropped.image.shape[0] >= 25
        assert cropped.image.shape[1] >= 25


def test_crop_may_drop_all_boxes() -> None:
    augment = AugmentConfig(resize=ResizeConfig(crop=1, crop_shortest=[400], crop_sides=(40, 40))).build()
    assert augment is not None
    results = [augment(make([[0, 0, 30, 20]]), seed) for seed in SEEDS]
    assert {len(sample.boxes) for sample in results} == {0, 1}
    assert all(sample.boxes.shape == (len(sample.phrase_ids), 4) for sample in results)
    assert all(sample.image.shape == (4, 4, 3) for sample in results), "40 pixels of 400 are 4 of 40"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"shortest": []}, "at least one length"), ({"crop_sides": (600, 384)}, "minimum, maximum")],
)
def test_invalid_resize_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResizeConfig(**settings)  # type: ignore[arg-type]


def test_flip_keeps_crowd_flags() -> None:
    augment = AugmentConfig(flip=1).build()
    assert augment is not None
    flipped = augment(crowded(), (0, 0, 0))
    np.testing.assert_array_equal(flipped.crowd, crowded().crowd)
    np.testing.assert_array_equal(flipped.phrase_ids, crowded().phrase_ids)

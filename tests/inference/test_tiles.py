"""Tiles: small objects in large images are found, and none is found twice."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import vg
from tests.inference.bright import Bright
from vg.errors import ConfigError
from vg.inference.result import Boxes
from vg.inference.tiles import predict_tiled, windows


@pytest.mark.parametrize(("height", "width"), [(1000, 1000), (2500, 1700), (300, 5000), (1001, 999)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_tiles_cover_the_image_and_overlap(height: int, width: int, overlap: float) -> None:
    whole, *tiles = windows(height, width, 1000, overlap)
    assert whole == (0, 0, width, height)
    covered = np.zeros((height, width), np.uint8)
    for left, top, right, bottom in tiles:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        covered[top:bottom, left:right] = 1
    assert covered.all() or not tiles
    for axis in (0, 1):
        starts = sorted({tile[axis] for tile in tiles})
        assert all(b - a <= 1000 * (1 - overlap) + 1 for a, b in pairwise(starts))


def test_a_small_image_is_not_cut() -> None:
    assert windows(600, 800, 800, 0.2) == [(0, 0, 800, 600)]


def test_tiles_do_not_change_the_boxes_of_a_small_image() -> None:
    """Neither boxes that overlap nor those with low scores are left out."""
    found = Boxes(np.array([[0, 0, 9, 9]] * 3, np.float32), np.array([0.9, 0.8, 0.001], np.float32), np.zeros(3, int))
    assert predict_tiled(lambda images: [found] * len(images), np.zeros((60, 60, 3), np.uint8), 60, 0.2, 4) is found


def test_small_objects_of_a_large_image_are_found_once() -> None:
    """Squares of 10 px in 6,000 px, some on seams, vanish in the resized image; one of 2,500 px spans many tiles."""
    image = np.zeros((4000, 6000, 3), np.uint8)
    true = [(3300, 1300, 5800, 3800)]
    random = np.random.default_rng(0)
    for x, y in [(0, 0), (5990, 3990), *zip(random.integers(30, 3200, 25), random.integers(30, 3900, 25), strict=True)]:
        true.append((int(x), int(y), int(x) + 10, int(y) + 10))
    _, *tiles = windows(4000, 6000, 600, 0.2)
    seam = tiles[0].right
    true += [(seam - 5, 2000, seam + 5, 2010), (seam - 10, 2100, seam, 2110), (seam, 2200, seam + 10, 2210)]
    for left, top, right, bottom in true:
        image[top:bottom, left:right] = 255
    grounder = vg.Grounder(Bright(), device="cpu")
    assert len(grounder(image, "square", 0.3)) == 1, "the resized image shows the large one only"
    for phrases in (["square"], ["square", "bright thing"]):
        found = grounder(image, phrases, 0.3, tile=600)
        for index in range(len(phrases)):
            boxes = found.boxes[found.phrase_ids == index]
            nearest = {int(np.abs(np.array(true) - box).max(axis=1).argmin()) for box in boxes}
            assert len(boxes) == len(nearest) == len(true)
            assert all(np.abs(np.array(true) - box).max(axis=1).min() <= 20 for box in boxes)


def test_tiles_are_batched() -> None:
    model = Bright()
    list(
        vg.Grounder(model, device="cpu").stream([np.zeros((1000, 1000, 3), np.uint8)], "square", tile=400, batch_size=4)
    )
    assert model.num_images == 1 + 9


def test_wrong_arguments() -> None:
    grounder, image = vg.Grounder(Bright(), device="cpu"), np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(ConfigError, match="tile 0: expected at least 1"):
        grounder(image, "square", tile=0)
    with pytest.raises(ConfigError, match=r"overlap 1: expected a fraction of a tile from 0 to 0\.9"):
        grounder(image, "square", tile=9, overlap=1.0)

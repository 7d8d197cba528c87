"""Sizes of resized images with the rounding of the DETR family, computed by hand; targets between processes."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from vg.types import FittedImage, ImageSpec, StretchedImage, Target


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),  # 1066.67 is truncated
        ((640, 480), (1066, 800)),
        ((800, 1066), (800, 1066)),  # resizing again changes nothing
        ((500, 500), (800, 800)),
        ((1200, 800), (1200, 800)),
        ((427, 640), (800, 1199)),  # 1199.06
        ((360, 640), (750, 1333)),  # 800 x 1422 is too long: 1333 * 360 / 640 = 749.8 is rounded
        ((640, 360), (1333, 750)),
        ((100, 1000), (133, 1330)),  # 133.3 is rounded, and ten times it is within the limit
        ((3000, 4000), (800, 1066)),  # large images shrink by the same rule
        ((3, 4), (800, 1066)),
    ],
)
def test_fitted_images_keep_their_aspect_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert FittedImage(800, 1333).resized(*size) == expected


def test_rounding_may_exceed_the_limit() -> None:
    """The shorter side is rounded before the longer one is computed from it, as published models were trained."""
    assert FittedImage(800, 1333).resized(55, 640) == (115, 1338)  # 114.55 is rounded up
    assert FittedImage(800, 1333).resized(640, 59) == (1334, 123)


@pytest.mark.parametrize("length", [1334, 2000, 5000, 9000])
def test_a_line_of_pixels_does_not_exceed_the_limit(length: int) -> None:
    """Its shorter side would be rounded to 0 or 1 pixel, which allows no aspect ratio."""
    assert FittedImage(800, 1333).resized(1, length) == (1, 1333)
    assert FittedImage(800, 1333).resized(2 * length, 2) == (1333, 1)


def test_stretched_images_do_not_keep_their_aspect_ratio() -> None:
    assert StretchedImage(224, 192).resized(480, 640) == (224, 192)


def test_every_image_spec_has_a_configurable_normalization() -> None:
    assert FittedImage(800, 1333).mean == StretchedImage(1, 1).mean == (0.485, 0.456, 0.406)
    assert FittedImage(800, 1333, std=(1.0, 1.0, 1.0)).std == (1.0, 1.0, 1.0)
    with pytest.raises(TypeError, match="abstract"):
        ImageSpec()  # type: ignore[abstract]


def test_a_pickled_target_is_equal_and_holds_no_shared_memory() -> None:
    """Data workers send hundreds of targets at a time, and each tensor in shared memory is an open file."""
    target = Target("a", (4, 6), ("cat",), torch.rand(2, 4), torch.zeros(2, dtype=torch.long), areas=torch.rand(2))
    received = pickle.loads(ForkingPickler.dumps(target))
    assert received.boxes.equal(target.boxes)
    assert received.areas is not None
    assert target.areas is not None
    assert received.areas.equal(target.areas)
    assert (received.id, received.size, received.phrases, received.crowd) == ("a", (4, 6), ("cat",), None)
    assert not received.boxes.is_shared()

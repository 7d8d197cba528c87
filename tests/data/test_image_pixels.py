"""Images of all kinds of pixels: 8-bit RGB as viewers show them, or an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vg.data.images import array_to_rgb, image_to_rgb
from vg.errors import BadSampleError

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(4, 16)
EXPECTED = np.repeat(np.round(RAMP / 257).astype(np.uint8)[..., None], 3, axis=2)


def saved(folder: Path, image: Image.Image, suffix: str) -> Image.Image:
    image.save(folder / f"image{suffix}")
    return Image.open(folder / f"image{suffix}")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    image = saved(tmp_path, Image.fromarray(RAMP), suffix)
    assert image.mode.startswith("I")
    np.testing.assert_array_equal(image_to_rgb(image, "x"), EXPECTED)
    np.testing.assert_array_equal(array_to_rgb(RAMP, "x"), EXPECTED)
    np.testing.assert_array_equal(array_to_rgb(np.repeat(RAMP[..., None], 3, axis=2), "x"), EXPECTED)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint32])
def test_8_bits_in_larger_integers_are_not_scaled(dtype: type[np.generic]) -> None:
    image = np.arange(256).reshape(16, 16)
    np.testing.assert_array_equal(array_to_rgb(image.astype(dtype), "x")[..., 0], image)
    np.testing.assert_array_equal(image_to_rgb(Image.fromarray(image.astype(np.int32)), "x")[..., 0], image)
    assert array_to_rgb(image.astype(np.uint16), "x").max() == 1, "a dark image of 16 bits"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (90, 90, 90, 255))
    rgb = image_to_rgb(image.convert(mode), "x")
    assert rgb[0].tolist() == [[255] * 3, [90] * 3]


def test_half_transparent_and_indexed_transparency(tmp_path: Path) -> None:
    assert image_to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), "x")[0, 0].tolist() == [255, 127, 127]
    indexed = Image.new("P", (2, 1), 0)
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    indexed.putpixel((1, 0), 1)
    indexed.info["transparency"] = 0
    assert image_to_rgb(saved(tmp_path, indexed, ".png"), "x")[0].tolist() == [[255] * 3, [40, 50, 60]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted_as_by_pil(mode: str) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).convert(mode)
    np.testing.assert_array_equal(image_to_rgb(image, "x"), np.asarray(image.convert("RGB")))


def test_arrays_of_all_shapes() -> None:
    gray = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for array in (gray, gray[..., None], gray.astype(np.uint8)[..., None].repeat(3, axis=2)):
        rgb = array_to_rgb(array, "x")
        assert rgb.flags.c_contiguous
        assert rgb.flags.writeable
        np.testing.assert_array_equal(rgb, gray[..., None].repeat(3, axis=2))
    assert array_to_rgb(gray > 2, "x")[1, 0].tolist() == [255] * 3


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 3), np.float32), r"float32 values from 0 to 0, whose range is unknown; convert it to 8 bits"),
        (np.full((2, 2), 70_000, np.int32), r"int32 values from 70000 to 70000"),
        (np.full((2, 2), -1, np.int16), r"values from -1 to -1"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \[0, 4, 3\]; expected"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \[4, 4, 2\]; expected"),
        (np.zeros((3, 4, 4, 3), np.uint8), r"shape \[3, 4, 4, 3\]; expected"),
        (np.zeros(5, np.uint8), r"shape \[5\]; expected"),
    ],
)
def test_what_has_no_defined_colors_is_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(BadSampleError, match=f"image a.png has .*{message}"):
        array_to_rgb(array, "a.png")


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    image = saved(tmp_path, Image.fromarray(np.zeros((2, 2), np.float32)), ".tif")
    with pytest.raises(BadSampleError, match="float32 values"):
        image_to_rgb(image, "a.tif")

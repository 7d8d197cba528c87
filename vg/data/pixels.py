"""Convert any image to 8-bit RGB as image viewers show it, or refuse it: for training, `vg check` and prediction."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vg.errors import BadSampleError


def image_to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """Convert a PIL image of any mode -> [H, W, 3] uint8, RGB.

    16-bit gray is scaled to 8 bits (PIL clips it to white), and transparent pixels are blended with white (PIL shows
    the hidden colors).

    Args:
        name: name of the image in errors.

    Raises:
        BadSampleError: no pixels, or values of unknown range (floating point, 32-bit integers).
    """
    if image.mode[0] in "IF":
        return array_to_rgb(np.asarray(image), name)
    if image.has_transparency_data:
        return array_to_rgb(np.asarray(image.convert("RGBA")), name)
    return np.array(image.convert("RGB")) if all(image.size) else array_to_rgb(np.zeros((0, 0, 3), np.uint8), name)


def array_to_rgb(array: np.ndarray, name: str) -> np.ndarray:
    """Convert an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (RGBA) of 8 or 16 bits -> [H, W, 3] uint8, RGB.

    Raises:
        BadSampleError: another shape, no pixels, or values of unknown range.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise BadSampleError(
            f"image {name} has the shape {list(array.shape)}; expected [H, W], [H, W, 3] or [H, W, 4], H, W > 0"
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 65535:
            raise BadSampleError(
                f"image {name} has {array.dtype} values from {array.min():g} to {array.max():g}, whose range is "
                "unknown; convert it to 8 bits (0 to 255)"
            )
        array = np.round(array / 257).astype(np.uint8)  # 65535 -> 255
    if array.shape[2] == 4:
        alpha = array[..., 3:] / np.float32(255)
        array = np.round(array[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)))

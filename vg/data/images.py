"""Image files: where a COCO picture may lie, and how its pixels are read."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from vg.data.source import BadSampleError

_FOLDERS = ("", "train2014", "train2017", "images")  # below the image root; train2017 holds the pictures of train2014


def find_image(name: str, root: Path) -> Path:
    """The file of a picture below `root`, under the name the annotation gives it or under its other COCO name.

    COCO 2014 calls a picture `train2014/COCO_train2014_000000000716.jpg`, COCO 2017 `train2017/000000000716.jpg`.

    Raises:
        BadSampleError: there is no such file; the message lists what was tried.
    """
    names = [Path(name).name]
    if number := re.search(r"\d{12}", names[0]):
        names += [f"COCO_train2014_{number[0]}.jpg", f"{number[0]}.jpg"]
    candidates = [root / name, *(root / folder / each for folder in _FOLDERS for each in names)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    tried = ", ".join(dict.fromkeys([name, *(str(candidate.relative_to(root)) for candidate in candidates[1:])]))
    raise BadSampleError(
        f"image {name} not found below {root} (tried {tried}); put the file there or set image_root to the "
        "folder that holds the pictures"
    )


def read_image(source: Path | bytes | Image.Image, name: str) -> np.ndarray:
    """Decode a picture -> [H, W, 3] uint8, RGB, exactly as stored.

    An EXIF orientation is ignored: COCO boxes refer to the pixels as stored.

    Args:
        source: a file, the bytes of one, or a picture already opened.
        name: what the error calls it.

    Raises:
        BadSampleError: not an image, or a damaged one.
    """
    try:
        if isinstance(source, Image.Image):
            return np.array(source.convert("RGB"))
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ... alike
        raise BadSampleError(f"image {name} cannot be read ({error}); replace the file by an intact copy") from error

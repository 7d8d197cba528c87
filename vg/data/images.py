"""Image files: where a COCO picture may lie, and how its pixels are read."""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vg.errors import BadSampleError

_FOLDERS = ("", "train2014", "train2017", "val2014", "val2017", "images")  # those of 2017 hold the pictures of 2014
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_COCO = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})(?:_\d+)?")  # RefCOCO adds the number of an annotation


def find_image(name: str, root: Path) -> Path:
    """The file of a picture below `root`, under the name the annotation gives it or under its other COCO name.

    COCO 2014 calls a picture `train2014/COCO_train2014_000000000716.jpg`, COCO 2017 `train2017/000000000716.jpg`.

    Raises:
        BadSampleError: there is no such file; the message lists what was tried.
    """
    names = [Path(name).name]
    if number := re.search(r"\d{12}", names[0]):
        names += [f"COCO_train2014_{number[0]}.jpg", f"COCO_val2014_{number[0]}.jpg", f"{number[0]}.jpg"]
    candidates = [root / name, *(root / folder / each for folder in _FOLDERS for each in names)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    tried = ", ".join(dict.fromkeys([name, *(str(candidate.relative_to(root)) for candidate in candidates[1:])]))
    raise BadSampleError(
        f"image {name} not found below {root} (tried {tried}); put the file there or set image_root to the "
        "folder that holds the pictures"
    )


def list_images(folder: Path) -> list[str]:
    """The pictures in a folder and in those below it, relative to it, sorted."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
    return sorted(str(file.relative_to(folder)) for file in files)


def image_key(name: str, root: Path | None = None) -> str:
    """The same for every file of one picture: COCO's number, whatever the year of its name, else the path.

    Args:
        root: the folder that `name` is below, for pictures that have no such number.
    """
    if number := _COCO.fullmatch(Path(name).stem):
        return f"coco/{int(number[1])}"
    try:
        return str(find_image(name, root).resolve()) if root else name
    except BadSampleError:
        return name


def image_size(source: Path | bytes | Image.Image, name: str, upright: bool = False) -> tuple[int, int]:
    """(height, width) in pixels of what `read_image` would give, from the head of the file; raises as that does."""
    try:
        if isinstance(source, Image.Image):
            return source.height, source.width
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            turned = upright and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # as there
        raise BadSampleError(f"image {name} cannot be read ({error}); replace the file by an intact copy") from error


def read_image(source: Path | bytes | Image.Image, name: str, upright: bool = False) -> np.ndarray:
    """Decode a picture -> [H, W, 3] uint8, RGB.

    Args:
        upright: turn it as its EXIF orientation says. COCO boxes refer to the pixels as stored.
        source: a file, the bytes of one, or a picture already opened.
        name: what the error calls it.

    Raises:
        BadSampleError: not an image, or a damaged one.
    """
    try:
        if isinstance(source, Image.Image):
            return np.array(source.convert("RGB"))
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return np.array((ImageOps.exif_transpose(image) if upright else image).convert("RGB"))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, ... alike
        raise BadSampleError(f"image {name} cannot be read ({error}); replace the file by an intact copy") from error

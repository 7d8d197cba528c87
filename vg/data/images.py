"""Image files: finding an image under its COCO names, decoding it, and making the pixels of a batch."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vg.errors import BadSampleError, ConfigError
from vg.types import ImageSpec


def max_pixels(default: int) -> int:
    """Return the environment variable VG_MAX_PIXELS, such as 25000000 or 25e6; raises ConfigError."""
    text = os.environ.get("VG_MAX_PIXELS") or str(default)
    try:
        if (limit := int(float(text))) < 1:
            raise ValueError
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"VG_MAX_PIXELS={text}: expected a number of pixels, such as 25e6") from error
    return limit


MAX_PIXELS = max_pixels(100_000_000)  # larger images are refused: a bomb, or a mistake
Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, MAX_PIXELS)  # of PIL, which must not be lower
FOLDERS = ("", "train2014", "train2017", "val2014", "val2017", "images")  # 2017 has the images of 2014
SWAPPED = 5  # EXIF orientations from this on swap height and width
UNKNOWN_SIZE = 1, 1  # (height, width) of an image that cannot be read; loading its sample raises or skips it
_PREFIX = "COCO_"
# RefCOCO appends the id of an annotation. Without the prefix, ids below a million: 202401311230 is a time.
_COCO = re.compile(rf"{_PREFIX}(?:train|val|test)\d{{4}}_(\d{{12}})(?:_\d+)?|(0{{6}}\d{{6}})")
# Folders of ids without the prefix: images/train2017, ../data/coco/val2017. Those of cameras may have equal numbers.
_COCO_FOLDERS = re.compile(
    r"((.*/)?[^/]*coco[^/]*/)?((\.\.|images|(train|val|test|unlabeled)(2014|2015|2017))/)*", re.IGNORECASE
)
_ADVICE = (
    "set image_root to the folder that contains the images (data.train.image_root=FOLDER data.eval.image_root=FOLDER; "
    "vg finetune: --images FOLDER; vg check of one dataset: image_root=FOLDER)"
)
# Within `decoded_once`: image and pixels by image (its id, if it is opened, which is not reused while it is kept).
_decoded: ContextVar[dict[Any, tuple[Any, np.ndarray]] | None] = ContextVar("_decoded", default=None)


def find_image(name: str, root: Path, advice: str = _ADVICE) -> Path:
    """Return the file of an image below `root`, under its annotated name or its other COCO name.

    An image is `train2014/COCO_train2014_000000000716.jpg` in COCO 2014, `train2017/000000000716.jpg` in COCO 2017.

    Args:
        advice: how to correct this; by default for a dataset with the setting image_root.

    Raises:
        BadSampleError: the name leads out of `root`, there is no such file, or several; the message lists what was
            tried.
    """
    path = slashed(name, root)
    if is_outside(path, root):
        fix = "set image_root to a folder that contains all images"
        if os.path.isabs(path) and not os.path.exists(path):  # as in annotations of another machine
            fix = "there is no such file; make the paths in the annotations relative to the folder of the images"
        raise BadSampleError(f"image {name} is outside {root}; {fix}")
    try:
        files = locate(path, root)
    except OSError as error:  # the name is too long, or a folder cannot be read
        raise BadSampleError(f"image {name[:80]} cannot be opened ({error.strerror}); correct its name") from error
    if len(files) == 1:
        return files[0]
    if files:
        listed = " or ".join(str(file.relative_to(root)) for file in files)
        raise BadSampleError(f"image {name} may be {listed} below {root}, which are different images; {advice}")
    tried = ", ".join(dict.fromkeys([name, *(str(file.relative_to(root)) for file in [*_candidates(path, root)][1:])]))
    raise BadSampleError(f"image {name} not found below {root} (tried {tried}); put the file there, or {advice}")


def locate(name: str, root: Path, folders: Sequence[str] = FOLDERS) -> list[Path]:
    """Return the file of an image below `root`: none, one, or two of its name that are different images.

    Args:
        folders: those of FOLDERS that are below `root`, if that is known.

    Raises:
        OSError: the name is too long, or a folder cannot be read.
    """
    candidates = _candidates(name, root, folders)
    file = next((file for file in candidates if file.is_file()), None)
    if file is None or file == root / name or file.name.startswith(_PREFIX):
        return [file] if file else []
    same_name = (other for other in candidates if other.name == file.name and other.is_file())
    return [file, *islice((other for other in same_name if not filecmp.cmp(file, other, shallow=False)), 1)]


def slashed(name: str, root: Path) -> str:
    """Return the name of an image with slashes in place of the backslashes of Windows, unless they are in its name."""
    return name if "\\" not in name or os.path.exists(root / name) else name.replace("\\", "/")


def is_outside(name: str, root: Path) -> bool:
    if not os.path.isabs(name) and ".." not in name:
        return False
    return not Path(os.path.abspath(root / name)).is_relative_to(os.path.abspath(root))  # links may lead elsewhere


def _candidates(name: str, root: Path, folders: Sequence[str] = FOLDERS) -> Iterator[Path]:
    """Yield where the file of an image may be."""
    yield root / name
    path = _below(name, root)
    names = [path.name]
    if coco_id := coco_id_of(name, root):
        names += [f"{_PREFIX}train2014_{coco_id}.jpg", f"{_PREFIX}val2014_{coco_id}.jpg", f"{coco_id}.jpg"]
    elif not set(path.parts[:-1]) <= set(FOLDERS):
        return  # a.jpg of another folder is another image than camera_1/a.jpg
    elif split := set(path.parts[:-1]) - {"images"}:  # val2017/a.jpg may be another image than train2017/a.jpg
        folders = [folder for folder in folders if folder in ("", "images", *split)]
    yield from (root / folder / file for folder in folders for file in dict.fromkeys(names))


def _below(name: str, root: Path | None) -> Path:
    """Return the path of an image relative to `root`."""
    return Path(os.path.relpath(name, root) if root and os.path.isabs(name) else os.path.normpath(name))


def coco_id_of(name: str, root: Path | None = None) -> str | None:
    """Return the 12 digits of the id in the name of a COCO image."""
    if not (found := _COCO.fullmatch(Path(name).stem)):
        return None
    folders = "".join(f"{part}/" for part in _below(name, root).parts[:-1])
    return found[1] or (found[2] if _COCO_FOLDERS.fullmatch(folders) else None)


@contextmanager
def _opened(source: Path | bytes | Image.Image, name: str) -> Iterator[Image.Image]:
    if isinstance(source, Path) and not source.is_file():  # a named pipe would block
        raise BadSampleError(f"image {name} does not exist, or is not a file")
    try:
        if isinstance(source, Image.Image):
            yield source
        else:
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadSampleError(
                        f"image {name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}; resize it, "
                        "or set the environment variable VG_MAX_PIXELS"
                    )
                yield image
    except BadSampleError:
        raise
    except Image.DecompressionBombError as error:
        raise BadSampleError(
            f"image {name} has more than {MAX_PIXELS:,} pixels; resize it, or set the environment variable "
            "VG_MAX_PIXELS"
        ) from error
    except UnidentifiedImageError as error:  # its message has the path of a temporary file, or the address of the bytes
        raise BadSampleError(f"image {name} cannot be read (unknown format); replace the file by an image") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise BadSampleError(f"image {name} cannot be read ({error}); replace the file by an intact copy") from error


def image_size(source: Path | bytes | Image.Image, name: str, upright: bool | None = False) -> tuple[int, int]:
    """Return (height, width) of what `read_image` returns, from the file header; same arguments and errors."""
    with _opened(source, name) as image:
        return image.size if upright and _orientation(image) >= SWAPPED else image.size[::-1]


def find_size(name: str, root: Path, upright: bool | None = False) -> tuple[int, int]:
    """Return (height, width) of an image below `root`; UNKNOWN_SIZE if it cannot be read."""
    try:
        return image_size(find_image(name, root), name, upright)
    except BadSampleError:
        return UNKNOWN_SIZE


def orientation(source: Path | bytes, name: str) -> int:
    """Return the EXIF orientation: 1 is upright, 2 to 4 flip, 5 to 8 swap height and width; raises as read_image."""
    with _opened(source, name) as image:
        return _orientation(image)


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def read_image(
    source: Path | bytes | Image.Image, name: str, upright: bool | None = False, size: Sequence[int] = (0, 0)
) -> np.ndarray:
    """Decode an image -> [H, W, 3] uint8, RGB.

    Args:
        source: a file, its bytes, or an opened image.
        name: the image in error messages.
        upright: apply the EXIF orientation; None: where the upright image has the annotated size, the stored one not.
        size: annotated (height, width) in pixels; 0 if unknown.

    Raises:
        BadSampleError: not an image, a damaged one, one with more than MAX_PIXELS, or see `image_to_rgb`.
    """
    if (known := _decoded.get()) is None:
        return _decode(source, name, upright, size)
    key = (id(source) if isinstance(source, Image.Image) else source), upright, tuple(size)
    if key not in known:
        known[key] = source, _decode(source, name, upright, size)
    return known[key][1]


def _decode(source: Path | bytes | Image.Image, name: str, upright: bool | None, size: Sequence[int]) -> np.ndarray:
    with _opened(source, name) as image:
        if upright is None:  # PIL has (width, height)
            upright = tuple(size) == image.size != image.size[::-1] and _orientation(image) >= SWAPPED
        return image_to_rgb(ImageOps.exif_transpose(image) if upright else image, name)


@contextmanager
def decoded_once() -> Iterator[None]:
    """Let `read_image` return the same array for the same image, which nobody may change then."""
    token = _decoded.set({})
    try:
        yield
    finally:
        _decoded.reset(token)


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

    Integers of another size than 8 and 16 bits are of 8 bits if none exceeds 255.

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
        if array.dtype == np.uint16 or array.max() > 255:
            array = np.round(array / 257)  # 16 bits: 65535 -> 255
        array = array.astype(np.uint8)
    if array.shape[2] == 4:
        alpha = array[..., 3:] / np.float32(255)
        array = np.round(array[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)))


def normalized(images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], spec: ImageSpec) -> np.ndarray:
    """Resize images [H, W, 3] uint8 to (height, width) each and normalize them -> [B, 3, H, W] float32.

    Images smaller than the largest height and width are padded with zeros on the right and below.
    """
    mean, std = normalization(spec)
    batch = padded(images, sizes, np.float32)
    for pixels, (height, width) in zip(batch, sizes, strict=True):
        pixels = pixels[:, :height, :width]
        pixels -= mean
        pixels /= std
    return batch


def normalization(spec: ImageSpec) -> np.ndarray:
    """Return mean and standard deviation of pixels in 0..255: [2, 3, 1, 1] float32."""
    return np.array((spec.mean, spec.std), np.float32).reshape(2, 3, 1, 1) * 255


def padded(
    images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]], dtype: type[np.generic] = np.uint8
) -> np.ndarray:
    """Resize images [H, W, 3] uint8 to (height, width) each and pad them with zeros -> [B, 3, H, W]."""
    height, width = np.max(sizes, axis=0).tolist()
    batch = np.zeros((len(images), 3, height, width), dtype)
    for pixels, image, size in zip(batch, images, sizes, strict=True):
        pixels[:, : size[0], : size[1]] = _resized(image, size).transpose(2, 0, 1)
    return batch


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize [H, W, 3] uint8 to (height, width) with PIL, because other libraries compute other pixels."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))

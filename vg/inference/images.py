"""The images to predict on: files, folders, globs, videos, URLs, bytes and pixels, read one at a time."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from vg.data.detection.annotations import to_size
from vg.data.image_files import image_root, list_images
from vg.data.images import array_to_rgb, find_image, read_image
from vg.errors import BadSampleError, DataError
from vg.hub import loading
from vg.inference.arguments import check_count
from vg.inference.download import download, is_url

# [H, W, 3] or [H, W, 4] (RGBA) or [H, W] array of 8 or 16 bits, PIL image, content of a file, its path or http(s) URL,
# or an open file, such as a BytesIO
ImageLike: TypeAlias = np.ndarray | Image.Image | bytes | bytearray | memoryview | str | Path | IO[bytes]
HUB = "hf://datasets/"
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


class NamedImage(NamedTuple):
    """An image that is not read yet."""

    name: str
    read: Callable[[], np.ndarray]  # -> [H, W, 3] uint8, RGB; raises BadSampleError


def to_array(image: ImageLike, name: str = "given") -> np.ndarray:
    """Read an image, rotated by its EXIF orientation -> [H, W, 3] uint8, RGB.

    A file that does not exist is also looked for under its other COCO name, see `vg.data.images.find_image`.

    Args:
        name: the image in errors, for pixels and bytes.

    Raises:
        DataError: see `vg.inference.download`, `vg.data.images.array_to_rgb` and `vg.data.images.read_image`.
    """
    if isinstance(image, np.ndarray):
        return array_to_rgb(image, f"{name} as an array")
    if isinstance(image, Image.Image):
        return read_image(image, name, upright=True)
    if not isinstance(image, (str, Path)):
        return read_image(_content(image, name), name, upright=True)
    if is_url(str(image)):
        return read_image(download(str(image)), str(image), upright=True)
    path = Path(image)
    if not path.exists():
        try:
            path = find_image(path.name, path.parent)
        except BadSampleError as error:
            raise BadSampleError(f"image {image} does not exist") from error
    return read_image(path, str(image), upright=True)


def _content(image: bytes | bytearray | memoryview | IO[bytes], name: str) -> bytes:
    """Return the bytes of an image file; an open file is read from its beginning."""
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    with suppress(AttributeError, OSError):  # a stream has no beginning to return to
        image.seek(0)
    content: object = ""
    with suppress(UnicodeDecodeError):  # of a file opened as text
        content = image.read()
    if not isinstance(content, bytes):
        raise DataError(f"image {name} is a file opened as text; open it with mode 'rb'")
    return content


def _is_content(image: Any) -> bool:
    """Whether an argument has the pixels or the bytes of an image."""
    is_file = hasattr(image, "read") and not isinstance(image, NamedImage)
    return is_file or isinstance(image, (np.ndarray, Image.Image, bytes, bytearray, memoryview))


def is_single(images: Any) -> bool:
    """Whether an argument is one image, not several: neither a collection nor a folder, pattern or video."""
    if isinstance(images, (str, Path)):
        several = _is_video(images) or str(images).endswith(".json") or str(images).startswith(HUB)
        return is_url(str(images)) or not (several or Path(images).is_dir() or _is_pattern(str(images)))
    return _is_content(images)


def check_single(image: Any) -> Any:
    """Return an image; raises DataError for the path of a folder, pattern or video, which are several."""
    if isinstance(image, (str, Path)) and not is_single(image):
        raise DataError(
            f"{image} stands for several images, or does not exist, where one is expected; a call of the Grounder "
            "takes several"
        )
    return image


def named_images(
    images: ImageLike | Iterable[ImageLike | NamedImage], every: int = 1
) -> tuple[Iterator[NamedImage], int | None]:
    """Return the images of an argument, and how many there are if that is known without reading them.

    Args:
        images: an image, or any number of them. A folder stands for the images in it and its subfolders, a pattern with
            `*` for the files that match, a video for its frames, a COCO json file for its images (in its folder), and
            hf://datasets/ORG/NAME:SPLIT for the images of a dataset on the Hub.
        every: of a video, take each `every`-th frame.

    Raises:
        BadSampleError: no images in a folder, or none that match a pattern; an unreadable video or json file.
        ConfigError: `every` is less than 1.
        DataError: a dataset that cannot be loaded, or without images; an item of another type.
    """
    check_count(every, "every")
    given: Any = [images] if _is_content(images) else images
    if isinstance(given, (str, Path)):
        return _of_path(str(given), every)
    if not isinstance(given, Iterable) or isinstance(given, Mapping) or getattr(given, "ndim", 1) != 1:
        raise DataError(_wrong_type("images", given))
    if isinstance(given, (list, tuple)):
        parts = [
            _of_path(str(image), every) if isinstance(image, (str, Path)) else (iter([_pixels(image, number)]), 1)
            for number, image in enumerate(given)
        ]
        counts = [count for _, count in parts]
        total = None if None in counts else sum(filter(None, counts))
        return (image for part, _ in parts for image in part), total
    return _of_stream(given, every), None


def _of_stream(images: Iterable[ImageLike | NamedImage], every: int) -> Iterator[NamedImage]:
    for number, image in enumerate(images):
        if isinstance(image, NamedImage):
            yield image
        elif isinstance(image, (str, Path)):
            yield from _of_path(str(image), every)[0]
        else:
            yield _pixels(image, number)


def _of_path(path: str, every: int) -> tuple[Iterator[NamedImage], int | None]:
    if not path:  # pathlib takes it for the current folder
        raise DataError("the path of an image is empty; give that of a file, or . for the current folder")
    if is_url(path):
        return iter([NamedImage(path, partial(to_array, path))]), 1
    if path.startswith(HUB):
        return _of_dataset(path.removeprefix(HUB))
    if _is_video(path) and Path(path).is_file():
        return _frames(path, every)
    if path.endswith(".json"):
        return _of_coco(Path(path))
    if Path(path).is_dir():
        files = [str(Path(path, name)) for name in list_images(Path(path))]
        if not files:
            raise BadSampleError(f"{path} contains no images")
    elif _is_pattern(path):
        if not (files := sorted(glob.glob(path, recursive=True))):
            raise BadSampleError(f"no file matches {path}")
    else:
        files = [path]
    return (NamedImage(file, partial(to_array, file)) for file in files), len(files)


def _pixels(image: Any, number: int) -> NamedImage:
    if not _is_content(image):  # such as a tensor, or its rows
        raise DataError(_wrong_type(f"image {number}", image))
    return NamedImage(f"image {number}", partial(to_array, image, str(number)))


def _wrong_type(name: str, value: Any) -> str:
    return (
        f"{name} is of type {type(value).__name__}; expected a path, a URL, a PIL image, the bytes of a file, an open "
        "file, or a NumPy array [H, W, 3] uint8"
    )


def _frames(path: str, every: int) -> tuple[Iterator[NamedImage], int | None]:
    """The frames of a video, which OpenCV decodes; their number is an estimate of the file."""
    import cv2

    video = cv2.VideoCapture(path)
    if not video.isOpened():
        raise BadSampleError(f"video {path} cannot be read; convert it to another format, such as mp4 with H.264")
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))

    def frames() -> Iterator[NamedImage]:
        number = 0
        while video.grab():
            if number % every == 0:
                _, pixels = video.retrieve()
                rgb = np.ascontiguousarray(pixels[..., ::-1])
                yield NamedImage(f"{path}#{number}", lambda rgb=rgb: rgb)  # type: ignore[misc]
            number += 1
        video.release()

    return frames(), -(-count // every) if count > 0 else None


def _of_coco(file: Path) -> tuple[Iterator[NamedImage], int]:
    """The images of a COCO json file, below the folder where training finds them.

    Their names begin with that folder, because another file may have other images of the same names.
    """
    try:
        images = json.loads(file.read_bytes())["images"]
        rows = [(str(row["file_name"]), to_size(row.get("height"), row.get("width"))) for row in images]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadSampleError(f"{file} is not a COCO file with images that have a file_name: {error!r}") from error
    root = image_root(file, [name for name, _ in rows])
    root = root if file.is_absolute() else Path(os.path.relpath(root))
    return (NamedImage(str(root / name), partial(_read_below, name, root, size)) for name, size in rows), len(rows)


def _read_below(name: str, root: Path, size: tuple[int, int]) -> np.ndarray:
    advice = "give the folder of the images in place of the file"
    return read_image(find_image(name, root, advice), name, upright=None, size=size)


def _of_dataset(name: str) -> tuple[Iterator[NamedImage], int | None]:
    """The first column of images of a dataset on the Hub, read while it is downloaded."""
    import datasets

    id, _, split = name.partition(":")
    with loading(id, "the dataset", DataError, "dataset"):
        rows = datasets.load_dataset(id, split=split or "train", streaming=True)
    column = next((key for key, value in (rows.features or {}).items() if isinstance(value, datasets.Image)), None)
    if column is None:
        raise DataError(f"{HUB}{name} has no column of images; its columns are {', '.join(rows.features or ())}")
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def images() -> Iterator[NamedImage]:
        for number, row in enumerate(rows):
            image = f"{HUB}{name}#{number}"
            yield NamedImage(image, partial(_read_cell, row[column], image))

    return images(), rows.info.splits[split or "train"].num_examples if rows.info.splits else None


def _read_cell(cell: dict[str, Any] | None, name: str) -> np.ndarray:
    if not (content := cell and (cell["bytes"] or cell["path"])):
        raise BadSampleError(f"image {name} is missing: its row has no image; remove the row from the dataset")
    return to_array(content, name)


def _is_video(path: str | Path) -> bool:
    return str(path).lower().endswith(VIDEOS)


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not Path(path).exists()

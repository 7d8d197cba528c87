"""Checks of image files: that they exist, can be decoded, and have the annotated size and orientation."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from vg.data.check.dataset import CheckedDataset, ImageFile
from vg.data.images import SWAPPED, find_image, orientation, read_image
from vg.errors import BadSampleError

_THREADS = 8
_RATIO = 0.02  # tolerance between the scales of width and height for an image to count as resized as a whole


def check_images(dataset: CheckedDataset, indices: Sequence[int]) -> None:
    """Open the images of these indices, fill `dataset.image_files` and report issues."""
    files, root = dataset.annotations.files, dataset.annotations.image_root
    with ThreadPoolExecutor(_THREADS) as threads:
        opened = threads.map(lambda index: _open(files[index], root), indices)
        bar = tqdm(opened, desc=f"{dataset.name}: images", total=len(indices), unit=" images", mininterval=1)
        dataset.image_files = dict(zip(indices, bar, strict=True))
    for index, file in dataset.image_files.items():
        if file.error:
            what, fix = "images that cannot be read", "replace them with intact copies"
            if not file.digest:
                what, fix = "missing images", "put them there, or set image_root as each message advises"
            dataset.issues.add("error", what, fix, [f"{files[index]}: {file.error}"])
        else:
            _check_size(dataset, index, file)


def _open(name: str, root: Path) -> ImageFile:
    """Read and decode an image; never raises."""
    try:
        data = find_image(name, root).read_bytes()
    except (OSError, ValueError) as error:  # not found, or a null byte in the name
        return ImageFile(error=str(error))
    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            height, width, _ = read_image(data, name).shape
            return ImageFile((height, width), orientation(data, name), digest)
    except BadSampleError as error:
        return ImageFile(digest=digest, error=str(error))


def _check_size(dataset: CheckedDataset, index: int, file: ImageFile) -> None:
    """Compare the size of an image with the annotated one, (height, width) in pixels."""
    annotations = dataset.annotations
    size = tuple(annotations.sizes[index].tolist())
    is_upright = annotations.upright or (annotations.upright is None and size == file.upright_size != file.size)
    height, width = file.upright_size if is_upright else file.size
    example = f"{annotations.locations[index]} ({annotations.files[index]}): {width} x {height}"
    if size == (height, width) or not all(size):
        if file.orientation > 1 and not is_upright:
            what = "images that viewers turn or mirror by their EXIF orientation, but training does not"
            fix = "look at them in images.png: where boxes are wrong, set upright=true, which applies the orientation"
            dataset.issues.add("warning", what, fix, [example], [index])
        elif file.orientation > 1 and not all(size):  # an annotated size would show which
            what = "images that are read as viewers show them, turned or mirrored by their EXIF orientation"
            fix = "look at them in images.png: where boxes are wrong, remove the orientation from the file"
            dataset.issues.add("note", what, fix, [example], [index])
        return
    if size == (width, height) and file.orientation >= SWAPPED:
        what = f"images that are {'upright' if is_upright else 'not upright'}, unlike their annotations"
        fix = f"leave out upright={str(annotations.upright).lower()}, or annotate all images in the same way"
    elif abs((height / size[0]) / (width / size[1]) - 1) < _RATIO:
        what = "images resized after they were annotated"
        fix = "use the images that were annotated, or scale boxes, width and height too"
    else:
        what = "images of another size than annotated"
        fix = "use the images that were annotated, or correct width and height"
    dataset.issues.add("error", what, fix, [f"{example}, annotation {size[1]} x {size[0]}"], [index])

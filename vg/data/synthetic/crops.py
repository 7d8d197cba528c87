"""Objects and empty regions of images with COCO annotations, to be cut out and pasted."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vg.data.detection.annotations import Annotations
from vg.data.detection.source import read_annotated_image
from vg.data.image_files import image_files
from vg.data.synthetic.layout import Box
from vg.errors import DataError

MIN_AREA = 32**2  # square pixels of a mask; COCO calls smaller objects small
MIN_MARGIN = 2  # pixels between an object and the border of its image, which may cut it off
MAX_ASPECT = 3  # of the longer side to the shorter one
MAX_SHARED = 0.05  # fraction of a mask that other objects may have, too, such as the food on a table
MIN_REGION = 96  # side in pixels of an empty region
MAX_CROPS, MAX_REGIONS = 2000, 200  # of one epoch, so that they fit in memory
_CELL = 8  # pixels; empty regions are found on a grid of such cells


@cache
def masks() -> Any:
    """Return pycocotools.mask; imported late, for machines that lack the packages for data."""
    from pycocotools import mask

    return mask


class File(NamedTuple):
    """An annotated image."""

    root: Path
    name: str
    size: tuple[int, int]  # (height, width) in pixels

    def read(self, box: Box) -> Image.Image:
        """Decode the image and cut out a box; raises BadSampleError as `read_annotated_image`."""
        return Image.fromarray(read_annotated_image(self.name, self.root, self.size)).crop(box)


class Crop(NamedTuple):
    """An object that can be cut out."""

    id: str  # "annotation 25"
    category: str
    file: File
    box: Box  # of the mask
    counts: bytes  # run-length encoding of the mask in the image

    @property
    def mask(self) -> dict[str, Any]:
        return {"size": self.file.size, "counts": self.counts}

    @property
    def fill(self) -> float:
        """Return the fraction of the box that the mask covers."""
        left, top, right, bottom = self.box
        return float(masks().area(self.mask)) / ((right - left) * (bottom - top))


class Region(NamedTuple):
    """A square that no annotated box touches."""

    file: File
    box: Box


def find(annotations: Annotations, where: str) -> tuple[list[Crop], list[Region]]:
    """Return the objects that are visible as a whole, as far as annotations show that, and an empty region per image.

    Left out are crowd regions; objects without segmentation, smaller than MIN_AREA, elongated, or at the image border;
    those in several pieces, because something is in front of them; and those whose mask includes other objects.

    Raises:
        DataError: there is no object or no region, or an entry or an image file cannot be used; the message starts
            with `where`.
    """
    order = np.argsort(annotations.image_indices, kind="stable")
    starts = np.searchsorted(annotations.image_indices[order], np.arange(len(annotations.files) + 1))
    crops, regions, left_out = [], [], Counter[str]()
    for image, name in enumerate(annotations.files):
        height, width = annotations.sizes[image].tolist()
        if height < 1 or width < 1:
            raise DataError(f"{where}: {annotations.locations[image]} has no height and width in pixels; add them")
        file = File(annotations.image_root, name, (height, width))
        own = order[starts[image] : starts[image + 1]]
        if box := _largest_empty_square(annotations.xyxy[own], height, width):
            regions.append(Region(file, box))
        for reason, found in _crops(annotations, own.tolist(), file, where):
            left_out[reason] += not found
            crops += [found] if found else []
    if not crops:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common()) or "it has no annotations"
        raise DataError(f"{where}: no object can be cut out ({reasons}); use more, or larger images")
    if not regions:
        raise DataError(
            f"{where}: no image has a region of {MIN_REGION} x {MIN_REGION} pixels without objects, which are the "
            "backgrounds; add images without annotations"
        )
    files = {crop.file.name for crop in crops} | {region.file.name for region in regions}
    _check_files(files, annotations.image_root, where)
    return crops, regions


def _crops(annotations: Annotations, own: list[int], file: File, where: str) -> Iterator[tuple[str, Crop | None]]:
    """Yield an object of one image, or None and the reason, for each of the indices `own`."""
    reasons = {index: _reason(annotations, index, file.size) for index in own}
    if all(reasons.values()):
        yield from ((reason, None) for reason in reasons.values())
        return
    encoded = {
        index: _encode(annotations, index, file.size, where)
        for index in own
        if annotations.segmentations[index] and not annotations.crowd[index]
    }
    for index, reason in reasons.items():
        if reason:
            yield reason, None
            continue
        rest = [mask for other, mask in encoded.items() if other != index]
        # Of pycocotools: the intersection divided by the first area, if the second one is a crowd.
        if rest and masks().iou([encoded[index]], rest, [1] * len(rest)).max() > MAX_SHARED:
            yield "with other objects in their mask", None
        elif _num_pieces(encoded[index], annotations.segmentations[index]) != 1:
            yield "in several pieces", None
        elif reason := _reason_of_mask(encoded[index]):
            yield reason, None
        else:
            left, top, width, height = map(int, masks().toBbox(encoded[index]))
            category = annotations.names[annotations.labels[index]]
            box = (left, top, left + width, top + height)
            yield "", Crop(annotations.locate(index), category, file, box, encoded[index]["counts"])


def _reason(annotations: Annotations, index: int, size: tuple[int, int]) -> str:
    """Return why an object cannot be cut out, as far as its box shows."""
    left, top, right, bottom = annotations.xyxy[index].tolist()
    if annotations.crowd[index]:
        return "crowd regions"
    if not annotations.segmentations[index]:
        return "without segmentation"
    area = (right - left) * (bottom - top)
    if annotations.areas is not None:
        area = min(area, annotations.areas[index])
    if reason := _reason_of_size(right - left, bottom - top, area):
        return reason
    at_border = min(left, top, size[1] - right, size[0] - bottom) < MIN_MARGIN
    return "at the image border" if at_border else ""


def _reason_of_size(width: float, height: float, area: float) -> str:
    if area < MIN_AREA:
        return f"smaller than {MIN_AREA} pixels"
    return "elongated" if max(width, height) > MAX_ASPECT * min(width, height) else ""


def _reason_of_mask(mask: dict[str, Any]) -> str:
    """Return why an object cannot be cut out, whatever its annotated box is: the mask may be smaller, or empty."""
    width, height = masks().toBbox(mask)[2:].tolist()
    return _reason_of_size(width, height, float(masks().area(mask)))


def _encode(annotations: Annotations, index: int, size: tuple[int, int], where: str) -> dict[str, Any]:
    """Return the run-length encoding of a segmentation in an image of (height, width)."""
    segmentation = annotations.segmentations[index]
    try:
        if isinstance(segmentation, list):
            return masks().merge(masks().frPyObjects(segmentation, *size))
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"its size is {segmentation['size']}, that of the image is {list(size)}")
        if isinstance(segmentation["counts"], list):
            encoding: dict[str, Any] = masks().frPyObjects(segmentation, *size)
        else:
            encoding = {"size": size, "counts": segmentation["counts"].encode()}
        masks().decode(encoding)  # raises an error if it is damaged
        return encoding
    except Exception as error:  # pycocotools raises this class itself
        raise DataError(
            f"{where}: {annotations.describe(index)}: the segmentation cannot be read ({error}); write polygons "
            "[[x, y, x, y, ...], ...] or a run-length encoding"
        ) from error


def _num_pieces(mask: dict[str, Any], segmentation: Any) -> int:
    if isinstance(segmentation, list):
        return len(segmentation)  # annotators draw one polygon for each piece
    from scipy import ndimage  # late: most annotations are polygons

    return int(ndimage.label(masks().decode(mask))[1])


def _largest_empty_square(boxes: np.ndarray, height: int, width: int) -> Box | None:
    """Return a square in an image that no box [N, 4] (xyxy in pixels) touches; None if all are below MIN_REGION."""
    rows, columns = height // _CELL, width // _CELL
    sums = np.zeros((rows + 1, columns + 1), np.int64)  # of the occupied cells above and to the left
    for left, top, right, bottom in boxes.tolist():
        sums[
            1 + max(0, int(top // _CELL)) : 2 + int(bottom // _CELL),
            1 + max(0, int(left // _CELL)) : 2 + int(right // _CELL),
        ] = 1
    sums = sums.cumsum(axis=0).cumsum(axis=1)

    def free(side: int) -> np.ndarray:
        """Return where the upper left cell of an empty square may be: [rows, columns] bool."""
        return sums[side:, side:] + sums[:-side, :-side] == sums[side:, :-side] + sums[:-side, side:]

    sides = range(1, min(rows, columns) + 1)
    side = bisect_left(sides, True, key=lambda side: not free(side).any())  # the largest one
    if side * _CELL < MIN_REGION:
        return None
    row, column = np.argwhere(free(side))[0].tolist()
    return column * _CELL, row * _CELL, (column + side) * _CELL, (row + side) * _CELL


def _check_files(names: set[str], root: Path, where: str) -> None:
    files = image_files(sorted(names), root)
    missing = [name for name, file in zip(sorted(names), files, strict=True) if file is None or not file.is_file()]
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of {len(names)} image files are missing below {root}, first {missing[0]}; put "
            "them there, or set images to the folder that contains them"
        )


@lru_cache(maxsize=2 * MAX_CROPS)  # training and evaluation data
def read_crop(crop: Crop, scale: float) -> Image.Image:
    """Cut out an object as an RGBA image with an area of at most scale x scale pixels, transparent around the object.

    Raises:
        BadSampleError: the image cannot be read.
    """
    left, top, right, bottom = crop.box
    image = crop.file.read(crop.box)
    image.putalpha(Image.fromarray(masks().decode(crop.mask)[top:bottom, left:right] * np.uint8(255)))
    factor = min(1.0, scale / (image.width * image.height) ** 0.5)
    return image.resize(
        (max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.BILINEAR
    )


@lru_cache(maxsize=2 * MAX_REGIONS)
def read_region(region: Region, side: int) -> Image.Image:
    """Cut out an empty region, with at most side x side pixels; raises BadSampleError if the image cannot be read."""
    image = region.file.read(region.box)
    side = min(side, image.width)
    return image.resize((side, side), Image.Resampling.BILINEAR)

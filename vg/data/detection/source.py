"""Detection datasets of all formats: a table of images with labeled boxes, and the samples made from it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vg.data.detection.annotations import Annotations
from vg.data.detection.vocabulary import Vocabulary
from vg.data.images import find_image, image_key, image_size, read_image
from vg.data.source import OVERHANG, Provenance
from vg.errors import BadSampleError, DataError
from vg.types import Sample

MIN_SIDE = 1.0  # pixels: published training leaves out boxes with a shorter side; the default except for COCO json
_SUSPICIOUS = 0.3  # share of boxes beyond the image from which on their format is in doubt


@dataclass(frozen=True)
class DetectionTable:
    """I images and their A boxes, image by image in flat arrays, which are small and shared by worker processes."""

    ids: Sequence[str]  # I
    files: Sequence[str]  # I file names below the image root
    sizes: np.ndarray  # [I, 2] int64, (height, width) in pixels; 0, 0 where the annotations have none
    starts: np.ndarray  # [I + 1] int64: image i has the boxes from starts[i] to starts[i + 1]
    boxes: np.ndarray  # [A, 4] float32 xyxy, in pixels or, where `relative`, in 0..1 of the image
    labels: np.ndarray  # [A] int64, indices of classes
    crowd: np.ndarray  # [A] bool, see Sample.crowd
    areas: np.ndarray | None  # [A] float32, see Sample.areas
    relative: bool = False  # such boxes refer to the image after its EXIF orientation is applied

    @classmethod
    def of(cls, annotations: Annotations) -> DetectionTable:
        """Sort the boxes by image; duplicates stay."""
        order = np.argsort(annotations.image_indices, kind="stable")
        indices = np.arange(len(annotations.ids) + 1)
        crowd, areas = annotations.crowd, annotations.areas
        return cls(
            ids=annotations.ids,
            files=annotations.files,
            sizes=annotations.sizes,
            starts=np.searchsorted(annotations.image_indices[order], indices),
            boxes=annotations.xyxy[order].astype(np.float32),
            labels=annotations.labels[order],
            crowd=np.zeros(len(order), bool) if crowd is None else crowd[order],
            areas=None if areas is None else areas[order].astype(np.float32),
            relative=annotations.relative,
        )


class DetectionSource:
    """A detection dataset as a vg.data.source.Source; the id of a sample is the id of its image.

    Boxes are clipped to the image; those without area in it or with a side below `min_side` are left out. Crowd regions
    (`Sample.crowd`) stay, except where the vocabulary samples phrases, which is for training only.

    Args:
        vocabulary: the phrases of the annotations' classes.
        min_side: in pixels.

    Raises:
        DataError: the image root is not a folder.
    """

    def __init__(
        self,
        annotations: Annotations,
        vocabulary: Vocabulary,
        provenance: Provenance,
        min_side: float = MIN_SIDE,
    ):
        self.image_root = annotations.image_root
        check_image_root(self.image_root)
        self.table = DetectionTable.of(annotations)
        self.vocabulary = vocabulary
        self.category_ids = dict(zip(vocabulary.phrases, annotations.category_ids, strict=True))
        """Phrase -> id that the annotations, and files of results, have for the class."""
        self.provenance = provenance
        self.min_side = min_side
        self._sizes: np.ndarray | None = None
        self._warn_of_overhang()

    def __len__(self) -> int:
        return len(self.table.ids)

    def load(self, index: int, epoch: int) -> Sample:
        """Return the sample of one image; the epoch matters where the vocabulary samples phrases."""
        table = self.table
        file = find_image(table.files[index], self.image_root)
        image = read_image(file, str(file), upright=table.relative)
        check_size(image, table.sizes[index].tolist(), file)
        own = slice(table.starts[index], table.starts[index + 1])
        boxes = table.boxes[own]  # [N, 4]
        return detection_sample(
            id=table.ids[index],
            image=image,
            boxes=boxes * _scale(image) if table.relative else boxes,
            labels=table.labels[own],
            crowd=table.crowd[own],
            areas=None if table.areas is None else table.areas[own],
            vocabulary=self.vocabulary,
            epoch=epoch,
            index=index,
            min_side=self.min_side,
        )

    def image_sizes(self, epoch: int) -> np.ndarray:
        """[I, 2] (height, width), read from the image files where the annotations have none."""
        if self._sizes is None:
            sizes = self.table.sizes.copy()
            for index in np.flatnonzero((sizes == 0).any(axis=1)).tolist():
                file = find_image(self.table.files[index], self.image_root)
                sizes[index] = image_size(file, str(file), self.table.relative)
            self._sizes = sizes
        return self._sizes

    def image_keys(self) -> list[str]:
        return [image_key(file, self.image_root) for file in self.table.files]

    def _warn_of_overhang(self) -> None:
        """Warn if many boxes extend beyond the image: their format is wrong, which clipping would hide."""
        table, where = self.table, f"{self.provenance.data} ({self.provenance.split})"
        limits = np.repeat(table.sizes[:, ::-1], np.diff(table.starts), axis=0)  # [A, 2] width, height
        known = (limits > 0).all(axis=1)
        beyond = (table.boxes[:, 2:] > limits + OVERHANG) | (table.boxes[:, :2] < -OVERHANG)
        out = np.flatnonzero(beyond.any(axis=1) & known)  # indices of boxes
        if len(out) > _SUSPICIOUS * np.count_nonzero(known):
            first = table.ids[int(np.searchsorted(table.starts, out[0], side="right")) - 1]
            warnings.warn(
                f"{where}: {len(out)} of {np.count_nonzero(known)} boxes extend beyond their image, first in {first}; "
                "they are clipped. Check their format: COCO has x, y, width, height, VOC left, top, right, bottom",
                stacklevel=4,
            )


def detection_sample(
    id: str,
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    vocabulary: Vocabulary,
    epoch: int,
    index: int,
    crowd: np.ndarray | None = None,
    areas: np.ndarray | None = None,
    min_side: float = MIN_SIDE,
) -> Sample:
    """Make a sample of boxes [N, 4] xyxy pixels with classes labels [N]."""
    boxes, kept = clip_boxes(boxes, image, min_side)
    crowd = np.zeros(len(labels), bool) if crowd is None else crowd
    if vocabulary.config.negatives is not None:
        kept &= ~crowd
    phrases, phrase_ids = vocabulary.prompt(labels[kept], epoch, index)
    return Sample(
        id=id,
        image=image,
        phrases=phrases,
        boxes=boxes[kept],
        phrase_ids=phrase_ids,
        crowd=crowd[kept] if crowd[kept].any() else None,
        areas=None if areas is None else areas[kept],
    )


def clip_boxes(boxes: np.ndarray, image: np.ndarray, min_side: float = MIN_SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes [N, 4] xyxy pixels to image [H, W, 3]; also return [N] bool, which of them to keep.

    A box is kept if it has an area in the image and both its sides were at least `min_side` pixels before clipping.

    Raises:
        BadSampleError: a box is inverted; leaving it out would hide a wrong box format.
    """
    if (inverted := (boxes[:, 2:] < boxes[:, :2]).any(axis=1)).any():
        raise BadSampleError(
            f"box {boxes[inverted][0].tolist()} (left, top, right, bottom) is inverted (x2 < x1 or y2 < y1); was x, y, "
            "width, height written instead?"
        )
    clipped = np.clip(boxes, 0, _scale(image))
    kept = (clipped[:, 2:] > clipped[:, :2]).all(axis=1) & (boxes[:, 2:] - boxes[:, :2] >= min_side).all(axis=1)
    return clipped, kept


def _scale(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return np.array([width, height, width, height], np.float32)


def check_image_root(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"image_root {folder} is not a folder; set it to the one that contains the images")


def check_size(image: np.ndarray, size: Sequence[int], file: Path) -> None:
    """Raise BadSampleError unless image [H, W, 3] has the annotated (height, width); 0 matches any size."""
    if all(size) and image.shape[:2] != tuple(size):
        advice = (
            "store it upright instead of with an EXIF orientation"
            if image.shape[1::-1] == tuple(size)
            else "use the image that was annotated, or correct height and width"
        )
        raise BadSampleError(
            f"image {file} is {image.shape[1]} wide and {image.shape[0]} high, its annotation says {size[1]} and "
            f"{size[0]}; {advice}"
        )

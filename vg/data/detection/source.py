"""Detection sets in one shape: whatever the files, a table of pictures with boxes of classes, and samples of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vg.data.detection.vocabulary import Vocabulary
from vg.data.images import find_image, image_key, image_size, read_image
from vg.data.source import OVERHANG, Provenance
from vg.errors import BadSampleError, DataError
from vg.types import Sample

MIN_SIDE = 1.0  # pixels: published training leaves out boxes with a shorter side, and so do these sets by default
_SUSPICIOUS = 0.3  # share of boxes beyond the image from which on their format is in doubt


@dataclass(frozen=True)
class DetectionTable:
    """I pictures and the A boxes in them, picture by picture in flat arrays, which are small and shared by workers."""

    ids: Sequence[str]  # I
    files: Sequence[str]  # I names of files below the image root
    sizes: np.ndarray  # [I, 2] int64, (height, width) in pixels; 0, 0 where the annotations do not say
    starts: np.ndarray  # [I + 1] int64: picture i has the boxes from starts[i] to starts[i + 1]
    boxes: np.ndarray  # [A, 4] float32 xyxy, in pixels or, where `relative`, in 0..1 of the picture
    labels: np.ndarray  # [A] int64, numbers of classes from 0 on
    crowd: np.ndarray  # [A] bool, see Sample.crowd
    areas: np.ndarray | None  # [A] float32, see Sample.areas
    relative: bool = False  # such boxes refer to the picture as one looks at it, upright

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        files: Sequence[str],
        sizes: np.ndarray,
        owners: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        crowd: np.ndarray,
        areas: np.ndarray | None = None,
        relative: bool = False,
    ) -> DetectionTable:
        """Boxes in any order; owners [A] int: the picture (0..I-1) that each belongs to. Duplicates stay."""
        order = np.argsort(owners, kind="stable")
        starts = np.searchsorted(owners[order], np.arange(len(ids) + 1))
        return cls(
            ids=ids,
            files=files,
            sizes=sizes.reshape(-1, 2).astype(np.int64),
            starts=starts,
            boxes=boxes.reshape(-1, 4)[order].astype(np.float32),
            labels=labels[order].astype(np.int64),
            crowd=crowd[order].astype(bool),
            areas=None if areas is None else areas[order].astype(np.float32),
            relative=relative,
        )


class Detection:
    """A detection set as a vg.data.source.Source; the id of a sample is the id of its picture.

    Boxes are clipped to the picture; those that have no area in it or a side below `min_side` are left out. Regions of
    many things (`Sample.crowd`) stay, except where the vocabulary samples phrases, which is for training only.

    Args:
        image_root: the folder that the files of the table are in.
        class_ids: the numbers that the annotations have for the classes of the vocabulary.
        min_side: in pixels.
    """

    def __init__(
        self,
        table: DetectionTable,
        vocabulary: Vocabulary,
        class_ids: Sequence[int],
        image_root: Path,
        provenance: Provenance,
        min_side: float = MIN_SIDE,
    ):
        if not image_root.is_dir():
            raise DataError(f"image_root {image_root} is not a folder; set it to the one that holds the pictures")
        self.table = table
        self.vocabulary = vocabulary
        self.class_ids = tuple(class_ids)
        self.image_root = image_root
        self.provenance = provenance
        self.min_side = min_side
        self._sizes: np.ndarray | None = None
        self._warn_of_overhang()

    def __len__(self) -> int:
        return len(self.table.ids)

    def load(self, index: int, epoch: int) -> Sample:
        """The sample of one picture; the epoch matters where the vocabulary samples phrases."""
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
            turn=(epoch, index),
            min_side=self.min_side,
        )

    @property
    def category_ids(self) -> dict[str, int]:
        """Phrase -> the number that the annotations, and files of results, have for that class."""
        return dict(zip(self.vocabulary.phrases, self.class_ids, strict=True))

    def image_sizes(self, epoch: int) -> np.ndarray:
        """[I, 2] (height, width), from the heads of the files where the annotations do not say."""
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
        """A few boxes beyond the image are clipped; many are a mix-up of formats, which clipping would hide."""
        table, where = self.table, f"{self.provenance.data} ({self.provenance.split})"
        limits = np.repeat(table.sizes[:, ::-1], np.diff(table.starts), axis=0)  # [A, 2] width, height
        known = (limits > 0).all(axis=1)
        beyond = (table.boxes[:, 2:] > limits + OVERHANG) | (table.boxes[:, :2] < -OVERHANG)
        out = np.flatnonzero(beyond.any(axis=1) & known)  # numbers of boxes
        if len(out) > _SUSPICIOUS * np.count_nonzero(known):
            first = table.ids[int(np.searchsorted(table.starts, out[0], side="right")) - 1]
            warnings.warn(
                f"{where}: {len(out)} of {np.count_nonzero(known)} boxes stick out of their picture, first in {first}; "
                "they are clipped. Check their format: COCO has x, y, width, height, VOC left, top, right, bottom",
                stacklevel=4,
            )


def detection_sample(
    id: str,
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    crowd: np.ndarray,
    areas: np.ndarray | None,
    vocabulary: Vocabulary,
    turn: tuple[int, int],
    min_side: float = MIN_SIDE,
) -> Sample:
    """Boxes [N, 4] xyxy pixels of classes labels [N] -> a sample; `turn` is (epoch, index)."""
    inside, kept = usable(boxes, image, min_side)
    if vocabulary.config.negatives is not None:
        kept &= ~crowd
    phrases, phrase_ids = vocabulary.prompt(labels[kept], *turn)
    return Sample(
        id=id,
        image=image,
        phrases=phrases,
        boxes=inside[kept],
        phrase_ids=phrase_ids,
        crowd=crowd[kept] if crowd[kept].any() else None,
        areas=None if areas is None else areas[kept],
    )


def usable(boxes: np.ndarray, image: np.ndarray, min_side: float = MIN_SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] xyxy pixels clipped to image [H, W, 3], and [N] bool: which are worth keeping.

    Raises:
        BadSampleError: a box is turned inside out; to leave it out would hide a mix-up of formats.
    """
    if (inverted := (boxes[:, 2:] < boxes[:, :2]).any(axis=1)).any():
        raise BadSampleError(
            f"box {boxes[inverted][0].tolist()} (left, top, right, bottom) ends before it begins; was x, y, width, "
            "height written instead?"
        )
    inside = np.clip(boxes, 0, _scale(image))
    kept = (inside[:, 2:] > inside[:, :2]).all(axis=1) & (boxes[:, 2:] - boxes[:, :2] >= min_side).all(axis=1)
    return inside, kept


def _scale(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return np.array([width, height, width, height], np.float32)


def check_size(image: np.ndarray, size: Sequence[int], file: Path) -> None:
    """Raise BadSampleError unless image [H, W, 3] has the annotated (height, width), where that is not 0."""
    if all(size) and image.shape[:2] != tuple(size):
        turned = image.shape[1::-1] == tuple(size)
        advice = (
            "store it upright instead of with an EXIF orientation"
            if turned
            else "take the picture that was annotated, or correct the numbers"
        )
        raise BadSampleError(
            f"image {file} is {image.shape[1]} wide and {image.shape[0]} high, its annotation says {size[1]} and "
            f"{size[0]}; {advice}"
        )

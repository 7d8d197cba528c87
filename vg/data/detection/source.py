"""Detection datasets of all formats: images with labeled boxes as samples."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from vg.data.detection.annotations import MIN_SIDE, Annotations, ReadsAnnotations
from vg.data.detection.issues import RaiseFirstError
from vg.data.detection.vocabulary import Vocabulary
from vg.data.image_files import image_files, image_key
from vg.data.images import find_image, find_size, read_image
from vg.data.source import OVERHANG, Provenance, Source
from vg.errors import BadSampleError, DataError
from vg.types import Coverage, Sample

_SUSPICIOUS = 0.3  # minimum fraction of boxes beyond the image for a warning that their format may be wrong


class DetectionSource(Source[Sample]):
    """A detection dataset; the id of a sample is the id of its image.

    Boxes are clipped to the image; those without area in it or with a side below `min_side` are left out. Crowd regions
    (`Sample.crowd`) stay, except where the vocabulary samples phrases, which is for training only.

    Args:
        config: has the settings of the vocabulary.
        annotations: stored sorted by image in flat arrays, which are small and shared by worker processes.
        data: name of the dataset, for its provenance.
        min_side: in pixels.

    Raises:
        DataError: the image root is not a folder, or see Vocabulary.
    """

    def __init__(
        self, config: ReadsAnnotations, annotations: Annotations, data: str, split: str, min_side: float = MIN_SIDE
    ):
        check_image_root(annotations.image_root)
        self.vocabulary = vocabulary = Vocabulary(annotations.names, config.vocabulary, config.path)
        is_federated = annotations.coverage is not None
        self.provenance = Provenance(data, split, "federated" if is_federated else "detection")
        category_ids = [annotations.category_ids[label] for label in vocabulary.used]
        self.category_ids: dict[str, int] = dict(zip(vocabulary.phrases, category_ids, strict=True))
        self.num_classes = len(vocabulary.names) if config.vocabulary.negatives is None else None
        known = annotations.frequencies
        self.frequencies = {p: known[x] for p, x in zip(vocabulary.phrases, vocabulary.used, strict=True) if known}
        labels = vocabulary.labels[annotations.labels]  # [A]
        order = np.argsort(annotations.image_indices, kind="stable")
        order = order[labels[order] >= 0]  # from here on, A is the number of boxes of the classes in use
        areas, indices = annotations.areas, np.arange(len(annotations.ids) + 1)
        self._root, self._ids, self._files = annotations.image_root, annotations.ids, annotations.files
        self._annotated_sizes = annotations.sizes  # [I, 2]
        self._starts = np.searchsorted(annotations.image_indices[order], indices)  # [I + 1] first box of each image
        self._boxes = annotations.xyxy[order].astype(np.float32)  # [A, 4] in pixels or, if relative, in 0..1
        self._labels, self._crowd = labels[order], annotations.crowd[order]  # [A] both
        self._areas = None if areas is None else areas[order].astype(np.float32)  # [A]
        self._relative, self._upright = annotations.relative, annotations.upright
        self._min_side, self._coverage = min_side, annotations.coverage
        if self._coverage is not None:
            self._coverage = self._coverage[np.argsort(self._coverage[:, 0], kind="stable")]  # [J, 3]
        if not len(self._boxes):
            warnings.warn(f"{self.provenance}: no image has a box; annotate them, or use the right file", stacklevel=3)
        self._warn_of_overhang()

    def __len__(self) -> int:
        return len(self._ids)

    def load(self, index: int, epoch: int) -> Sample:
        """Return the sample of one image; the epoch matters where the vocabulary samples phrases."""
        image = read_annotated_image(self._files[index], self._root, self._annotated_sizes[index], self._upright)
        own = slice(self._starts[index], self._starts[index + 1])
        boxes = self._boxes[own] * _scale(image) if self._relative else self._boxes[own]  # [N, 4]
        boxes, kept = clip_boxes(boxes, image, self._min_side)
        if self.vocabulary.config.negatives is not None:
            kept &= ~self._crowd[own]
        phrases, phrase_ids = self.vocabulary.prompt(self._labels[own][kept], epoch, index)
        crowd = self._crowd[own][kept]
        return Sample(
            id=self._ids[index],
            image=image,
            phrases=phrases,
            boxes=boxes[kept],
            phrase_ids=phrase_ids,
            crowd=crowd if crowd.any() else None,
            areas=None if self._areas is None else self._areas[own][kept],
            coverage=self._covered(index),
        )

    def _covered(self, index: int) -> np.ndarray | None:
        """Return how far the phrases of an image are annotated, see Sample.coverage; None if all are."""
        if self._coverage is None or self.vocabulary.config.negatives is not None:
            return None
        start, stop = np.searchsorted(self._coverage[:, 0], [index, index + 1])
        _, labels, values = self._coverage[start:stop].T
        used = self.vocabulary.labels[labels]
        covered = np.full(len(self.vocabulary.phrases), Coverage.UNKNOWN, np.uint8)
        covered[used[used >= 0]] = values[used >= 0]
        return covered

    def image_sizes(self, epoch: int) -> np.ndarray:
        """[I, 2] (height, width), read from the image files where the annotations have none."""
        return self._sizes

    @cached_property
    def _sizes(self) -> np.ndarray:
        sizes = self._annotated_sizes.copy()
        for index in np.flatnonzero((sizes == 0).any(axis=1)).tolist():
            sizes[index] = find_size(self._files[index], self._root, self._upright)
        return sizes

    def image_keys(self) -> list[str]:
        return [image_key(file, self._root) for file in self._files]

    def image_files(self) -> list[Path | None]:
        return image_files(self._files, self._root)

    def fingerprint(self) -> str:
        names = (self._ids, self._files, self.vocabulary.names, self.category_ids.values())
        digest = hashlib.sha256(json.dumps([*map(list, names)]).encode())
        columns = (self._annotated_sizes, self._starts, self._boxes, self._labels, self._crowd, self._areas)
        for column in (*columns, self._coverage):
            digest.update(b"" if column is None else column.tobytes())
        return digest.hexdigest()

    def _warn_of_overhang(self) -> None:
        """Warn if many boxes extend beyond the image: their format is wrong, which clipping would hide."""
        limits = np.repeat(self._annotated_sizes[:, ::-1], np.diff(self._starts), axis=0)  # [A, 2] width, height
        known = (limits > 0).all(axis=1)
        beyond = (self._boxes[:, 2:] > limits + OVERHANG) | (self._boxes[:, :2] < -OVERHANG)
        out = np.flatnonzero(beyond.any(axis=1) & known)  # indices of boxes
        if len(out) > _SUSPICIOUS * np.count_nonzero(known):
            first = self._ids[int(np.searchsorted(self._starts, out[0], side="right")) - 1]
            warnings.warn(
                f"{self.provenance.data} ({self.provenance.split}): {len(out)} of {np.count_nonzero(known)} boxes "
                f"extend beyond their image, first in {first}; they are clipped. Check their format: COCO has x, y, "
                "width, height, VOC left, top, right, bottom",
                stacklevel=4,
            )


def read_strictly(config: ReadsAnnotations, min_side: float = MIN_SIDE) -> Annotations:
    """Read all annotations for training or evaluation; raises DataError for the first one that cannot be used.

    Args:
        min_side: see `Annotations.report_lost`.
    """
    strict = RaiseFirstError(config.path)
    annotations = config.read(strict)
    annotations.report_inverted(strict)
    annotations.report_lost(strict, min_side)
    return annotations


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
    """Raise DataError if the image root is not a folder."""
    if not folder.is_dir():
        raise DataError(f"image_root {folder} is not a folder; set it to the one that contains the images")


def read_annotated_image(name: str, root: Path, size: Sequence[int], upright: bool | None = None) -> np.ndarray:
    """Read an image -> [H, W, 3] uint8; `upright` as in `read_image`.

    Raises:
        BadSampleError: it cannot be read, or is not of the annotated (height, width), where 0 matches any size.
    """
    file = find_image(name, root)
    image = read_image(file, str(file), upright, size)
    height, width = image.shape[:2]
    if all(size) and (height, width) != tuple(size):
        advice = "use the image that was annotated, or correct height and width"
        if (width, height) == tuple(size):
            advice = "its annotation is of the image turned by 90 degrees; turn the image, or set `upright`"
        raise BadSampleError(
            f"image {file} is {width} wide and {height} high, its annotation has {size[1]} and {size[0]}; {advice}"
        )
    return image

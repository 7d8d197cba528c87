"""What every data set of vg is: a sequence of samples that knows where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from vg.errors import BadSampleError
from vg.types import Sample

Task = Literal["expressions", "generalized", "detection"]
OVERHANG = 1.0  # pixels: annotators round, so a box may stick out of the image by this much and is clipped


@dataclass(frozen=True)
class Provenance:
    """Which data a result was measured on; every evaluation carries it."""

    data: str  # "refcoco (unc)"
    split: str  # "val"
    # Decides which metric judges: at most one box per expression, any number of them, or boxes of many phrases.
    task: Task = "expressions"
    partition: str | None = None  # who drew the line between the splits of a RefCOCO: "unc", "umd" or "google"
    official: bool | None = None  # whether it is that split in full, by its published counts; None where none are known


class Source(Protocol):
    """A data set: rows in, samples out. Fresh scenes or other randomness may depend on `epoch` and `index` only."""

    provenance: Provenance

    def __len__(self) -> int: ...

    def load(self, index: int, epoch: int) -> Any:
        """Read one Sample, or a FeatureSample (vg.cache.source) where the source is a cache.

        Raises:
            BadSampleError: that is impossible; the message names the item.
        """
        ...


@runtime_checkable
class HasImageSizes(Protocol):
    """A source that knows how large its pictures are without decoding them."""

    def image_sizes(self, epoch: int) -> np.ndarray:
        """[samples, 2] int: (height, width) in pixels of the picture that `load(index, epoch)` reads."""
        ...


@runtime_checkable
class HasImageKeys(Protocol):
    """A source that can tell which of its pictures are also in another one."""

    def image_keys(self) -> list[str]:
        """What picture each sample shows; two samples with the same key, of any sources, show the same one."""
        ...


@runtime_checkable
class HasFingerprint(Protocol):
    """A source that can tell whether its annotations are the ones they were."""

    def fingerprint(self) -> str:
        """A digest of all annotations; no picture is read for it."""
        ...


@runtime_checkable
class HasImageGroups(Protocol):
    """A source that knows which samples show the same picture, and shows it to all of them alike in an epoch."""

    def image_groups(self, epoch: int) -> np.ndarray:
        """[samples] int: the number of the picture that `load(index, epoch)` shows."""
        ...


@runtime_checkable
class HasCategoryIds(Protocol):
    """A source whose classes have numbers, which files of results name them by."""

    @property
    def category_ids(self) -> dict[str, int]:
        """Phrase -> number of the class."""
        ...


def checked(sample: Sample) -> Sample:
    """Check what every finished sample promises; every data set passes its samples through here.

    Returns:
        The sample, its boxes (xyxy pixels) clipped to the image where they stick out by at most `OVERHANG`.

    Raises:
        BadSampleError: image not [H, W, 3] uint8; no phrase or a blank one; boxes not [N, 4] float32, not finite,
            without area or outside the image; phrase_ids not [N] int64 or without a phrase; crowd not [N] bool or areas
            not [N] float32 where they are given.
    """
    image, boxes, phrase_ids = sample.image, sample.boxes, sample.phrase_ids
    where = f"sample {sample.id}"
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise BadSampleError(f"{where}: the image is {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] (RGB)")
    if not sample.phrases or not all(phrase.strip() for phrase in sample.phrases):
        raise BadSampleError(f"{where}: an empty phrase in {sample.phrases}; give it words or remove the row")
    if boxes.dtype != np.float32 or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise BadSampleError(f"{where}: boxes are {boxes.dtype} {list(boxes.shape)}, expected float32 [N, 4]")
    if phrase_ids.dtype != np.int64 or phrase_ids.shape != boxes.shape[:1]:
        raise BadSampleError(
            f"{where}: phrase_ids are {phrase_ids.dtype} {list(phrase_ids.shape)}, expected int64, one for each of the "
            f"{len(boxes)} boxes"
        )
    if ((phrase_ids < 0) | (phrase_ids >= len(sample.phrases))).any():
        raise BadSampleError(f"{where}: phrase_ids {phrase_ids.tolist()} point beyond {len(sample.phrases)} phrases")
    for name, values, kind in (("crowd", sample.crowd, np.bool_), ("areas", sample.areas, np.float32)):
        if values is not None and (values.dtype != kind or values.shape != boxes.shape[:1]):
            raise BadSampleError(
                f"{where}: {name} is {values.dtype} {list(values.shape)}, expected {np.dtype(kind)}, one for each of "
                f"the {len(boxes)} boxes"
            )
    height, width = image.shape[:2]
    clipped = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))  # [N, 4]
    for box, inside in zip(boxes, clipped, strict=True):
        trouble = _box_trouble(box, inside)
        if trouble:
            hint = _format_hint(box.tolist(), width, height)
            raise BadSampleError(
                f"{where}: box {box.tolist()} (left, top, right, bottom) {trouble} in an image {width} wide and "
                f"{height} high; {hint}"
            )
    return replace(sample, boxes=clipped)


def _box_trouble(box: np.ndarray, inside: np.ndarray) -> str:
    """What is wrong with one box [4], given the same box clipped to the image; empty if nothing is."""
    if not np.isfinite(box).all():
        return "is not finite"
    if box[2] <= box[0] or box[3] <= box[1]:
        return "has no area"
    if np.abs(box - inside).max() > OVERHANG:
        return "lies outside"
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return "has no area"
    return ""


def _format_hint(box: list[float], width: int, height: int) -> str:
    """How to mend a box that cannot be right: by far the most frequent cause is a mix-up of xywh and xyxy."""
    left, top, right, bottom = box
    if right > 0 and bottom > 0 and left + right <= width and top + bottom <= height:
        return "it would fit as x, y, width, height: was xywh read as xyxy?"
    if left < right - left <= width and top < bottom - top <= height:
        return "its width and height would fit as right and bottom edge: was xyxy read as xywh?"
    return "correct the annotation, or check that this is the picture it was made for"

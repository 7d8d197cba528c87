"""The interface of all datasets: a sequence of samples with provenance, and what else a source may know of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np

from vg.errors import BadSampleError, DataError
from vg.types import EncodedSample, Sample

Task = Literal["expressions", "generalized", "detection", "federated"]
OVERHANG = 1.0  # pixels by which a box may exceed the image, because annotators round; it is clipped

Loaded = TypeVar("Loaded", Sample, EncodedSample)
Loaded_co = TypeVar("Loaded_co", covariant=True)


@dataclass(frozen=True)
class Provenance:
    """The data on which a result was measured; every evaluation carries it."""

    data: str  # "refcoco (unc)"
    split: str  # "val"
    # Selects the metric: at most one box per expression, any number of boxes, boxes of many phrases, or of phrases that
    # are annotated in some images only (see Sample.coverage).
    task: Task = "expressions"
    partition: str | None = None  # split provider of a RefCOCO dataset: "unc", "umd" or "google"
    official: bool | None = None  # whether its counts are the published ones of that split; None if none are published

    def __str__(self) -> str:
        return f"{self.data} ({self.split})"

    @property
    def is_detection(self) -> bool:
        """Whether a sample is an image with boxes of many phrases, not an expression."""
        return self.task in ("detection", "federated")


class Source(ABC, Generic[Loaded_co]):
    """A dataset of Sample, or of EncodedSample if it is a feature cache; randomness depends on (epoch, index) only.

    A source sets `provenance` and implements `__len__` and `load`. All else is optional, and unknown by default.
    """

    provenance: Provenance

    category_ids: dict[str, int] | None = None
    """Phrase -> id that the annotations, and files of results, have for the class. `vg eval --detections` writes COCO
    results with these ids; it is an error if they are unknown."""

    frequencies: dict[str, str] | None = None
    """Phrase -> "r", "c" or "f", see vg.metrics.federated; empty if they are not known. Federated data, whose samples
    have `coverage`, can only be evaluated with it."""

    num_classes: int | None = None
    """Number of phrases of each prompt; None if it differs. `model.denoising: {}` has as many labels, 256 if it is
    unknown."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int, epoch: int) -> Loaded_co:
        """Load one sample; raises BadSampleError naming it if that is impossible."""

    def image_sizes(self, epoch: int) -> np.ndarray | None:
        """Return the (height, width) in pixels of the image that `load(index, epoch)` returns: [samples, 2] int.

        No image is decoded. Used by `data.group_by_aspect_ratio` for batches with less padding, which is an error if
        the sizes are unknown.
        """
        return None

    def image_groups(self, epoch: int) -> np.ndarray | None:
        """Return an id of the image that `load(index, epoch)` returns: [samples] int.

        In one epoch, all samples of a group have exactly the same image. Used by `data.expressions_per_image`, so that
        expressions of one image share it in a batch; more than 1 is an error if the groups are unknown. `vg shard`
        writes the samples of a group to one shard.
        """
        return None

    def image_keys(self) -> list[str] | None:
        """Return a key of the image of each sample; equal keys, in any source, mean the same image.

        Used to find images that training and evaluation share (`data.drop_overlap`, `vg check`), to cache the features
        of an image once, and to split a dataset by image. If the keys are unknown, overlap is not checked, a cache
        has the image of every sample, and splitting is an error.
        """
        return None

    def image_files(self) -> list[Path | None]:
        """Return the file of the image of each sample, which may be missing; None if the image is not a file.

        Used to encode images again for a feature cache after they changed; other changed images go unnoticed.
        """
        return [None] * len(self)

    def image_bytes(self, index: int) -> bytes | None:
        """Return the image file of a sample that is inside another file; None if its image is not encoded.

        Used by `vg shard`, which keeps the format of these files; other images without a file become PNG files.
        """
        return None

    def sample_phrases(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the id and the phrases of each sample, the same in every epoch; an empty list if they are unknown.

        No image is read. Used to find phrases that are too long, and evaluation data without any phrase of the training
        data, before the run begins. Otherwise a phrase that is too long is found when its sample is loaded.
        """
        return []

    def shard_ends(self) -> np.ndarray:
        """Return the index after the last sample of each shard, which is fast to read as a whole: [shards] int64.

        The indices are ascending. Used to shuffle samples inside blocks of shards, so that reads are sequential; those
        of a source with one shard, the default, are shuffled all together.
        """
        return np.array([len(self)], np.int64)

    def fingerprint(self) -> str | None:
        """Return a digest of all annotations, without reading images.

        If it has changed, a feature cache is refused, `vg shard` does not continue, and `--resume` warns. If it is the
        same, a cache is accepted for moved files. If it is unknown, changes that keep the number of samples go
        unnoticed, and moved files are encoded again.
        """
        return None

    def damaged_files(self) -> Iterator[str]:
        """Read all files and yield a message for each one that is missing or differs from its checksum.

        Used by `vg check`, which finds only files that cannot be decoded if there are no checksums.
        """
        return iter(())


def row_key(provenance: Provenance, row: int | str) -> str:
    """Return the key of an image without a name, which is found in no other row."""
    return f"{provenance.data}/{provenance.split}/row {row}"


def image_sizes_of(source: Source, epoch: int) -> np.ndarray:
    """Return `source.image_sizes(epoch)`; raises DataError if they are unknown."""
    if (sizes := source.image_sizes(epoch)) is None:
        raise DataError(f"{source.provenance.data} provides no image sizes, which data.group_by_aspect_ratio needs")
    return sizes


def image_groups_of(source: Source, epoch: int) -> np.ndarray:
    """Return `source.image_groups(epoch)`; raises DataError if they are unknown."""
    if (groups := source.image_groups(epoch)) is None:
        raise DataError(
            f"{source.provenance.data} does not group its samples by image, as data.expressions_per_image above 1 needs"
        )
    return groups


def checked(sample: Sample) -> Sample:
    """Validate a sample of any source.

    Returns:
        The sample, its boxes (xyxy in pixels) clipped to the image where they exceed it by at most `OVERHANG`.

    Raises:
        BadSampleError: image not [H, W, 3] uint8; phrases not a tuple of str, none or a blank one; boxes not [N, 4]
            float32, not finite, without area or outside the image; phrase_ids not [N] int64 or out of range; crowd not
            [N] bool or areas not [N] float32 where they are given; a caption without spans in it for every phrase.
    """
    image, boxes, phrase_ids = sample.image, sample.boxes, sample.phrase_ids
    where = f"sample {sample.id}"
    if not isinstance(sample.phrases, tuple) or not all(isinstance(phrase, str) for phrase in sample.phrases):
        raise BadSampleError(f"{where}: phrases are {sample.phrases!r:.80}, expected a tuple of str")
    for name in ("image", "boxes", "phrase_ids"):
        if not isinstance(value := getattr(sample, name), np.ndarray):
            raise BadSampleError(f"{where}: {name} is of type {type(value).__name__}, expected a NumPy array")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise BadSampleError(f"{where}: the image is {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] (RGB)")
    if not sample.phrases or not all(phrase.strip() for phrase in sample.phrases):
        raise BadSampleError(f"{where}: an empty phrase in {sample.phrases}; give it words or remove the row")
    if boxes.dtype != np.float32 or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise BadSampleError(f"{where}: boxes are {boxes.dtype} {list(boxes.shape)}, expected float32 [N, 4]")
    for name, values, dtype in (
        ("phrase_ids are", phrase_ids, np.int64),
        ("crowd is", sample.crowd, np.bool_),
        ("areas is", sample.areas, np.float32),
    ):
        if values is not None and (values.dtype != dtype or values.shape != boxes.shape[:1]):
            found = f"{values.dtype} {list(values.shape)}"
            raise BadSampleError(
                f"{where}: {name} {found}, expected {np.dtype(dtype)}, one for each of the {len(boxes)} boxes"
            )
    if ((phrase_ids < 0) | (phrase_ids >= len(sample.phrases))).any():
        raise BadSampleError(f"{where}: phrase_ids {phrase_ids.tolist()} exceed the {len(sample.phrases)} phrases")
    if sample.caption is not None:
        text, spans, _ = sample.caption
        valid = [bool(own) and all(0 <= begin < end <= len(text) for begin, end in own) for own in spans]
        if len(valid) != len(sample.phrases) or not all(valid):
            raise BadSampleError(
                f"{where}: spans {spans}, expected (begin, end) characters of the caption for each of the "
                f"{len(sample.phrases)} phrases; it has {len(text)} characters: {text[:80]!r}"
            )
    height, width = image.shape[:2]
    clipped = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))  # [N, 4]
    for box, inside in zip(boxes, clipped, strict=True):
        problem = _box_problem(box, inside)
        if not problem and len(boxes) == len(sample.phrases) == 1 and box.max() <= 1:
            problem = "lies in the first pixel, so it is probably in 0..1 of the image"
        if problem:
            hint = _format_hint(box.tolist(), width, height)
            raise BadSampleError(
                f"{where}: box {box.tolist()} (left, top, right, bottom) {problem} in an image {width} wide and "
                f"{height} high; {hint}"
            )
    return replace(sample, boxes=clipped)


def _box_problem(box: np.ndarray, inside: np.ndarray) -> str:
    """Describe the problem of one box [4], given also clipped to the image; empty for a valid box."""
    if not np.isfinite(box).all():
        return "is not finite"
    if (box[2:] > box[:2]).all() and np.abs(box - inside).max() > OVERHANG:
        return "lies outside"
    return "" if (inside[2:] > inside[:2]).all() else "has no area"


def _format_hint(box: list[float], width: int, height: int) -> str:
    """Suggest a fix for an impossible box; by far the most frequent cause is confusion of xywh and xyxy."""
    left, top, right, bottom = box
    if right <= 1 and bottom <= 1:
        return "multiply left and right by the width, top and bottom by the height"
    if right > 0 and bottom > 0 and left + right <= width and top + bottom <= height:
        return "it would fit as x, y, width, height: was xywh read as xyxy?"
    if left < right - left <= width and top < bottom - top <= height:
        return "its width and height would fit as right and bottom edge: was xyxy read as xywh?"
    return "correct the annotation, or check that it belongs to this image"

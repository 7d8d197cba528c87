"""The interface of all datasets: a sequence of samples with provenance, and what some sources offer beyond it.

A source implements `provenance`, `__len__` and `load`. Each of the protocols below is optional and enables a feature; a
table in CONTRIBUTING.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar, runtime_checkable

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


class Source(Protocol[Loaded_co]):
    """A dataset of Sample, or of EncodedSample if it is a feature cache; randomness depends on (epoch, index) only."""

    provenance: Provenance

    def __len__(self) -> int: ...

    def load(self, index: int, epoch: int) -> Loaded_co:
        """Load one sample; raises BadSampleError naming it if that is impossible."""


@runtime_checkable
class HasImageSizes(Protocol):
    """A source with image sizes that are available without decoding the images."""

    def image_sizes(self, epoch: int) -> np.ndarray:
        """Return the (height, width) in pixels of the image that `load(index, epoch)` returns: [samples, 2] int."""


@runtime_checkable
class HasImageKeys(Protocol):
    """A source whose images can be identified in other sources."""

    def image_keys(self) -> list[str]:
        """Return a key of the image of each sample; equal keys, in any source, mean the same image."""


@runtime_checkable
class HasImageFiles(Protocol):
    """A source with images in files of their own."""

    def image_files(self) -> list[Path | None]:
        """Return the file of the image of each sample, which may be missing; None if the image is not a file."""


@runtime_checkable
class HasFingerprint(Protocol):
    """A source with a content hash of its annotations."""

    def fingerprint(self) -> str:
        """Return a digest of all annotations, without reading images."""


@runtime_checkable
class HasPhrases(Protocol):
    """A source whose phrases are known without reading images, and are the same in every epoch."""

    def sample_phrases(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the id and the phrases of each sample."""


@runtime_checkable
class HasImageGroups(Protocol):
    """A source that groups samples by image; in one epoch all samples of a group have exactly the same image."""

    def image_groups(self, epoch: int) -> np.ndarray:
        """Return an id of the image that `load(index, epoch)` returns: [samples] int."""


@runtime_checkable
class HasShards(Protocol):
    """A source of samples in shards, each of which is fast to read as a whole."""

    def shard_ends(self) -> np.ndarray:
        """Return the index after the last sample of each shard: [shards] int64, ascending."""


@runtime_checkable
class HasCategoryIds(Protocol):
    """A source whose classes have ids for result files."""

    @property
    def category_ids(self) -> dict[str, int]:
        """Phrase -> category id."""


@runtime_checkable
class HasFrequencies(Protocol):
    """A source that can be evaluated as federated data: its samples have `coverage`."""

    @property
    def frequencies(self) -> Mapping[str, str]:
        """Phrase -> "r", "c" or "f", see vg.metrics.federated; empty if they are unknown."""


@runtime_checkable
class HasClasses(Protocol):
    """A source whose prompts may all have the same phrases."""

    @property
    def num_classes(self) -> int | None:
        """Number of phrases of each prompt; None if it differs."""


@runtime_checkable
class HasImageBytes(Protocol):
    """A source with image files that are inside other files."""

    def image_bytes(self, index: int) -> bytes | None:
        """Return the image file of a sample; None if its image is not encoded."""


@runtime_checkable
class HasChecksums(Protocol):
    """A source with checksums of its files."""

    def damaged_files(self) -> Iterator[str]:
        """Read all files and yield a message for each one that is missing or differs from its checksum."""


def row_key(provenance: Provenance, row: int | str) -> str:
    """Return the key of an image without a name, which is found in no other row."""
    return f"{provenance.data}/{provenance.split}/row {row}"


def phrases_of(source: Source) -> list[tuple[str, tuple[str, ...]]]:
    """Return the id and the phrases of each sample, or an empty list if the source does not implement HasPhrases."""
    return source.sample_phrases() if isinstance(source, HasPhrases) else []


def shard_ends(source: Sized) -> np.ndarray:
    """Return the index after the last sample of each shard, [shards] int64; one that has none is one shard."""
    return source.shard_ends() if isinstance(source, HasShards) else np.array([len(source)], np.int64)


def with_image_sizes(source: Source) -> HasImageSizes:
    """Return the source; raises DataError if it does not implement HasImageSizes."""
    if not isinstance(source, HasImageSizes):
        raise DataError(f"{source.provenance.data} provides no image sizes, which data.group_by_aspect_ratio needs")
    return source


def with_image_groups(source: Source) -> HasImageGroups:
    """Return the source; raises DataError if it does not implement HasImageGroups."""
    if not isinstance(source, HasImageGroups):
        raise DataError(
            f"{source.provenance.data} does not group its samples by image, as data.expressions_per_image above 1 needs"
        )
    return source


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

"""A dataset under check: its annotations, image files, and the issues found so far."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from vg.data.detection.annotations import AnnotatedBox, AnnotatedImage, Annotations, BoxFormat, ReadsAnnotations
from vg.data.detection.issues import Issues
from vg.data.detection.vocabulary import VocabularyConfig, normalized_name
from vg.data.image_files import image_key
from vg.data.images import SWAPPED, find_image, read_image
from vg.data.source import Source, Task, checked
from vg.errors import BadSampleError, DataError

UNREADABLE, FIX = "training cannot load this dataset", "fix the problem that the message names"


class ImageFile(NamedTuple):
    """Properties of an image file."""

    size: tuple[int, int] = (0, 0)  # (height, width) in pixels as stored; 0, 0 if it cannot be decoded
    orientation: int = 1  # in EXIF
    digest: bytes = b""  # of the content; empty if there is no such file
    error: str = ""  # why it cannot be read

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) in pixels as viewers show it."""
        return self.size[::-1] if self.orientation >= SWAPPED else self.size


@dataclass
class CheckedDataset:
    """Fields are filled in by one check after another."""

    name: str  # "train", "eval.val"
    title: str
    vocabulary: VocabularyConfig
    issues: Issues
    task: Task = "detection"
    annotations: Annotations = field(default_factory=Annotations)
    image_files: dict[int, ImageFile] = field(default_factory=dict)  # by image index; those that were opened
    sample_keys: list[str] | None = None  # see Source.image_keys; None: made from the names of the files
    load_image: Callable[[int], np.ndarray] | None = None  # [H, W, 3] uint8, if images are not in files of their own
    xyxy: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    """[A, 4] float64 in pixels; NaN where the size of the image is needed and unknown."""

    @property
    def is_training(self) -> bool:
        """Whether it is the training dataset, or a component of it."""
        return self.name.split(".")[0] == "train"

    @property
    def classes(self) -> list[str]:
        """Those that are used."""
        only, annotations = self.vocabulary.only, self.annotations
        return [name for name in annotations.names[: annotations.num_classes] if only is None or name in only]

    @property
    def classes_with_boxes(self) -> set[str]:
        names, num_classes = self.annotations.names, self.annotations.num_classes
        return {names[label] for label in set(self.annotations.labels.tolist()) if label < num_classes}

    @cached_property
    def words_with_boxes(self) -> set[str]:
        """Words of all class names and phrases that have a box."""
        names = self.annotations.names
        return {
            word for label in set(self.annotations.labels.tolist()) for word in normalized_name(names[label]).split()
        }

    @cached_property
    def image_keys(self) -> list[str]:
        root = self.annotations.image_root
        return self.sample_keys or [image_key(file, root) for file in self.annotations.files]

    def image(self, index: int) -> np.ndarray:
        """Decode an image -> [H, W, 3] uint8."""
        if self.load_image is not None:
            return self.load_image(index)
        file = find_image(self.annotations.files[index], self.annotations.image_root)
        return read_image(file, str(file), self.annotations.upright, self.annotations.sizes[index].tolist())

    @cached_property
    def limits(self) -> np.ndarray:
        """[A, 2] float64 (width, height) of the image of each box, as annotated or else as stored; 0 if unknown."""
        sizes = self.annotations.sizes.copy()  # [I, 2]
        for index, file in self.image_files.items():
            if not sizes[index].all():
                sizes[index] = file.upright_size if self.annotations.upright else file.size
        return sizes[self.annotations.image_indices][:, ::-1].astype(np.float64)

    def to_pixels(self, box_format: BoxFormat) -> np.ndarray:
        """[A, 4] float64 xyxy in pixels of boxes that are assumed to be in `box_format`."""
        xyxy = box_format.to_xyxy(self.annotations.boxes)
        if self.annotations.relative:
            return xyxy * np.where(self.limits > 0, self.limits, np.nan)[:, [0, 1, 0, 1]]
        return xyxy


def read_dataset(name: str, config: Any, limit: int | None) -> CheckedDataset:
    """Read all annotations of a dataset; a dataset without annotation files is read sample by sample.

    Args:
        config: settings of the dataset.
        limit: number of samples to read of a dataset without annotation files; None for all.
    """
    title = f"{config.name} {getattr(config, 'path', '')}".strip()
    vocabulary = getattr(config, "vocabulary", VocabularyConfig())
    dataset = CheckedDataset(name, title, vocabulary, Issues(name))
    try:
        if isinstance(config, ReadsAnnotations):
            dataset.annotations = config.read(dataset.issues)
            if not dataset.annotations.num_classes:
                dataset.task = getattr(config, "task", dataset.task)
        else:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                source = config.build()
            messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
            dataset.issues.add("warning", "warnings of the dataset itself", "see the message", messages)
            if limit is None:
                fix = "copy them again, or remove them and repeat vg shard"
                dataset.issues.add("error", "damaged or missing files", fix, source.damaged_files())
            _read_samples(source, dataset, limit)
    except (DataError, OSError) as error:
        dataset.issues.add("error", UNREADABLE, FIX, [str(error)])
    return dataset


def check_loading(dataset: CheckedDataset, config: Any) -> None:
    """Report errors of strict loading that no check has found."""
    if dataset.load_image is not None or any(issue.severity == "error" for issue in dataset.issues):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config.build()
        except (DataError, ValueError, TypeError, KeyError, OSError) as error:
            dataset.issues.add("error", UNREADABLE, FIX, [str(error)])


def _read_samples(source: Source, dataset: CheckedDataset, limit: int | None) -> None:
    """Load samples as training does."""
    dataset.task = source.provenance.task
    dataset.title = f"{source.provenance.data} ({source.provenance.split})"
    keys = source.image_keys()
    names: dict[str, int] = {}
    images, indices = [], []
    for index in tqdm(spread(len(source), limit), desc=f"{dataset.name}: samples", unit=" samples", mininterval=1):
        try:
            sample = checked(source.load(index, 0))
        except BadSampleError as error:
            fix = "see each message; data.bad_samples=skip continues without them"
            dataset.issues.add("error", "samples that cannot be used", fix, [str(error)])
            continue
        labels = [names.setdefault(phrase.casefold(), len(names)) for phrase in sample.phrases]
        location = f"sample {sample.id}"
        boxes = [
            AnnotatedBox(labels[phrase_id], box, location)
            for phrase_id, box in zip(sample.phrase_ids.tolist(), sample.boxes.tolist(), strict=True)
        ]
        height, width = sample.image.shape[:2]
        images.append(AnnotatedImage(sample.id, sample.id, location, (height, width), boxes))
        indices.append(index)
    dataset.annotations = Annotations.of(images, list(names), num_classes=0)
    dataset.sample_keys = None if keys is None else [keys[index] for index in indices]
    dataset.load_image = lambda image: source.load(indices[image], 0).image


def spread(length: int, limit: int | None) -> Sequence[int]:
    """Return all indices of a list, or `limit` of them, evenly spaced."""
    if limit is None or limit >= length:
        return range(length)
    return np.linspace(0, length - 1, limit).round().astype(int).tolist()

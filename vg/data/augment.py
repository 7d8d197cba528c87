"""Image augmentation that keeps the phrases true: flipping an image swaps left and right in its phrases."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, PositiveInt

from vg.data.mirror import mirrored
from vg.settings import Settings
from vg.types import Sample

if TYPE_CHECKING:
    import albumentations as A

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no network request at import

Share = Annotated[float, Field(ge=0, le=1)]
MIN_VISIBLE = 0.01  # pixels; a crop drops a box of which less width or height remains


@dataclass
class ResizeConfig(Settings):
    """Random resizing and cropping of the DETR family; the defaults are the published ones. Lengths are in pixels."""

    shortest: list[PositiveInt] = field(default_factory=lambda: list(range(480, 801, 32)))
    """Shorter sides of the resized image, one drawn per sample; the model limits the longer side."""
    crop: Share = 0.5
    """Probability of a random crop before resizing, which may cut or drop boxes."""
    crop_shortest: list[PositiveInt] = field(default_factory=lambda: [400, 500, 600])
    """Shorter sides that the image is resized to before cropping, one drawn per sample."""
    crop_sides: tuple[PositiveInt, PositiveInt] = (384, 600)
    """Minimum and maximum of width and height of the crop after that resizing, each limited by the image."""

    def __post_init__(self) -> None:
        if not self.shortest or not self.crop_shortest:
            raise ValueError("shortest and crop_shortest need at least one length")
        if self.crop_sides[0] > self.crop_sides[1]:
            raise ValueError(f"crop_sides {list(self.crop_sides)} must be (minimum, maximum)")


@dataclass
class AugmentConfig(Settings):
    """Probabilities are per sample; everything is off by default."""

    flip: Share = 0.0
    """Probability of a horizontal flip, with "left" and "right" swapped in the phrases; samples with a doubtful phrase
    ("half of the pizza left"), or with such words in a whole caption, are not flipped."""
    color: Share = 0.0
    """Strength of random brightness, contrast and saturation (0.2 = up to 20 %); hue is kept: phrases name colors."""
    crop: Share = 0.0
    """Probability of a random crop that contains all boxes completely."""
    resize: ResizeConfig | None = None
    """Random sizes, for models that accept any image size: {} uses the published ones, null disables."""

    def build(self) -> Augment | None:
        return Augment(self) if any((self.flip, self.color, self.crop, self.resize)) else None


class Augment:
    """Randomly flip, crop and recolor a Sample; the result depends only on the sample and the seed."""

    def __init__(self, config: AugmentConfig):
        import albumentations as A

        self.config = config
        self.flip = _with_boxes(A.HorizontalFlip(p=1))
        jitter = (1 - config.color, 1 + config.color)
        self.color = A.ColorJitter(jitter, jitter, jitter, hue=(0, 0), p=1)

    def __call__(self, sample: Sample, seed: tuple[int, int, int]) -> Sample:
        random = np.random.default_rng(seed)
        flip, crop = random.random(2) < (self.config.flip, self.config.crop)
        self.color.set_random_seed(int(random.integers(2**31)))
        if flip and (phrases := _mirrored_phrases(sample)):
            sample = replace(_transformed(self.flip, sample), phrases=phrases)
        if crop:
            sample = _cropped(sample, random)
        if self.config.resize:
            sample = self._resized(sample, self.config.resize, random)
        if self.config.color:
            sample = replace(sample, image=self.color(image=sample.image)["image"])
        return sample

    @staticmethod
    def _resized(sample: Sample, config: ResizeConfig, random: np.random.Generator) -> Sample:
        """Crop the original pixels and leave resizing to the collator.

        Published recipes resize, crop and resize again, with the same region and size as result. Resizing once blurs
        less, and the collator resizes as it does for evaluation.
        """
        import albumentations as A

        if random.random() < config.crop:
            height, width = sample.image.shape[:2]
            shrink = min(height, width) / random.choice(config.crop_shortest)
            resized = np.round(np.array([width, height]) / shrink).astype(int)
            low, high = (np.minimum(resized, limit) for limit in config.crop_sides)
            sides = np.round(random.integers(low, high + 1) * shrink).astype(int)
            crop_width, crop_height = np.clip(sides, 1, (width, height)).tolist()
            left = int(random.integers(width - crop_width + 1))
            top = int(random.integers(height - crop_height + 1))
            sample = _transformed(_with_boxes(A.Crop(left, top, left + crop_width, top + crop_height, p=1)), sample)
        return replace(sample, shortest=int(random.choice(config.shortest)))


def _cropped(sample: Sample, random: np.random.Generator) -> Sample:
    """Crop to a random region of whole pixels that contains all boxes completely; all of an image without boxes.

    BBoxSafeRandomCrop of albumentations rounds the region down, which cuts up to one pixel of a box.
    """
    import albumentations as A

    if not len(sample.boxes):
        return sample
    height, width = sample.image.shape[:2]
    left, top = np.floor(sample.boxes[:, :2].min(axis=0)).astype(int).tolist()
    right, bottom = np.ceil(sample.boxes[:, 2:].max(axis=0)).astype(int).tolist()
    left, top = int(random.integers(left + 1)), int(random.integers(top + 1))
    right, bottom = int(random.integers(right, width + 1)), int(random.integers(bottom, height + 1))
    return _transformed(_with_boxes(A.Crop(left, top, right, bottom, p=1)), sample)


def _mirrored_phrases(sample: Sample) -> tuple[str, ...]:
    """Return the phrases of the mirrored sample; none if it should not be mirrored."""
    if sample.caption is not None:  # other words would have other spans
        return sample.phrases if mirrored(sample.caption.text) == sample.caption.text else ()
    phrases = tuple(swapped for phrase in sample.phrases if (swapped := mirrored(phrase)) is not None)
    return phrases if len(phrases) == len(sample.phrases) else ()


def _with_boxes(transform: A.BasicTransform) -> A.Compose:
    """Make a transform move the boxes too and drop those that are no longer visible."""
    import albumentations as A

    boxes = A.BboxParams(
        format="pascal_voc", label_fields=["indices"], min_width=MIN_VISIBLE, min_height=MIN_VISIBLE, clip=True
    )
    return A.Compose([transform], bbox_params=boxes)


def _transformed(transform: A.Compose, sample: Sample) -> Sample:
    """Apply a geometric transform; the annotated areas no longer fit and are removed."""
    result = transform(image=sample.image, bboxes=sample.boxes, indices=np.arange(len(sample.boxes)))
    kept = np.asarray(result["indices"], dtype=np.int64)  # [N] indices of the boxes that remain
    return replace(
        sample,
        image=result["image"],
        boxes=np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4),
        phrase_ids=sample.phrase_ids[kept],
        crowd=None if sample.crowd is None else sample.crowd[kept],
        areas=None,
    )

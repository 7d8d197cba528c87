"""Augmentation that keeps words true: a mirrored picture swaps left and right in its phrases."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, PositiveInt

from vg.settings import Settings
from vg.types import Sample

if TYPE_CHECKING:
    import albumentations as A

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no look-up on the network at import

Share = Annotated[float, Field(ge=0, le=1)]
MIN_VISIBLE = 0.01  # pixels of width and height that a crop must leave of a box; less has no area to speak of


@dataclass
class ResizeConfig(Settings):
    """Random sizes as the DETR family trains with; the defaults are the published ones. Lengths are in pixels."""

    shortest: list[PositiveInt] = field(default_factory=lambda: list(range(480, 801, 32)))
    """One is drawn for each sample as the shorter side of the image in the batch; the model limits the longer one."""
    crop: Share = 0.5
    """Probability of a random crop before, which may cut boxes or lose them."""
    crop_shortest: list[PositiveInt] = field(default_factory=lambda: [400, 500, 600])
    """Shorter sides of the image that is cropped, one drawn for each."""
    crop_sides: tuple[PositiveInt, PositiveInt] = (384, 600)
    """Least and greatest width and height of the crop; at most those of the image."""

    def __post_init__(self) -> None:
        if not self.shortest or not self.crop_shortest:
            raise ValueError("shortest and crop_shortest need at least one length")
        if self.crop_sides[0] > self.crop_sides[1]:
            raise ValueError(f"crop_sides {list(self.crop_sides)} has its least first")


@dataclass
class AugmentConfig(Settings):
    """Probabilities are per sample; everything is off by default."""

    flip: Share = 0.0
    """Probability of mirroring the picture, with "left" and "right" swapped in the phrases."""
    color: Share = 0.0
    """Strength of random brightness, contrast and saturation (0.2 = by up to 20 %); hues stay, for words name them."""
    crop: Share = 0.0
    """Probability of a random crop that keeps every box whole."""
    resize: ResizeConfig | None = None
    """Random sizes for models that take images of any size: {} for the published ones, null for none."""

    def build(self) -> Augment | None:
        return Augment(self) if any((self.flip, self.color, self.crop, self.resize)) else None


_ADVERB = r"(?<!the )(?<!on )(?<!far )\bright(?= (?:next to|behind|above|below|beside|under|in front|before|after)\b)"
_SIDE = r"\b(?P<side>left|right)(?=(?:most|hand|side)?\b)"
_SIDE_OR_ADVERB = re.compile(f"{_ADVERB}|{_SIDE}", re.IGNORECASE)  # "right behind him" is no side, "on the right" is


def swap_sides(phrase: str) -> str:
    """The phrase as it reads in the mirror: "man left of the rightmost car" -> "man right of the leftmost car"."""

    def other(match: re.Match[str]) -> str:
        side = match["side"]
        if side is None:
            return match.group()
        swapped = "right" if side.lower() == "left" else "left"
        return swapped.upper() if side.isupper() else swapped.capitalize() if side[0].isupper() else swapped

    return _SIDE_OR_ADVERB.sub(other, phrase)


class Augment:
    """Sample -> Sample; the same seed gives the same picture."""

    def __init__(self, config: AugmentConfig):
        import albumentations as A

        self.config = config
        self.mirror = _with_boxes(A.HorizontalFlip(p=1))
        self.crop = _with_boxes(A.BBoxSafeRandomCrop(p=1))
        jitter = (1 - config.color, 1 + config.color)
        self.color = A.ColorJitter(jitter, jitter, jitter, hue=(0, 0), p=1)

    def __call__(self, sample: Sample, seed: tuple[int, int, int]) -> Sample:
        random = np.random.default_rng(seed)
        flip, crop = random.random(2) < (self.config.flip, self.config.crop)
        self.crop.set_random_seed(int(random.integers(2**31)))
        self.color.set_random_seed(int(random.integers(2**31)))
        if flip:
            sample = _moved(self.mirror, sample)
            sample = replace(sample, phrases=tuple(map(swap_sides, sample.phrases)))
        if crop:
            sample = _moved(self.crop, sample)
        if self.config.resize:
            sample = self._resized(sample, self.config.resize, random)
        if self.config.color:
            sample = replace(sample, image=self.color(image=sample.image)["image"])
        return sample

    @staticmethod
    def _resized(sample: Sample, config: ResizeConfig, random: np.random.Generator) -> Sample:
        """Crop in the pixels of the source, and leave the resizing to the collator.

        Published recipes resize, crop and resize again, for the same region and size; one step blurs less, and the
        collator resizes as it does for evaluation.
        """
        import albumentations as A

        if random.random() < config.crop:
            height, width = sample.image.shape[:2]
            shrink = min(height, width) / random.choice(config.crop_shortest)
            low, high = config.crop_sides
            sides = np.round(random.integers(low, high + 1, size=2) * shrink).astype(int)  # width, height
            crop_width, crop_height = np.clip(sides, 1, (width, height)).tolist()
            left = int(random.integers(width - crop_width + 1))
            top = int(random.integers(height - crop_height + 1))
            sample = _moved(_with_boxes(A.Crop(left, top, left + crop_width, top + crop_height, p=1)), sample)
        return replace(sample, shortest=int(random.choice(config.shortest)))


def _with_boxes(transform: A.BasicTransform) -> A.Compose:
    """A transform that moves boxes as well, and loses those of which nothing is left."""
    import albumentations as A

    boxes = A.BboxParams(
        format="pascal_voc", label_fields=["numbers"], min_width=MIN_VISIBLE, min_height=MIN_VISIBLE, clip=True
    )
    return A.Compose([transform], bbox_params=boxes)


def _moved(transform: A.Compose, sample: Sample) -> Sample:
    """The sample after a geometric transform; annotated areas belong to the old picture and go."""
    result = transform(image=sample.image, bboxes=sample.boxes, numbers=np.arange(len(sample.boxes)))
    kept = np.asarray(result["numbers"], dtype=np.int64)  # [N] which of the old boxes are left
    return replace(
        sample,
        image=result["image"],
        boxes=np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4),
        phrase_ids=sample.phrase_ids[kept],
        crowd=None if sample.crowd is None else sample.crowd[kept],
        areas=None,
    )

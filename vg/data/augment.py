"""Augmentation that keeps words true: a mirrored picture swaps left and right in its phrases."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from vg.types import Sample, Strict

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no look-up on the network at import

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass
class AugmentConfig(Strict):
    """Probabilities are per sample; everything is off by default."""

    flip: Share = 0.0
    """Probability of mirroring the picture, with "left" and "right" swapped in the phrases."""
    color: Share = 0.0
    """Strength of random brightness, contrast and saturation (0.2 = by up to 20 %); hues stay, for words name them."""
    crop: Share = 0.0
    """Probability of a random crop that keeps every box whole."""

    def build(self) -> Augment | None:
        return Augment(self) if any((self.flip, self.color, self.crop)) else None


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

        def compose(transforms: list[A.BasicTransform]) -> A.Compose:
            return A.Compose(transforms, bbox_params=A.BboxParams(format="pascal_voc", label_fields=["phrase_ids"]))

        self.config = config
        self.mirror = compose([A.HorizontalFlip(p=1)])
        self.crop = compose([A.BBoxSafeRandomCrop(p=1)])
        jitter = (1 - config.color, 1 + config.color)
        self.color = A.ColorJitter(jitter, jitter, jitter, hue=(0, 0), p=1)

    def __call__(self, sample: Sample, seed: tuple[int, int, int]) -> Sample:
        random = np.random.default_rng(seed)
        flip, crop = random.random(2) < (self.config.flip, self.config.crop)
        self.crop.set_random_seed(int(random.integers(2**31)))
        self.color.set_random_seed(int(random.integers(2**31)))
        if flip:
            sample = self._move(self.mirror, sample)
            sample = replace(sample, phrases=tuple(map(swap_sides, sample.phrases)))
        if crop:
            sample = self._move(self.crop, sample)
        if self.config.color:
            sample = replace(sample, image=self.color(image=sample.image)["image"])
        return sample

    @staticmethod
    def _move(transform: object, sample: Sample) -> Sample:
        result = transform(image=sample.image, bboxes=sample.boxes, phrase_ids=sample.phrase_ids)  # type: ignore[operator]
        return replace(
            sample,
            image=result["image"],
            boxes=np.asarray(result["bboxes"], dtype=np.float32).reshape(-1, 4),
            phrase_ids=np.asarray(result["phrase_ids"], dtype=np.int64),
        )

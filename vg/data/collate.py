"""From samples to the batch a model asked for: resize, normalise, tokenise, and boxes in the spelling of the models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vg import boxes as box_ops
from vg.data.features import FeatureSample, collate_features
from vg.data.prompt import Expressions, Prompts, prompt_targets
from vg.types import Batch, ImageSpec, Sample, Target, Text, TextSpec

logger = logging.getLogger(__name__)


class Collator:
    """Makes batches as an image and a text specification describe them.

    Args:
        one_prompt: for training: what one prompt cannot hold of a sample's phrases is left out together with its boxes,
            phrases without boxes first. Otherwise such a sample gets several prompts.

    Raises:
        ConfigError: the tokenizer cannot make what the text specification asks for.
    """

    def __init__(self, image_spec: ImageSpec, text_spec: TextSpec, one_prompt: bool = False):
        self.image_spec = image_spec
        self.texts = Prompts(text_spec, one_prompt) if text_spec.delimiters else Expressions(text_spec)
        self.mean = torch.tensor(image_spec.mean).view(3, 1, 1) * 255
        self.std = torch.tensor(image_spec.std).view(3, 1, 1) * 255
        # Shared memory: the first worker of a DataLoader that leaves out boxes says so, the others are silent.
        self._said = torch.zeros(1, dtype=torch.bool).share_memory_()

    def __call__(self, samples: Sequence[Sample] | Sequence[FeatureSample]) -> Batch:
        """Raises DataError that names the sample: its phrases cannot be what the model is asked."""
        if isinstance(samples[0], FeatureSample):
            return collate_features(cast(Sequence[FeatureSample], samples))
        return self._pixels(cast(Sequence[Sample], samples))

    def _pixels(self, samples: Sequence[Sample]) -> Batch:
        text = self.texts(samples)
        images, sizes = self.images(samples)
        targets = [_target(sample, self._asked(sample, text, i)) for i, sample in enumerate(samples)]
        return Batch(images, sizes, text, targets, prompt_targets(text, targets))

    def images(self, samples: Sequence[Sample]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """The pictures [B, 3, H, W] as the model takes them, and the (height, width) of each without padding."""
        sizes = tuple(self._size(sample) for sample in samples)
        height, width = np.max(sizes, axis=0).tolist()
        images = torch.zeros(len(samples), 3, height, width)
        for image, sample, size in zip(images, samples, sizes, strict=True):
            pixels = torch.tensor(_resized(sample.image, size)).permute(2, 0, 1)  # [3, h, w] uint8
            image[:, : size[0], : size[1]].copy_(pixels).sub_(self.mean).div_(self.std)
        return images, sizes

    def _size(self, sample: Sample) -> tuple[int, int]:
        height, width = sample.image.shape[:2]
        return self.image_spec.resized(height, width, sample.shortest)

    def _asked(self, sample: Sample, text: Text, image_id: int) -> np.ndarray:
        """Which boxes the model is asked for: [N] bool, False where the phrase found no place in the text."""
        placed = text.phrase_tokens[text.image_ids == image_id].any(dim=2).any(dim=0)  # [P]
        asked: np.ndarray = placed.numpy()[sample.phrase_ids]
        if not asked.all() and not self._said:
            self._said[0] = True
            logger.warning(
                "%s: %d of %d boxes are left out, for their phrases have no place in the prompt; raise "
                "model.max_tokens or give fewer phrases (this is said only once)",
                sample.id,
                (~asked).sum(),
                len(asked),
            )
        return asked


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8 -> the same with this (height, width), as PIL does it: other libraries give other pixels."""
    if image.shape[:2] == size:
        return image
    return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def _target(sample: Sample, asked: np.ndarray) -> Target:
    """The target with those boxes that are asked for, [N] bool."""

    def chosen(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values[asked], dtype=dtype)

    size = (sample.image.shape[0], sample.image.shape[1])
    return Target(
        id=sample.id,
        size=size,
        phrases=sample.phrases,
        boxes=box_ops.from_pixels(chosen(sample.boxes, torch.float32), size),
        phrase_ids=chosen(sample.phrase_ids, torch.long),
        expression_type=sample.expression_type,
        crowd=None if sample.crowd is None else chosen(sample.crowd, torch.bool),
        areas=None if sample.areas is None else chosen(sample.areas, torch.float32),
    )

"""From samples to the batch a model asked for: resize, normalise, tokenise, and boxes in the spelling of the models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vg import boxes as box_ops
from vg.data.source import DataError
from vg.types import Batch, ImageSpec, Sample, Target, Text, TextSpec


class Collator:
    """Makes batches of one expression per image, as an image and a text specification describe them."""

    def __init__(self, image_spec: ImageSpec, text_spec: TextSpec):
        self.image_spec = image_spec
        self.text_spec = text_spec
        self.mean = torch.tensor(image_spec.mean).view(3, 1, 1) * 255
        self.std = torch.tensor(image_spec.std).view(3, 1, 1) * 255

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        images = torch.stack([self._resize(sample.image) for sample in samples])  # [B, 3, H, W] uint8
        return Batch(
            images=(images - self.mean) / self.std,
            sizes=tuple((images.shape[-2], images.shape[-1]) for _ in samples),
            text=self._tokenize(samples),
            targets=[self._target(sample) for sample in samples],
        )

    def _resize(self, image: np.ndarray) -> Tensor:
        height, width = self.image_spec.resized(*image.shape[:2])
        if image.shape[:2] != (height, width):
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        return torch.tensor(image).permute(2, 0, 1)

    def _tokenize(self, samples: Sequence[Sample]) -> Text:
        for sample in samples:
            if len(sample.phrases) != 1:
                raise DataError(f"{sample.id} has {len(sample.phrases)} phrases, this model takes one expression")
        tokens = self.text_spec.tokenizer([sample.phrases[0] for sample in samples], padding=True, return_tensors="pt")
        token_ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()  # [B, T]
        for sample, length in zip(samples, mask.sum(dim=1).tolist(), strict=True):
            if length > self.text_spec.max_tokens:
                raise DataError(
                    f"{sample.id}: the expression has {length} tokens, the model takes {self.text_spec.max_tokens} "
                    f"(raise model.max_tokens): {sample.phrases[0][:80]!r}"
                )
        return Text(token_ids, mask, mask.unsqueeze(1), torch.arange(len(samples)))

    @staticmethod
    def _target(sample: Sample) -> Target:
        size = (sample.image.shape[0], sample.image.shape[1])
        return Target(
            id=sample.id,
            size=size,
            phrases=sample.phrases,
            boxes=box_ops.from_pixels(torch.as_tensor(sample.boxes, dtype=torch.float32), size),
            phrase_ids=torch.as_tensor(sample.phrase_ids, dtype=torch.long),
            kind=sample.kind,
        )

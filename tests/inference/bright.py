"""A model that finds bright rectangles on black, as far as they are visible in the resized image."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import find_objects, label
from torch import Tensor
from transformers import BertTokenizer

import vg
from vg.models.base import GroundingModel
from vg.types import Batch, FittedImage, Prediction, Target, TextSpec

VOCABULARY = Path(vg.__file__).parent / "models/small_vocabulary.txt"


class Output(NamedTuple):
    images: Tensor


class Bright(GroundingModel):
    """The score of a box is its mean brightness; every phrase has the same boxes."""

    text_spec = TextSpec(BertTokenizer(vocab=str(VOCABULARY)), 64, (".", "?"))
    image_spec = FittedImage(200, 200)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.num_images = 0

    def load_tokenizer(self, folder: str) -> None: ...

    def forward(self, batch: Batch) -> Output:
        self.num_images += len(batch.images)
        return Output(batch.images)

    def loss(self, output: Output, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    def batch_weight(self, batch: Batch) -> int:
        raise NotImplementedError

    def predict(self, output: Output, batch: Batch) -> list[Prediction]:
        return [self._found(*item) for item in zip(output.images, batch.sizes, batch.targets, strict=True)]

    def _found(self, image: Tensor, size: tuple[int, int], target: Target) -> Prediction:
        mean, std = self.image_spec.mean[0], self.image_spec.std[0]
        pixels = (image[0, : size[0], : size[1]] * std + mean).numpy()
        scale = np.array(target.size) / size
        boxes, scores = [], []
        for rows, columns in find_objects(label(pixels > 0.25)[0]):
            corners = np.array([[rows.start, columns.start], [rows.stop, columns.stop]]) * scale
            boxes.append(corners[:, ::-1].flatten().tolist())
            scores.append(float(pixels[rows, columns].mean()))
        order = np.argsort(scores)[::-1]
        count = len(target.phrases)
        return Prediction(
            target.id,
            torch.tensor(boxes).reshape(-1, 4)[order.copy()].repeat_interleave(count, dim=0),
            torch.tensor(scores)[order.copy()].repeat_interleave(count),
            torch.arange(count).repeat(len(boxes)),
            target.phrases,
        )

"""Referring expression comprehension: vision encoder + text encoder + head = one box for one expression."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from transformers import AutoTokenizer

from vg import boxes as box_ops
from vg.models.base import GroundingModel
from vg.models.encoders import load_tokenizer
from vg.models.rec.config import RecConfig
from vg.models.rec.encoders import TextEncoder, VisionEncoder
from vg.models.rec.heads import DenseOutput, PooledOutput
from vg.types import Batch, ImageSpec, Prediction, StretchedImage, TextSpec


class RecModel(GroundingModel):
    def __init__(self, config: RecConfig, pretrained: bool = True):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision, pretrained)
        self.text = TextEncoder(config.text, pretrained)
        self.head = config.head.build(self.vision.width, self.text.width)
        encoders = {"vision": config.vision, "text": config.text}
        self.external = tuple(name for name, encoder in encoders.items() if encoder.frozen and encoder.id)

    @property
    def image_spec(self) -> ImageSpec:
        return StretchedImage(self.config.image_size, self.config.image_size)

    @cached_property
    def text_spec(self) -> TextSpec:
        return TextSpec(load_tokenizer(self.config.text), self.config.max_tokens)

    def load_tokenizer(self, folder: str) -> None:
        self.text_spec = TextSpec(AutoTokenizer.from_pretrained(folder), self.config.max_tokens)

    def forward(self, batch: Batch) -> PooledOutput | DenseOutput:
        image, grid = self.vision(batch.images)  # [B, R + S, D]
        text = self.text(batch.text)  # [B, T, D]
        return self.head(image, grid, text, batch.text.mask)

    def loss(self, output: PooledOutput | DenseOutput, batch: Batch) -> dict[str, Tensor]:
        return self.head.loss(output, torch.cat([target.boxes for target in batch.targets]))  # type: ignore[arg-type]

    def batch_weight(self, batch: Batch) -> int:
        return len(batch)

    def predict(self, output: PooledOutput | DenseOutput, batch: Batch) -> list[Prediction]:
        boxes, scores = self.head.rank(output)  # type: ignore[arg-type]  # [B, K, 4], [B, K]
        return [
            Prediction(
                id=target.id,
                boxes=box_ops.to_pixels(sample_boxes, target.size),
                scores=sample_scores,
                phrase_ids=torch.zeros_like(sample_scores, dtype=torch.long),
                phrases=target.phrases,
            )
            for target, sample_boxes, sample_scores in zip(batch.targets, boxes, scores, strict=True)
        ]

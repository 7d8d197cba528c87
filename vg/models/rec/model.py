"""Referring expression comprehension: vision encoder + text encoder + head = one box for one expression."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from vg import boxes as box_ops
from vg.errors import ConfigError
from vg.models.base import EncodableModel
from vg.models.encoders import load_tokenizer, network_config, token_width, tokenizer_key, weights_key
from vg.models.rec.config import RecConfig
from vg.models.rec.encoders import TextEncoder, VisionEncoder
from vg.models.rec.heads import DenseOutput, PooledOutput
from vg.types import Batch, ImageSpec, LossName, Prediction, StretchedImage, Text, TextSpec


class RecModel(EncodableModel):
    """See RecConfig.build and RecConfig.build_without_encoders."""

    def __init__(self, config: RecConfig, pretrained: bool = True, encoders: bool = True):
        super().__init__()
        self.config = config
        if encoders:
            self.vision = VisionEncoder(config.vision, pretrained)
            self.text = TextEncoder(config.text, pretrained)
        else:
            self.feature_key()  # says what is not frozen
        self.head = config.head.build(*(token_width(network_config(each)) for each in (config.vision, config.text)))
        own = {"vision": config.vision, "text": config.text}
        self.external = tuple(name for name, encoder in own.items() if encoder.frozen and encoder.id)

    @property
    def image_spec(self) -> ImageSpec:
        return StretchedImage(self.config.image_size, self.config.image_size)

    @cached_property
    def text_spec(self) -> TextSpec:
        return TextSpec(load_tokenizer(self.config.text), self.config.max_tokens)

    def load_tokenizer(self, folder: str) -> None:
        self.text_spec = TextSpec(AutoTokenizer.from_pretrained(folder), self.config.max_tokens)

    def forward(self, batch: Batch) -> PooledOutput | DenseOutput:
        if batch.features is None:
            image, grid = self.vision(batch.images)  # [B, S, D] with the tokens that are not of the grid
            text = self.text(batch.text)  # [R, T, D]
        else:
            image, grid, text = batch.features.image.float(), batch.features.grid, batch.features.text.float()
        return self.head(image, grid, text, batch.text.mask, batch.text.image_ids if len(image) < len(text) else None)

    def feature_key(self) -> dict[str, Any]:
        return {
            "vision": weights_key("model.vision", self.config.vision),
            "text": weights_key("model.text", self.config.text) | {"tokenizer": tokenizer_key(self.config.text)},
        }

    def encode_images(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        return self.vision(images)

    def encode_text(self, text: Text) -> Tensor:
        return self.text(text)

    def loss(self, output: PooledOutput | DenseOutput, batch: Batch) -> dict[LossName, Tensor]:
        """Raises ConfigError that names the sample: it does not have exactly one box (`data.bad_samples` or not)."""
        for target in batch.targets:
            if len(target.boxes) != 1:
                raise ConfigError(
                    f"{target.id} has {len(target.boxes)} boxes, rec learns from expressions with one: train "
                    "model.name=grounding_dino on such data"
                )
        losses = self.head.loss(output, torch.cat([target.boxes for target in batch.targets]))  # type: ignore[arg-type]
        return {LossName(term): value for term, value in losses.items()}

    def batch_weight(self, batch: Batch) -> int:
        return len(batch)

    def predict(self, output: PooledOutput | DenseOutput, batch: Batch) -> list[Prediction]:
        boxes, scores = self.head.rank(output)  # type: ignore[arg-type]  # [R, K, 4], [R, K]
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

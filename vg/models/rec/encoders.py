"""Vision and text encoders: any transformers model, frozen or trained, pretrained or small and from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vg.models.rec.config import EncoderConfig, TextEncoderConfig
from vg.types import Text

SMALL_VOCABULARY = Path(__file__).parent / "small_vocabulary.txt"


class Encoder(nn.Module):
    """A transformers model that stays as it is while it is frozen: no gradients, always in evaluation mode."""

    def __init__(self, config: EncoderConfig, pretrained: bool):
        super().__init__()
        if config.architecture is not None:
            self.network = AutoModel.from_config(AutoConfig.for_model(**config.architecture))
        elif pretrained:
            self.network = AutoModel.from_pretrained(config.id, revision=config.revision)
        else:
            network_config = AutoConfig.from_pretrained(config.id, revision=config.revision)
            self.network = AutoModel.from_config(network_config)
        for name, parameter in self.network.named_parameters():
            if (
                "pooler." in name or "mask_token" in name
            ):  # no gradient reaches these; several processes would wait for it
                parameter.requires_grad_(False)
        self.frozen = config.frozen
        if self.frozen:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> Encoder:
        return super().train(mode and not self.frozen)

    @property
    def width(self) -> int:
        """D of the tokens."""
        config = self.network.config
        return config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size

    def run(self, **inputs: Any) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.network(**inputs).last_hidden_state


class VisionEncoder(Encoder):
    """Images [B, 3, H, W] -> tokens [B, R + S, D]: R prefix tokens (class, registers), then the S cells of the grid."""

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Returns the tokens and the grid (rows, columns) of the last S = rows x columns of them."""
        height, width = images.shape[-2:]
        features = self.run(pixel_values=images)
        if features.dim() == 4:  # a convolutional network: [B, D, rows, columns]
            return features.flatten(2).mT, (features.shape[2], features.shape[3])
        return features, (height // self.stride, width // self.stride)

    @property
    def stride(self) -> int:
        """Side of one cell of the grid in pixels."""
        config = self.network.config
        if hasattr(config, "patch_size"):
            return config.patch_size
        return 4 * 2 ** (len(config.hidden_sizes) - 1)  # ConvNeXt: a stem of 4, then halved by every further stage


class TextEncoder(Encoder):
    """Tokenised prompts -> tokens [B, T, D]."""

    def forward(self, text: Text) -> Tensor:
        return self.run(input_ids=text.token_ids, attention_mask=text.mask.long())


def load_tokenizer(config: TextEncoderConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a text encoder: the one named, that of the encoder's id, or the small built-in vocabulary."""
    place = config.tokenizer or config.id or str(SMALL_VOCABULARY)
    if place.endswith(".json"):
        return PreTrainedTokenizerFast(
            tokenizer_file=place, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
        )
    if place.endswith(".txt"):
        return BertTokenizer(vocab=place)
    return AutoTokenizer.from_pretrained(place, revision=config.revision if place == config.id else None)

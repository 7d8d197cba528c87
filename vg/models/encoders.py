"""Encoders of transformers: any model, frozen or trained, pretrained or small and from scratch; and tokenizers."""

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

from vg.models.encoder_config import EncoderConfig, TextEncoderConfig
from vg.types import ConfigError

SMALL_VOCABULARY = Path(__file__).parent / "small_vocabulary.txt"


class Encoder(nn.Module):
    """A transformers model that stays as it is while it is frozen: no gradients, always in evaluation mode.

    Args:
        pretrained: load the weights of `config.id`, if there is one; else they are random.
        options: for the constructor of the network, such as add_pooling_layer=False.
    """

    def __init__(self, config: EncoderConfig, pretrained: bool, **options: Any):
        super().__init__()
        if config.architecture is not None:
            self.network = AutoModel.from_config(AutoConfig.for_model(**config.architecture), **options)
        elif pretrained:
            self.network = AutoModel.from_pretrained(config.id, revision=config.revision, **options)
        else:
            network_config = AutoConfig.from_pretrained(config.id, revision=config.revision)
            self.network = AutoModel.from_config(network_config, **options)
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


def load_tokenizer(config: TextEncoderConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a text encoder: the one named, that of the encoder's id, or the small built-in vocabulary.

    Raises:
        ConfigError: there is none at that place.
    """
    place = config.tokenizer or config.id or str(SMALL_VOCABULARY)
    try:
        if place.endswith(".json"):
            return PreTrainedTokenizerFast(
                tokenizer_file=place, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
            )
        if place.endswith(".txt"):
            return BertTokenizer(vocab=place)
        return AutoTokenizer.from_pretrained(place, revision=config.revision if place == config.id else None)
    except Exception as error:  # no such file or id, no network, no vocabulary in it: each has a class of its own
        raise ConfigError(
            f"no tokenizer can be loaded from {place}: set model.text.tokenizer to a folder with one, a vocab.txt, "
            f"a tokenizer.json or a Hub id\n({error})"
        ) from error

"""Encoders of transformers: any model, frozen or trained, pretrained or small and from scratch; and tokenizers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vg.errors import ConfigError
from vg.models.encoder_config import EncoderConfig, TextEncoderConfig

SMALL_VOCABULARY = Path(__file__).parent / "small_vocabulary.txt"


class Encoder(nn.Module):
    """A transformers model that stays as it is while it is frozen: no gradients, always in evaluation mode.

    Args:
        pretrained: load the weights of `config.id`, if there is one; else they are random.
        options: for the constructor of the network, such as add_pooling_layer=False.
    """

    def __init__(self, config: EncoderConfig, pretrained: bool, **options: Any):
        super().__init__()
        if config.architecture is None and pretrained:
            self.network = AutoModel.from_pretrained(config.id, revision=config.revision, **options)
        else:
            self.network = AutoModel.from_config(network_config(config), **options)
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
        return token_width(self.network.config)

    def run(self, **inputs: Any) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.network(**inputs).last_hidden_state


def enable_checkpointing(network: PreTrainedModel) -> None:
    """Compute activations again in the backward pass instead of keeping them."""
    renamed = getattr(network, "activation_checkpointing_enable", None)  # in transformers 5.23
    (renamed or network.gradient_checkpointing_enable)()


def network_config(config: EncoderConfig) -> PretrainedConfig:
    """The settings of the network itself, without its weights."""
    if config.architecture is not None:
        return AutoConfig.for_model(**config.architecture)
    return AutoConfig.from_pretrained(config.id, revision=config.revision)


def token_width(config: PretrainedConfig) -> int:
    """D of the tokens that such a network gives."""
    return config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size


def weights_key(name: str, config: EncoderConfig) -> dict[str, str]:
    """What tells the weights of a frozen encoder from all others, without loading them.

    Args:
        name: what errors call it, such as model.vision.

    Raises:
        ConfigError: the encoder is trained, or its weights are random.
    """
    if not config.frozen:
        raise ConfigError(f"{name}.frozen is false: only what frozen encoders say can be cached; set data.cache=null")
    if config.id is None:
        raise ConfigError(f"{name} has no id: its random weights are others in every run; set data.cache=null")
    return {"id": config.id, "revision": str(config.revision), "weights": _files_key(config.id, config.revision)}


def tokenizer_key(config: TextEncoderConfig) -> str:
    """The same for the tokenizer of a text encoder."""
    place = config.tokenizer or config.id or str(SMALL_VOCABULARY)
    return _files_key(place, config.revision if place == config.id else None)


def _files_key(place: str, revision: str | None) -> str:
    """A digest of a file or of a folder's files; for a Hub id the commit, which stands for its files."""
    path = Path(place)
    if not path.exists():
        return Path(hf_hub_download(place, "config.json", revision=revision)).parent.name
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix in (".safetensors", ".bin", ".json", ".txt", ".model"):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


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

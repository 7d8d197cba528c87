"""Encoders from transformers, frozen or trained, pretrained or from scratch, and their tokenizers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
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
from vg.hub import loading
from vg.models.settings import EncoderConfig, TextEncoderConfig

SMALL_VOCABULARY = Path(__file__).parent / "small_vocabulary.txt"


class Encoder(nn.Module):
    """A transformers model; while it is frozen it computes no gradients and stays in evaluation mode.

    Args:
        pretrained: load the weights of `config.id`, if there is one; otherwise they are random.
        lazy: load them when `network` is first used, so that a model that reads cached features never does.
        options: for the constructor of the network, such as add_pooling_layer=False.

    Raises:
        ConfigError: the id does not exist or cannot be accessed.
    """

    network: PreTrainedModel

    def __init__(self, config: EncoderConfig, pretrained: bool, lazy: bool = False, **options: Any):
        super().__init__()
        self.config = config
        self.options = options
        self.frozen = config.frozen
        self.network_config = network_config(config)
        if lazy:  # the buffer moves with the model: it has the device and dtype that the network gets
            self.register_buffer("placement", torch.empty(0), persistent=False)
        else:
            self.network = self._build(pretrained)
        if self.frozen:
            self.eval()

    def __getattr__(self, name: str) -> Any:
        if name == "network" and not self.is_loaded:
            # Inference tensors could not be used in training, and a resumed run must draw the same random numbers.
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                self.network = self._build(pretrained=True).to(self.placement)
        return super().__getattr__(name)

    @property
    def is_loaded(self) -> bool:
        return "network" in self._modules

    def _build(self, pretrained: bool) -> PreTrainedModel:
        if self.config.id and pretrained:
            with loading(self.config.id, _setting(self.config), ConfigError):
                network = AutoModel.from_pretrained(self.config.id, revision=self.config.revision, **self.options)
        else:
            with _building(self.config):
                network = AutoModel.from_config(self.network_config, **self.options)
        for name, parameter in network.named_parameters():
            # These get no gradient, so in distributed training the other processes would wait for it.
            if self.frozen or "pooler." in name or "mask_token" in name:
                parameter.requires_grad_(False)
        return network.eval() if self.frozen else network

    def train(self, mode: bool = True) -> Encoder:
        return super().train(mode and not self.frozen)

    @property
    def width(self) -> int:
        """Channels D of the tokens."""
        config = self.network_config
        return config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size

    def num_unloaded_parameters(self) -> int:
        """Count the parameters that `parameters()` lacks because the network is not loaded yet."""
        if self.is_loaded:
            return 0
        with torch.device("meta"):
            network = AutoModel.from_config(self.network_config, **self.options)
        return sum(parameter.numel() for parameter in network.parameters())

    def run(self, **inputs: Any) -> Tensor:
        """Return the last hidden state for keyword arguments of the network."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.network(**inputs).last_hidden_state


def enable_checkpointing(network: PreTrainedModel) -> None:
    """Recompute activations in the backward pass instead of storing them."""
    renamed = getattr(network, "activation_checkpointing_enable", None)  # in transformers 5.23
    (renamed or network.gradient_checkpointing_enable)()


def network_config(config: EncoderConfig) -> PretrainedConfig:
    """Return the transformers configuration of an encoder; raises ConfigError if its id cannot be read."""
    if config.architecture is not None:
        with _building(config):
            return AutoConfig.for_model(**config.architecture)
    with loading(str(config.id), _setting(config), ConfigError):
        return AutoConfig.from_pretrained(config.id, revision=config.revision)


@contextmanager
def _building(config: EncoderConfig) -> Iterator[None]:
    """Raise ConfigError for values that transformers cannot build a network from."""
    try:
        yield
    except Exception as error:  # each network checks its values in its own way, or not at all
        reason = str(error).partition(" Should contain one of")[0]
        setting = _setting(config).removesuffix("id") + "architecture"
        raise ConfigError(f"{setting}: no network can be built from {config.architecture}: {reason}") from error


def _setting(config: EncoderConfig) -> str:
    """Key of the id of an encoder."""
    return "model.text.id" if isinstance(config, TextEncoderConfig) else "model.vision.id"


def weights_key(name: str, config: EncoderConfig) -> dict[str, str]:
    """Return JSON values that identify the weights of a frozen encoder, without loading them.

    Raises:
        ConfigError: the encoder is trained, or its weights are random; the message starts with `name`.
    """
    if not config.frozen:
        raise ConfigError(f"{name}.frozen is false, but only frozen encoders can be cached; set data.cache=null")
    if config.id is None:
        raise ConfigError(f"{name} has no id: its random weights differ in every run; set data.cache=null")
    return {
        "id": config.id,
        "revision": str(config.revision),
        "weights": _files_key(config.id, config.revision, f"{name}.id"),
    }


def tokenizer_key(config: TextEncoderConfig) -> str:
    """Return a string that identifies the tokenizer of a text encoder."""
    return _files_key(*_tokenizer_source(config), "model.text.tokenizer")


def _tokenizer_source(config: TextEncoderConfig) -> tuple[str, str | None]:
    """Location and Hub revision of the tokenizer: configured, that of the encoder, or the small built-in vocabulary."""
    location = config.tokenizer or config.id or str(SMALL_VOCABULARY)
    return location, config.revision if location == config.id else None


def _files_key(location: str, revision: str | None, setting: str) -> str:
    """Return a digest of a file or of the files of a folder; for a Hub id its commit, which determines the files."""
    path = Path(location)
    if not path.exists():
        with loading(location, setting, ConfigError):
            return Path(hf_hub_download(location, "config.json", revision=revision)).parent.name
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix in (".safetensors", ".bin", ".json", ".txt", ".model"):
            digest.update(file.name.encode())
            with file.open("rb") as stream:  # in blocks: a file may be larger than the memory
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def load_tokenizer(config: TextEncoderConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a text encoder; raises ConfigError if it is missing or unreadable."""
    location, revision = _tokenizer_source(config)
    setting = "model.text.id" if location == config.id else "model.text.tokenizer"
    with loading(location, setting, ConfigError):
        if location.endswith(".json"):
            return PreTrainedTokenizerFast(
                tokenizer_file=location, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
            )
        if location.endswith(".txt"):
            return BertTokenizer(vocab=location)
        return AutoTokenizer.from_pretrained(location, revision=revision)

"""Encoders from transformers, frozen or trained, pretrained or from scratch, and their tokenizers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    BertTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vg.errors import ConfigError
from vg.hub import loading
from vg.models.encoder_types import SIGLIP_TEXT, TEXT_TYPES, UNUSED, VISION_TYPES
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
            network = self._load()
        else:
            with _building(self.config):
                network = self._auto.from_config(self.network_config, trust_remote_code=False, **self.options)
        for name, parameter in network.named_parameters():
            # These get no gradient, so in distributed training the other processes would wait for it.
            if self.frozen or self._is_unused(name):
                parameter.requires_grad_(False)
        return network.eval() if self.frozen else network

    def _load(self) -> PreTrainedModel:
        config = self.config
        with loading(str(config.id), f"{config.key}.id", ConfigError):
            network, info = self._auto.from_pretrained(
                config.id,
                config=self.network_config,
                revision=config.revision,
                output_loading_info=True,
                trust_remote_code=False,
                **self.options,
            )
        if missing := [name for name in sorted(info["missing_keys"]) if not self._is_unused(name)]:
            raise ConfigError(
                f"{config.id} ({config.key}.id) lacks {len(missing)} weights, such as {missing[0]}; "
                "use a complete copy of the encoder"
            )
        return network

    @property
    def _auto(self) -> type[AutoModel]:
        """The class that builds the network; that of T5 has a decoder, too, and SigLIP is in neither of them."""
        in_neither = self.network_config.model_type in (*SIGLIP_TEXT, "t5")
        return AutoModelForTextEncoding if in_neither else AutoModel

    def _is_unused(self, name: str) -> bool:
        unused = UNUSED.get(self.network_config.model_type, "")
        return "pooler." in name or "mask_token" in name or bool(re.fullmatch(unused, name))

    def train(self, mode: bool = True) -> Encoder:
        return super().train(mode and not self.frozen)

    @property
    def width(self) -> int:
        """Channels D of the tokens."""
        config = self.network_config
        return config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size

    @property
    def positions(self) -> int | None:
        """Number of tokens for which a text encoder has position embeddings; None if any number will do."""
        config = self.network_config
        if config.model_type in ("modernbert", "t5") or not getattr(config, "position_biased_input", True):
            return None  # relative or rotary
        # These count positions from the one after that of padding, which is 1 in MPNet whatever its settings say.
        padding = {"mpnet": 1, "roberta": config.pad_token_id, "xlm-roberta": config.pad_token_id}
        return int(config.max_position_embeddings) - (padding.get(config.model_type, -1) + 1)

    def num_unloaded_parameters(self) -> int:
        """Count the parameters that `parameters()` lacks because the network is not loaded yet."""
        if self.is_loaded:
            return 0
        with torch.device("meta"):
            network = self._auto.from_config(self.network_config, trust_remote_code=False, **self.options)
        return sum(parameter.numel() for parameter in network.parameters())

    def run(self, **inputs: Any) -> Tensor:
        """Return the last hidden state for keyword arguments of the network."""
        return self.outputs(**inputs).last_hidden_state

    def outputs(self, **inputs: Any) -> Any:
        """Return all outputs for keyword arguments of the network."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.network(**inputs)


def layers_of(network: nn.Module) -> list[nn.Module]:
    """Return the layers, or stages, of a transformers model: the modules that it lists as not to be split."""
    names = getattr(network, "_no_split_modules", None) or ()
    return [module for module in network.modules() if type(module).__name__ in names]


def enable_checkpointing(network: PreTrainedModel) -> None:
    """Recompute activations in the backward pass instead of storing them."""
    renamed = getattr(network, "activation_checkpointing_enable", None)  # in transformers 5.23
    (renamed or network.gradient_checkpointing_enable)()


def network_config(config: EncoderConfig) -> PretrainedConfig:
    """Return the transformers configuration of an encoder, which may be one of the two in a model such as CLIP.

    Raises:
        ConfigError: the id cannot be read, or is of a type that is not in VISION_TYPES or TEXT_TYPES.
    """
    is_text = isinstance(config, TextEncoderConfig)
    found = _read_config(config)
    found = getattr(found, "text_config" if is_text else "vision_config", found)
    if found.model_type not in (known := TEXT_TYPES if is_text else VISION_TYPES):
        raise ConfigError(
            f"{config.key}: {config.id or 'the architecture'} is of the type {found.model_type}, which is not "
            f"supported; choose one of {', '.join(known)}"
        )
    return found


def _read_config(config: EncoderConfig) -> PretrainedConfig:
    if config.architecture is not None:
        with _building(config):
            return AutoConfig.for_model(**config.architecture)
    with loading(str(config.id), f"{config.key}.id", ConfigError):
        return AutoConfig.from_pretrained(config.id, revision=config.revision, trust_remote_code=False)


@contextmanager
def _building(config: EncoderConfig) -> Iterator[None]:
    """Raise ConfigError for values that transformers cannot build a network from."""
    try:
        yield
    except Exception as error:  # each network checks its values in its own way, or not at all
        reason = str(error).partition(" Should contain one of")[0]
        raise ConfigError(
            f"{config.key}.architecture: no network can be built from {config.architecture}: {reason}"
        ) from error


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


def encoder_weights(config: EncoderConfig) -> str | None:
    """Return a digest of the weight files of an encoder, for a Hub id its commit; None if they cannot be read."""
    try:
        return _files_key(str(config.id), config.revision, f"{config.key}.id", (".safetensors", ".bin"))
    except ConfigError:
        return None


def tokenizer_key(config: TextEncoderConfig) -> str:
    """Return a string that identifies the tokenizer of a text encoder."""
    return _files_key(*_tokenizer_source(config), f"{config.key}.tokenizer")


def _tokenizer_source(config: TextEncoderConfig) -> tuple[str, str | None]:
    """Location and Hub revision of the tokenizer: configured, that of the encoder, or the small built-in vocabulary."""
    location = config.tokenizer or config.id or str(SMALL_VOCABULARY)
    return location, config.revision if location == config.id else None


def _files_key(
    location: str,
    revision: str | None,
    setting: str,
    suffixes: tuple[str, ...] = (".safetensors", ".bin", ".json", ".txt", ".model"),
) -> str:
    """Return a digest of a file or of the files of a folder; for a Hub id its commit, which determines the files."""
    path = Path(location)
    if not path.exists():
        with loading(location, setting, ConfigError):
            return Path(hf_hub_download(location, "config.json", revision=revision)).parent.name
    files = [file for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.suffix in suffixes]
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Return a digest of names and contents; sizes and times only make the function read a changed file again."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:  # in blocks: a file may be larger than the memory
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def load_tokenizer(config: TextEncoderConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a text encoder; raises ConfigError if it is missing or unreadable."""
    location, revision = _tokenizer_source(config)
    return read_tokenizer(location, f"{config.key}.{'id' if location == config.id else 'tokenizer'}", revision)


def read_tokenizer(
    location: str, setting: str = "the tokenizer of the checkpoint", revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a folder, vocab.txt, tokenizer.json or Hub id; raises ConfigError if it is missing or unreadable.

    Args:
        setting: what names the location, for errors.
    """
    with loading(location, setting, ConfigError):
        if location.endswith(".json"):
            return PreTrainedTokenizerFast(
                tokenizer_file=location, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
            )
        if location.endswith(".txt"):
            return BertTokenizer(vocab=location)
        return AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)


def cached_token_counter(settings: TextEncoderConfig) -> Callable[[list[str]], list[int]] | None:
    """Count the tokens of phrases if the tokenizer is on this machine; otherwise None: the Hub is not contacted.

    Raises ConfigError if the tokenizer is unreadable, or missing where no Hub id has its name.
    """
    path = settings.tokenizer or settings.id
    if path is not None and not Path(path).exists() and not Path(path).is_absolute():
        cached = (try_to_load_from_cache(path, name) for name in ("tokenizer.json", "vocab.txt"))
        path = next((file for file in cached if isinstance(file, str)), None)
        if path is None:
            return None
    encode = partial(load_tokenizer(replace(settings, tokenizer=path)), add_special_tokens=False, verbose=False)
    return lambda phrases: [len(ids) for ids in encode(phrases)["input_ids"]] if phrases else []

"""Settings of models: encoders, and the base class of a family for the trainer, the commands and the checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vg.settings import Settings

if TYPE_CHECKING:  # keeps the configuration free of torch
    from typing_extensions import Self

    from vg.models.base import GroundingModel


TINY_BERT: dict[str, Any] = {  # text encoder of the `tiny()` presets, for vg's small vocabulary
    **{"model_type": "bert", "vocab_size": 400, "max_position_embeddings": 64},
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@dataclass
class EncoderConfig(Settings):
    """Source of an encoder: a Hub id or a local folder, or (with ``architecture``) random weights."""

    key: ClassVar[str] = "model.vision"  # where a configuration has these settings, for errors
    id: str | None = None
    """Hub id or local folder of a pretrained model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    architecture: dict[str, Any] | None = None
    """Arguments of the transformers configuration including `model_type`: random weights instead of those of `id`."""
    frozen: bool = True
    """Frozen encoders run in evaluation mode without gradients; in rec, one with an `id` is not saved with checkpoints
    and loads its weights when it is first used."""

    def __post_init__(self) -> None:
        if self.architecture is None:
            if self.id is None:
                raise ValueError("give `id` (pretrained weights) or `architecture` (random weights)")
            return
        if "model_type" not in self.architecture:
            raise ValueError("`architecture` needs `model_type`, for example dinov3_vit or bert")
        if self.id not in (None, type(self).id):
            raise ValueError("give `id` (pretrained weights) or `architecture` (random weights), not both")
        self.id = None


@dataclass
class TextEncoderConfig(EncoderConfig):
    key: ClassVar[str] = "model.text"
    tokenizer: str | None = None
    """Hub id, local folder, tokenizer.json or vocab.txt; by default that of `id`, or vg's own small vocabulary."""


@dataclass
class ExtraTextEncoderConfig(TextEncoderConfig):
    key: ClassVar[str] = "model.extra_text"


class ModelSettings(Settings, ABC):
    """Settings of a model family; a subclass is a dataclass with these fields and its own."""

    name: str
    """Selects the family in a configuration; a Literal with its only value as default."""
    text: TextEncoderConfig
    """The text encoder and its tokenizer."""
    max_tokens: int
    """Longest prompt in tokens, special tokens included."""

    @property
    def weights(self) -> str | None:
        """Checkpoint with the initial weights of the whole network, where a family accepts one."""
        return None

    @property
    def frozen_encoders(self) -> Mapping[str, EncoderConfig]:
        """Submodule name -> settings of the encoders that keep the pretrained weights of their id.

        These weights are not saved with a checkpoint, they are loaded at first use, and their output can be cached.
        """
        return {}

    def frozen_weights(self) -> dict[str, dict[str, str | None]]:
        """Identify the weights of `frozen_encoders`, which a checkpoint does not contain: id, and digest or commit."""
        from vg.models.encoders import encoder_weights

        return {name: {"id": x.id, "weights": encoder_weights(x)} for name, x in self.frozen_encoders.items()}

    @abstractmethod
    def build(self, pretrained: bool = True) -> GroundingModel:
        """Build the network.

        Args:
            pretrained: load the pretrained weights that the settings name; False initializes all weights randomly
                (a checkpoint is loaded next, or only shapes matter).

        Raises:
            ConfigError: an encoder does not exist or cannot be read.
        """

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """Return a preset that trains from scratch in seconds on one CPU core, for tests."""

    def rebuild(self) -> GroundingModel:
        """Build the network for a checkpoint of vg, which contains all weights but those of `frozen_encoders`."""
        return self.build(pretrained=bool(self.frozen_encoders))

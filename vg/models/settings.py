"""Base class of the settings of a model family: what the trainer, the commands and the checkpoints use of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vg.models.encoder_config import EncoderConfig, TextEncoderConfig
from vg.settings import Settings

if TYPE_CHECKING:  # keeps the configuration free of torch
    from typing_extensions import Self

    from vg.models.base import GroundingModel


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

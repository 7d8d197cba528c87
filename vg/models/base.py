"""What the trainer, the evaluation and the checkpoints know about a model - and all they know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vg.types import Batch, ImageSpec, LossName, Prediction, Text, TextSpec


class GroundingModel(nn.Module, ABC):
    """A network that describes its input, answers a batch, and knows how to be wrong about it.

    ``forward`` returns a NamedTuple: under mixed precision Accelerate brings these back to float32, and leaves other
    containers alone. ``loss`` and ``predict`` use no parameters, so that they are right outside of DDP's wrapper.
    """

    external: tuple[str, ...] = ()  # submodules whose weights live under an id of their own and are never saved

    @property
    @abstractmethod
    def image_spec(self) -> ImageSpec: ...

    @property
    @abstractmethod
    def text_spec(self) -> TextSpec: ...

    @abstractmethod
    def load_tokenizer(self, folder: str) -> None:
        """Take the tokenizer that was saved with a checkpoint, in place of the configured one."""

    @abstractmethod
    def forward(self, batch: Batch) -> Any: ...

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> dict[LossName, Tensor]:
        """Weighted terms, whose sum is the loss: scalars, each a sum over the batch by its weight (at least 1)."""

    @abstractmethod
    def batch_weight(self, batch: Batch) -> int:
        """What the loss is a mean over: how many samples, or boxes, there are in the batch.

        The trainer needs it to make one mean of many batches and processes.
        """

    @abstractmethod
    def predict(self, output: Any, batch: Batch) -> list[Prediction]:
        """Boxes in pixels of the original images, best first."""

    def own_state_dict(self) -> dict[str, Tensor]:
        """All weights but those of the external submodules."""
        return {key: value for key, value in self.state_dict().items() if not self._is_external(key)}

    def load_own_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Load what own_state_dict gave; raises ValueError that lists every missing, unexpected or misshapen weight."""
        own = self.own_state_dict()
        trouble = [f"missing: {key} {tuple(own[key].shape)}" for key in own.keys() - weights.keys()]
        trouble += [f"unexpected: {key} {tuple(weights[key].shape)}" for key in weights.keys() - own.keys()]
        for key in own.keys() & weights.keys():
            if own[key].shape != weights[key].shape:
                trouble.append(f"shape: {key} is {tuple(weights[key].shape)}, expected {tuple(own[key].shape)}")
        if trouble:
            raise ValueError("the weights do not fit the model:\n  " + "\n  ".join(sorted(trouble)))
        self.load_state_dict(weights, strict=False)

    def _is_external(self, key: str) -> bool:
        return any(key.startswith(f"{name}.") for name in self.external)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def num_parameters(self, trainable_only: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)


class EncodableModel(GroundingModel):
    """A model whose encoders, where they are frozen, can be run once for all: `forward` takes `batch.features`, too."""

    @abstractmethod
    def feature_key(self) -> dict[str, Any]:
        """What features depend on besides the data, for JSON; raises ConfigError where an encoder is not frozen."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, 3, H, W] -> tokens [B, S, D] and the grid (rows, columns) of the last of them."""

    @abstractmethod
    def encode_text(self, text: Text) -> Tensor:
        """Tokens [R, T, D]"""


@runtime_checkable
class EncodableModelConfig(Protocol):
    """Settings of such a model."""

    def build_without_encoders(self) -> EncodableModel:
        """The network for batches that have features; raises ConfigError where an encoder is not frozen."""
        ...

"""Base classes of the models: all that the trainer, the evaluation and the checkpoints use of a network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

from vg.errors import PredictionError
from vg.movable import Movable
from vg.types import Batch, EncodedBatch, Features, ImageSpec, LossName, Prediction, Text, TextSpec

_Movable = TypeVar("_Movable", bound=Movable)


class GroundingModel(nn.Module, ABC):
    """A network that specifies its input, computes its loss and turns its output into boxes.

    Example::

        collate = Collator(model.image_spec, model.text_spec)
        batch = collate(samples)  # images [B, 3, H, W], text [R, T], B targets
        output = model(batch)  # NamedTuple of the family
        loss = sum(model.loss(output, batch).values())  # scalar
        predictions = model.predict(output, batch)  # B predictions, boxes [K, 4] xyxy in pixels

    ``forward`` returns a NamedTuple: under mixed precision Accelerate converts its tensors back to float32, which it
    does not do for dataclasses. ``loss`` and ``predict`` use no parameters, so they may be called outside of DDP.
    """

    generalized = False  # whether one expression may have no box or several, as in data of that task
    classes: tuple[str, ...] = ()  # phrases that it was trained to find, if the data had classes; saved with it
    external: tuple[str, ...] = ()  # submodules whose pretrained weights are loaded from their ids and never saved

    @property
    @abstractmethod
    def image_spec(self) -> ImageSpec:
        """Resizing and normalization of the images: what the collator does to make `Batch.images` [B, 3, H, W]."""

    @property
    @abstractmethod
    def text_spec(self) -> TextSpec:
        """Tokenizer, token limit and phrase separators: how the collator makes `Batch.text`, [R, T] tokens.

        Without separators a sample is one expression (R = B); with them, a prompt lists any number of phrases.
        """

    @abstractmethod
    def load_tokenizer(self, folder: str) -> None:
        """Use the tokenizer that was saved with a checkpoint instead of the configured one."""

    def use_classes(self, number: int) -> None:
        """Adapt to the number of classes that every prompt of the training data has; before optimizers are made."""

    @abstractmethod
    def forward(self, batch: Batch) -> Any:
        """Run the network; returns a NamedTuple of tensors, whose boxes are cxcywh in 0..1 of the image."""

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> dict[LossName, Tensor]:
        """Return the weighted loss terms; the loss is their sum.

        Each term is a scalar: the sum over the batch / max(1, batch_weight(batch)), except denoising, whose queries are
        padded to the batch and which is divided by the denoised boxes.
        """

    @abstractmethod
    def batch_weight(self, batch: Batch) -> int:
        """Return the number of samples, or boxes, over which the loss of this batch is a mean.

        The trainer needs it to average over gradient accumulation steps and processes.
        """

    @abstractmethod
    def predict(self, output: Any, batch: Batch) -> list[Prediction]:
        """Return one prediction per target: boxes [K, 4] xyxy in pixels of the original image, best first."""

    def layers_to_compile(self) -> Sequence[nn.Module]:
        """Return the layers that `train.compile` compiles one by one; empty if the family has none."""
        return ()

    def layers_to_shard(self) -> Sequence[nn.Module]:
        """Return the layers whose weights FSDP2 gathers one by one; it gathers all other weights for the whole step.

        Every training step must run each of them once, whatever its batch: processes would wait for each other.
        """
        return self.layers_to_compile()

    def iou(self, output: Any, batch: Batch) -> Tensor | None:
        """Return the IoU of the best box of each sample, [B], for the log; always None if samples may have several."""
        return None

    def own_state_dict(self) -> dict[str, Tensor]:
        """Return all weights except those of the external submodules."""
        external = tuple(f"{name}." for name in self.external)
        return {key: value for key, value in self.state_dict().items() if not key.startswith(external)}

    def load_own_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of own_state_dict.

        Raises:
            ValueError: weights are missing, unexpected, misshaped or not finite; the message lists all of them.
        """
        own = self.own_state_dict()
        trouble = [f"missing: {key} {tuple(own[key].shape)}" for key in own.keys() - weights.keys()]
        trouble += [f"unexpected: {key} {tuple(weights[key].shape)}" for key in weights.keys() - own.keys()]
        for key in own.keys() & weights.keys():
            if own[key].shape != weights[key].shape:
                trouble.append(f"shape: {key} is {tuple(weights[key].shape)}, expected {tuple(own[key].shape)}")
        if trouble:
            raise ValueError("the weights do not fit the model:\n  " + "\n  ".join(sorted(trouble)))
        check_finite_weights(weights)
        self.load_state_dict(weights, strict=False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def num_parameters(self, trainable_only: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)


def is_finite(weights: Tensor) -> bool:
    """Whether weights have neither NaN nor Inf: all shards of sharded ones, for which every process must call it."""
    finite = weights.isfinite().all()
    return bool(finite.full_tensor() if isinstance(finite, DTensor) else finite)


def check_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError that lists all weights with NaN or Inf; tensors on the meta device have no values."""
    bad = sorted(key for key, values in weights.items() if not values.is_meta and not is_finite(values))
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"the weights are not finite (NaN or Inf): {', '.join(bad[:3])}{more}; the training has diverged, or the "
            "file is damaged: use an earlier checkpoint"
        )


def on_host(values: Sequence[_Movable]) -> list[_Movable]:
    """Copy predictions or targets to the host, one transfer for all tensors of a dtype: each waits for the device."""
    tensors = [tensor for value in values for tensor in value.tensors()]
    flat = {dtype: [x.flatten() for x in tensors if x.dtype == dtype] for dtype in {x.dtype for x in tensors}}
    copied = {dtype: iter(torch.cat(x).cpu().split([len(y) for y in x])) for dtype, x in flat.items()}
    return [value.map(lambda tensor: next(copied[tensor.dtype]).view(tensor.shape)) for value in values]


def check_finite(predictions: Sequence[Prediction], model: GroundingModel) -> None:
    """Raise PredictionError if a predicted box or score is NaN or Inf; no metric and no threshold would reveal it."""
    for prediction in predictions:
        if not (prediction.boxes.isfinite().all() and prediction.scores.isfinite().all()):
            bad = next((name for name, weights in model.named_parameters() if not weights.isfinite().all()), None)
            reason = "its values may exceed the range of fp16 (train.precision or --precision): use bf16 or no"
            raise PredictionError(
                f"boxes or scores that the model predicts for {prediction.id!r} are not finite (NaN or Inf): "
                + (f"the weights {bad} are not; use an earlier checkpoint" if bad else reason)
            )


def same_size_groups(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the indices of the images [B, 3, H, W] of each size, and these images without padding.

    Args:
        sizes: (height, width) of each image without padding, which is on the right and below.
    """
    for height, width in dict.fromkeys(sizes):
        image_ids = [image_id for image_id, size in enumerate(sizes) if size == (height, width)]
        yield image_ids, torch.stack([images[image_id, :, :height, :width] for image_id in image_ids])


def largest_grid(grids: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], tuple[tuple[int, int], ...] | None]:
    """Return `Features.grid` and `.grids` of images: the grid with the most cells, and all unless they are equal."""
    if len(set(grids)) == 1:
        return grids[0], None
    return max(grids, key=math.prod), tuple(grids)


class EncodableModel(GroundingModel):
    """A model in two steps, encoders and head: `model(batch)` equals `model.decode(model.encode(batch))`.

    The output of frozen encoders never changes, so it can be computed once and cached. An EncodedBatch contains it, and
    every method accepts one instead of a Batch. If the text encoder is trained, images are cached and text is encoded
    in every step.
    """

    @property
    @abstractmethod
    def caches_text(self) -> bool:
        """Whether the output of the text encoder can be cached, because it is frozen."""

    @abstractmethod
    def feature_key(self) -> dict[str, Any]:
        """Return what the features depend on besides the data, as JSON values.

        All that only the features of text depend on is in the entry `text`, which is absent if they are not cached.

        Raises:
            ConfigError: an encoder is trained or has random weights, so its features cannot be cached.
        """

    @abstractmethod
    def encode_images(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Encode images [B, 3, H, W]: tokens [B, S, D], and the grid (rows, columns) of the last of them."""

    @abstractmethod
    def encode_text(self, text: Text) -> tuple[Tensor, Tensor]:
        """Encode prompts: tokens [R, T, D], and their mask [R, T], False = padding."""

    def encode_sizes(
        self, images: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Encode images of several sizes: tokens [B, S, D], padded with zeros, and the grid of each image.

        Images of one size are encoded together and without padding, so that features do not depend on the batch.

        Args:
            images: [B, 3, H, W], padded on the right and below.
            sizes: (height, width) of each without padding.
        """
        if len(set(sizes)) == 1:
            tokens, grid = self.encode_images(images)
            return tokens, (grid,) * len(images)
        encoded: dict[int, tuple[Tensor, tuple[int, int]]] = {}  # [S, D] and grid of each image
        for image_ids, same_size in same_size_groups(images, sizes):
            tokens, grid = self.encode_images(same_size)
            encoded |= {image_id: (x, grid) for image_id, x in zip(image_ids, tokens, strict=True)}
        features = [encoded[image_id] for image_id in range(len(images))]
        padded = pad_sequence([tokens for tokens, _ in features], batch_first=True)
        return padded, tuple(grid for _, grid in features)

    def encode(self, batch: Batch) -> Features:
        """Run both encoders."""
        image, all_grids = self.encode_sizes(batch.images, batch.sizes)
        grid, grids = largest_grid(all_grids)
        text, mask = self.encode_text(batch.text)
        return Features(image, grid, text, mask, batch.image_ids, batch.max_per_image, grids)

    @abstractmethod
    def decode(self, features: Features) -> Any:
        """Run the head; returns the output of the model."""

    def forward(self, batch: Batch | EncodedBatch) -> Any:
        if isinstance(batch, Batch):
            return self.decode(self.encode(batch))
        features = batch.features  # float16
        if isinstance(features.text, Text):
            text, mask = self.encode_text(features.text)
        else:
            text, mask = features.text.float(), features.text_mask
        return self.decode(features._replace(image=features.image.float(), text=text, text_mask=mask))

    @abstractmethod
    def loss(self, output: Any, batch: Batch | EncodedBatch) -> dict[LossName, Tensor]: ...

    @abstractmethod
    def batch_weight(self, batch: Batch | EncodedBatch) -> int: ...

    @abstractmethod
    def predict(self, output: Any, batch: Batch | EncodedBatch) -> list[Prediction]: ...

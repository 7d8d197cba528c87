"""Referring expression comprehension: image encoder + text encoder + head = boxes for one expression, mostly one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from vg import boxes as box_ops
from vg.errors import CheckpointError, ConfigError
from vg.models.base import EncodableModel
from vg.models.encoder_types import SIGLIP_TEXT, SIGLIP_VISION
from vg.models.encoders import Encoder, layers_of, load_tokenizer, read_tokenizer, tokenizer_key, weights_key
from vg.models.rec.any_objects import AnyObjectsHead
from vg.models.rec.config import RecConfig
from vg.models.rec.heads import DenseOutput, PooledOutput
from vg.models.rec.kept_aspect import KeptAspectImage
from vg.models.rec.vision import VisionEncoder
from vg.models.saved import best_of, check_encoders, read_weights
from vg.models.settings import TextEncoderConfig
from vg.settings import read_yaml
from vg.types import Batch, EncodedBatch, Features, ImageSpec, LossName, Prediction, StretchedImage, Text, TextSpec

NORMALIZATIONS: dict[str, dict[str, tuple[float, float, float]]] = {  # where it is not that of ImageNet
    "clip_vision_model": {
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
    **{key: {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)} for key in SIGLIP_VISION},
}
# Text encoders that take a bool mask [R, 1, T, T]; the others add it, or combine masks of their own with a 2-D one.
FOUR_DIMENSIONAL_MASK = ("albert", "bert", "distilbert", "electra", "roberta", "xlm-roberta")
MIX_SEED = 0


class RecModel(EncodableModel):
    """See RecConfig.build; frozen pretrained encoders are loaded at first use."""

    def __init__(self, config: RecConfig, pretrained: bool = True):
        super().__init__()
        self.config = config
        self.external = tuple(config.frozen_encoders)
        self.vision = VisionEncoder(config.vision, pretrained, lazy=pretrained and "vision" in self.external)
        side, stride = config.image_size, self.vision.stride
        if side % stride:  # the encoder ignores the remainder or pads it, so that cells are not where the head has them
            nearest = " or ".join(str(near) for near in (side // stride * stride, -(-side // stride) * stride) if near)
            raise ConfigError(
                f"model.image_size={side} is not a multiple of the stride of the encoder, {stride} pixels; set it to "
                f"{nearest}"
            )
        self.text = Encoder(config.text, pretrained, lazy=pretrained and "text" in self.external)
        self.extra_text: Encoder | None = None
        if config.extra_text is not None:
            self.extra_text = Encoder(config.extra_text, pretrained, lazy=pretrained and "extra_text" in self.external)
        for encoder in self.text_encoders:
            if encoder.positions is not None and config.max_tokens > encoder.positions:
                raise ConfigError(
                    f"model.max_tokens={config.max_tokens}, but the text encoder has {encoder.positions} positions; "
                    f"set model.max_tokens={encoder.positions} or less"
                )
        # Not in `vision`, whose weights are not saved if they are external.
        mixed = config.vision.mixed_width
        self.mix: Tensor | None
        self.register_buffer("mix", None if mixed is None else fixed_projection(self.vision.width, mixed))
        self.head = config.head.build(mixed or self.vision.width, sum(x.width for x in self.text_encoders))
        self.generalized = isinstance(self.head, AnyObjectsHead)
        if pretrained and config.weights is not None:
            self._load(Path(config.weights))

    def _load(self, folder: Path) -> None:
        """Load the weights and the tokenizer of a run or checkpoint."""
        folder = best_of(folder)
        try:
            self.load_own_state_dict(read_weights(folder))
            check_encoders(folder, self.config)
        except CheckpointError as error:
            raise CheckpointError(f"model.weights: {error}") from error
        except ValueError as error:
            raise CheckpointError(f"model.weights: {folder}: {error}") from error
        if (folder / "config.yaml").exists():
            self._check_settings(folder / "config.yaml")
        if self.config.text.tokenizer is None:
            self.load_tokenizer(str(folder / "tokenizer"))

    def _check_settings(self, file: Path) -> None:
        """Raise CheckpointError if weights of this configuration fit, but have another meaning here."""
        try:
            values = read_yaml(file)["model"]
            heads, layers = values["head"]["heads"], values["vision"]["layers"]
        except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"model.weights: {file} is not the configuration of a rec: {error!r}") from error
        own = self.config.vision.layers
        if own != layers:  # by default the last one
            own, layers = own or [self.vision.num_layers], layers or [self.vision.num_layers]
        pairs = {"head.heads": (self.config.head.heads, heads), "vision.layers": (own, layers)}
        if wrong := [f"model.{key}={b} there, {a} here" for key, (a, b) in pairs.items() if a != b]:
            raise CheckpointError(f"model.weights: {file} has other settings, use the same: {'; '.join(wrong)}")

    @property
    def image_spec(self) -> ImageSpec:
        side, normalization = self.config.image_size, NORMALIZATIONS.get(self.vision.network_config.model_type, {})
        if self.config.keep_aspect:
            return KeptAspectImage(side, self.vision.stride, **normalization)
        return StretchedImage(side, side, **normalization)

    @property
    def text_encoders(self) -> list[Encoder]:
        """The one or two text encoders."""
        return [self.text] if self.extra_text is None else [self.text, self.extra_text]

    @cached_property
    def text_spec(self) -> TextSpec:
        extra = self.config.extra_text
        return self._text_spec(load_tokenizer(self.config.text), extra and load_tokenizer(extra))

    def load_tokenizer(self, folder: str) -> None:
        extra = None if self.extra_text is None else read_tokenizer(f"{folder}/extra")
        self.text_spec = self._text_spec(read_tokenizer(folder), extra)

    def _text_spec(self, tokenizer: PreTrainedTokenizerBase, extra: PreTrainedTokenizerBase | None) -> TextSpec:
        limit = self.config.max_tokens
        return TextSpec(tokenizer, limit, extra=None if extra is None else TextSpec(extra, limit))

    def layers_to_shard(self) -> Sequence[nn.Module]:
        # With `keep_aspect`, the vision encoder runs once for each image size of a batch.
        encoders = self.text_encoders if self.config.keep_aspect else [self.vision, *self.text_encoders]
        layers = [layer for encoder in encoders if encoder.is_loaded for layer in layers_of(encoder.network)]
        return (*layers, *self.head.layers)

    def num_parameters(self, trainable_only: bool = False) -> int:
        unloaded = 0 if trainable_only else sum(x.num_unloaded_parameters() for x in (self.vision, *self.text_encoders))
        return super().num_parameters(trainable_only) + unloaded

    @property
    def caches_text(self) -> bool:
        return all(encoder.frozen for encoder in self.text_encoders)

    def feature_key(self) -> dict[str, Any]:
        vision = {
            **weights_key("model.vision", self.config.vision),
            "layers": self.vision.layers,
            "mix": None if self.mix is None else {"seed": MIX_SEED, "shape": list(self.mix.shape)},
        }
        if not self.caches_text:
            return {"vision": vision}
        text = _text_key(self.config.text)
        if self.config.extra_text is not None:
            text["extra"] = _text_key(self.config.extra_text)
        return {"vision": vision, "text": text}

    def encode_images(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        tokens, grid = self.vision(images)
        return tokens if self.mix is None else F.linear(tokens, self.mix), grid

    def encode_text(self, text: Text) -> tuple[Tensor, Tensor]:
        tokens = _run_text_encoder(self.text, text, self.text_spec)
        if self.extra_text is None:
            return tokens, text.mask
        assert text.extra is not None
        assert self.text_spec.extra is not None
        extra = _run_text_encoder(self.extra_text, text.extra, self.text_spec.extra)
        # The tokens of each encoder have channels of their own, so the projection of the head has weights for each.
        tokens, extra = F.pad(tokens, (0, extra.shape[2])), F.pad(extra, (tokens.shape[2], 0))
        return torch.cat((tokens, extra), dim=1), torch.cat((text.mask, text.extra.mask), dim=1)

    def decode(self, features: Features) -> PooledOutput | DenseOutput:
        is_shared = len(features.image) < len(features.text)
        return self.head(features if is_shared else features._replace(image_ids=None))

    def loss(self, output: PooledOutput | DenseOutput, batch: Batch | EncodedBatch) -> dict[LossName, Tensor]:
        """Return the loss terms of the head.

        Raises:
            ConfigError: a sample, which is named, does not have exactly one box, but the head predicts one.
        """
        for target in batch.targets:
            if len(target.boxes) != 1 and not self.generalized:
                raise ConfigError(
                    f"{target.id} has {len(target.boxes)} boxes, but rec trains on expressions with one unless "
                    "model.head={name: dense, objects: any}; set this, or train model.name=grounding_dino on such data"
                )
        losses = self.head.loss(output, *_padded_boxes(batch))  # type: ignore[arg-type]
        return {LossName(term): value for term, value in losses.items()}

    def batch_weight(self, batch: Batch | EncodedBatch) -> int:
        return len(batch)

    def predict(self, output: PooledOutput | DenseOutput, batch: Batch | EncodedBatch) -> list[Prediction]:
        selected = self.head.select_boxes(output)  # type: ignore[arg-type]  # [R, K, 4], [R, K]
        boxes, scores = (x.cpu() for x in selected)  # here, because what follows is small and by sample
        found: Any = scores > 0 if self.generalized else [slice(None)] * len(scores)
        return [
            Prediction(
                id=target.id,
                boxes=box_ops.to_pixels(sample_boxes[kept], target.size),
                scores=sample_scores[kept],
                phrase_ids=torch.zeros_like(sample_scores[kept], dtype=torch.long),
                phrases=target.phrases,
            )
            for target, sample_boxes, sample_scores, kept in zip(batch.targets, boxes, scores, found, strict=True)
        ]

    @torch.no_grad()
    def iou(self, output: PooledOutput | DenseOutput, batch: Batch | EncodedBatch) -> Tensor | None:
        if self.generalized or any(len(target.boxes) != 1 for target in batch.targets):
            return None  # for all batches of a generalized model: every step must log the same terms
        boxes, _ = self.head.select_boxes(output, 1)  # type: ignore[arg-type]  # [R, 1, 4]
        true = torch.cat([target.boxes for target in batch.targets])  # [R, 4]
        return box_ops.iou(*(box_ops.cxcywh_to_xyxy(x).clamp(0, 1) for x in (boxes.squeeze(1).float(), true)))


def _padded_boxes(batch: Batch | EncodedBatch) -> tuple[Tensor, Tensor]:
    """Return the boxes of all expressions, [R, N, 4] cxcywh 0..1, and [R, N] bool, False = padding."""
    if isinstance(batch, Batch):
        return batch.prompt_targets.boxes, batch.prompt_targets.mask
    boxes = torch.stack([target.boxes for target in batch.targets])  # in a feature cache every expression has one
    return boxes, boxes.new_ones(boxes.shape[:2], dtype=torch.bool)


def _text_key(config: TextEncoderConfig) -> dict[str, Any]:
    return {**weights_key(config.key, config), "tokenizer": tokenizer_key(config)}


def _run_text_encoder(encoder: Encoder, text: Text, spec: TextSpec) -> Tensor:
    """Return the tokens of a text encoder, [R, T, D]."""
    config, ids, mask = encoder.network_config, text.token_ids, text.mask
    if config.model_type in SIGLIP_TEXT:
        # Trained on a fixed number of tokens without a mask: it attends to padding, which has an effect.
        padding = spec.tokenizer.pad_token_id
        ids = F.pad(ids.masked_fill(~mask, padding), (0, config.max_position_embeddings - ids.shape[1]), value=padding)
        return encoder.run(input_ids=ids)[:, : mask.shape[1]]
    if config.model_type == "clip_text_model":
        return encoder.run(input_ids=ids)  # causal: no token attends to the padding after it
    # transformers reads from the device whether a 2-D mask has any padding; it takes a 4-D one as it is, and adds that
    # to the logits of eager attention.
    four_dims = config.model_type in FOUR_DIMENSIONAL_MASK and config._attn_implementation != "eager"
    mask = mask[:, None, None].expand(-1, -1, mask.shape[1], -1) if four_dims else mask.long()
    return encoder.run(input_ids=ids, attention_mask=mask)


def fixed_projection(channels: int, width: int) -> Tensor:
    """Return a random matrix with orthonormal rows, [width, channels], always the same for these sizes.

    Raises:
        ConfigError: there are fewer channels than rows.
    """
    if width > channels:
        raise ConfigError(f"model.vision.mixed_width={width} exceeds the {channels} channels of the features")
    random = np.random.RandomState(MIX_SEED)  # NumPy guarantees its values for all versions
    q, r = np.linalg.qr(random.standard_normal((channels, width)))
    return torch.as_tensor((q * np.sign(np.diag(r))).T, dtype=torch.float32)  # signs differ between libraries

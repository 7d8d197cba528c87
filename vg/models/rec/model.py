"""Referring expression comprehension: image encoder + text encoder + head = boxes for one expression, mostly one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from vg import boxes as box_ops
from vg.errors import CheckpointError, ConfigError
from vg.models.base import EncodableModel
from vg.models.encoders import Encoder, load_tokenizer, read_tokenizer, tokenizer_key, weights_key
from vg.models.rec.any_objects import AnyObjectsHead
from vg.models.rec.config import RecConfig, VisionEncoderConfig
from vg.models.rec.heads import DenseOutput, PooledOutput
from vg.models.rec.kept_aspect import KeptAspectImage
from vg.types import Batch, EncodedBatch, Features, ImageSpec, LossName, Prediction, StretchedImage, Text, TextSpec

NORMALIZATIONS: dict[str, dict[str, tuple[float, float, float]]] = {  # where it is not that of ImageNet
    "clip_vision_model": {
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
    "siglip_vision_model": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}
# Text encoders that take a bool mask [R, 1, T, T]; the others add it, or combine masks of their own with a 2-D one.
FOUR_DIMENSIONAL_MASK = ("albert", "bert", "distilbert", "electra", "roberta", "xlm-roberta")
# Norm between the last layer and the last hidden state, of the types without stages; BEiT may have none, CLIP has none.
FINAL_NORMS = {
    **dict.fromkeys(("beit", "deit", "dinov2", "dinov2_with_registers", "vit"), "layernorm"),
    "dinov3_vit": "norm",
    "siglip_vision_model": "post_layernorm",
}
MIX_SEED = 0


class VisionEncoder(Encoder):
    """Images [B, 3, H, W] -> tokens [B, R + S, D]: R prefix tokens (class, registers), then the S cells of the grid.

    With `layers` in the settings, D are the channels of all these layers. The final norm of the encoder is applied to
    every layer, as get_intermediate_layers of DINOv2 and DINOv3 does. In a network with stages it fits the last one
    only, and coarser stages are interpolated to the grid of the finest.

    Raises:
        ConfigError: as Encoder; or the encoder lacks one of the layers, or layers after them would be trained.
    """

    def __init__(self, config: VisionEncoderConfig, pretrained: bool, lazy: bool = False):
        super().__init__(config, pretrained, lazy)
        self.layers = config.layers
        if self.layers is None:
            return
        last = self.num_layers
        if not all(1 <= layer <= last for layer in self.layers):
            raise ConfigError(f"model.vision.layers={self.layers}: the layers of this encoder are 1 to {last}")
        if not self.frozen and last not in self.layers:
            raise ConfigError(
                f"model.vision.layers={self.layers} lacks the last layer, {last}: layers after {self.layers[-1]} would "
                "not be trained; add it, or set model.vision.frozen=true"
            )

    @property
    def num_layers(self) -> int:
        """Number of layers, or of stages."""
        config = self.network_config
        return len(config.depths) if hasattr(config, "depths") else config.num_hidden_layers

    @property
    def width(self) -> int:
        if self.layers is None:
            return super().width
        config = self.network_config
        if config.model_type == "swin":
            return sum(config.embed_dim * 2 ** (stage - 1) for stage in self.layers)
        if hasattr(config, "hidden_sizes"):
            return sum(config.hidden_sizes[stage - 1] for stage in self.layers)
        return config.hidden_size * len(self.layers)

    @property
    def stride(self) -> int:
        """Pixels per side of a cell of the last layer."""
        config = self.network_config
        if config.model_type == "swin":
            return config.patch_size * 2 ** (len(config.depths) - 1)
        if hasattr(config, "hidden_sizes"):  # the stem reduces by 4, every further stage by 2
            first = getattr(config, "downsample_in_first_stage", False)  # of ResNet
            return getattr(config, "patch_size", 4) * 2 ** (len(config.hidden_sizes) - 1 + first)
        return config.patch_size

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens and the grid (rows, columns) of the last S = rows x columns of them."""
        config, (height, width), stride = self.network_config, images.shape[2:], self.stride
        options: dict[str, bool] = {} if self.layers is None else {"output_hidden_states": True}
        if config.model_type == "swin":
            grid = -(-height // stride), -(-width // stride)
            # transformers fails on a feature map that is smaller than a window, unless the map is padded to one.
            options["always_partition"] = min(grid) < config.window_size
            options["output_hidden_states_before_downsampling"] = self.layers is not None
            for stage in self.network.encoder.layers:  # which keep the windows of the last image that was small
                for index, block in enumerate(stage.blocks):
                    block.window_size, block.shift_size = config.window_size, index % 2 * (config.window_size // 2)
        else:
            grid = height // stride, width // stride
        # Position embeddings of a fixed number of patches; the other types adapt theirs without an argument.
        if config.model_type in ("clip_vision_model", "deit", "siglip_vision_model", "vit"):
            options["interpolate_pos_encoding"] = True
        output = self.outputs(pixel_values=images, **options)
        features = output.last_hidden_state
        if features.dim() == 4:  # a convolutional network: [B, D, rows, columns]
            grid = features.shape[2], features.shape[3]
            features = features.flatten(2).mT
        if self.layers is None:
            return features, grid
        if hasattr(config, "depths"):
            stages = output.reshaped_hidden_states if config.model_type == "swin" else output.hidden_states
            return self._joined_stages(stages, features, grid)
        name = FINAL_NORMS.get(config.model_type)
        norm = nn.Identity() if name is None else self.network.get_submodule(name)
        levels = [features if layer == self.num_layers else norm(output.hidden_states[layer]) for layer in self.layers]
        return torch.cat(levels, dim=-1), grid

    def _joined_stages(
        self, stages: Sequence[Tensor], last: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, tuple[int, int]]:
        """Join the selected stages.

        Args:
            stages: [B, D, rows, columns] of the stem and of every stage.
            last: [B, R + S, D] normalized tokens of the last stage; R is 1 in DINOv3, the mean of the cells, else 0.
            grid: of the last stage.
        """
        prefix, cells = last.split((last.shape[1] - grid[0] * grid[1], grid[0] * grid[1]), dim=1)
        maps, means = [], []  # [B, D, rows, columns] and [B, R, D] of each stage
        for stage in self.layers or ():
            is_last = stage == self.num_layers
            maps.append(cells.mT.unflatten(2, grid) if is_last else stages[stage])
            mean = prefix if is_last else stages[stage].mean(dim=(2, 3)).unsqueeze(1)
            means.append(mean[:, : prefix.shape[1]])
        finest = maps[0].shape[2], maps[0].shape[3]
        resized = [x if x.shape[2:] == finest else F.interpolate(x, finest, mode="bilinear") for x in maps]
        tokens = torch.cat(resized, dim=1).flatten(2).mT  # [B, S, D]
        return torch.cat((torch.cat(means, dim=2), tokens), dim=1), finest


class RecModel(EncodableModel):
    """See RecConfig.build; frozen pretrained encoders are loaded at first use."""

    def __init__(self, config: RecConfig, pretrained: bool = True):
        super().__init__()
        self.config = config
        self.external = tuple(config.frozen_encoders)
        self.vision = VisionEncoder(config.vision, pretrained, lazy=pretrained and "vision" in self.external)
        if config.keep_aspect and config.image_size < self.vision.stride:
            raise ConfigError(f"model.image_size={config.image_size} is less than {self.vision.stride}, one token")
        self.text = Encoder(config.text, pretrained, lazy=pretrained and "text" in self.external)
        if self.text.positions is not None and config.max_tokens > self.text.positions:
            raise ConfigError(
                f"model.max_tokens={config.max_tokens}, but the text encoder has {self.text.positions} positions; "
                f"set model.max_tokens={self.text.positions} or less"
            )
        # Not in `vision`, whose weights are not saved if they are external.
        mixed = config.vision.mixed_width
        self.mix: Tensor | None
        self.register_buffer("mix", None if mixed is None else fixed_projection(self.vision.width, mixed))
        self.head = config.head.build(mixed or self.vision.width, self.text.width)
        self.generalized = isinstance(self.head, AnyObjectsHead)
        if pretrained and config.weights is not None:
            self._load(Path(config.weights))

    def _load(self, folder: Path) -> None:
        """Load the weights and the tokenizer of a run or checkpoint."""
        folder = folder / "best" if (folder / "best").is_dir() else folder
        try:
            self.load_own_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"model.weights: {folder}: {error}") from error
        if self.config.text.tokenizer is None:
            self.load_tokenizer(str(folder / "tokenizer"))

    @property
    def image_spec(self) -> ImageSpec:
        side, normalization = self.config.image_size, NORMALIZATIONS.get(self.vision.network_config.model_type, {})
        if self.config.keep_aspect:
            return KeptAspectImage(side, self.vision.stride, **normalization)
        return StretchedImage(side, side, **normalization)

    @cached_property
    def text_spec(self) -> TextSpec:
        return TextSpec(load_tokenizer(self.config.text), self.config.max_tokens)

    def load_tokenizer(self, folder: str) -> None:
        self.text_spec = TextSpec(read_tokenizer(folder), self.config.max_tokens)

    def num_parameters(self, trainable_only: bool = False) -> int:
        unloaded = 0 if trainable_only else sum(x.num_unloaded_parameters() for x in (self.vision, self.text))
        return super().num_parameters(trainable_only) + unloaded

    def feature_key(self) -> dict[str, Any]:
        vision: dict[str, Any] = weights_key("model.vision", self.config.vision)
        if self.vision.layers is not None:  # keys of earlier versions have neither
            vision["layers"] = self.vision.layers
        if self.mix is not None:
            vision["mix"] = {"seed": MIX_SEED, "shape": list(self.mix.shape)}
        return {
            "vision": vision,
            "text": weights_key("model.text", self.config.text) | {"tokenizer": tokenizer_key(self.config.text)},
        }

    def encode_images(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        tokens, grid = self.vision(images)
        return tokens if self.mix is None else F.linear(tokens, self.mix), grid

    def encode_text(self, text: Text) -> Tensor:
        # transformers reads from the device whether a 2-D mask has any padding; it takes a 4-D one as it is, and adds
        # that to the logits of eager attention.
        config = self.text.network_config
        four_dims = config.model_type in FOUR_DIMENSIONAL_MASK and config._attn_implementation != "eager"
        mask = text.mask[:, None, None].expand(-1, -1, text.mask.shape[1], -1) if four_dims else text.mask.long()
        return self.text.run(input_ids=text.token_ids, attention_mask=mask)

    def decode(self, features: Features) -> PooledOutput | DenseOutput:
        image, grid, text, mask, image_ids, most, grids = features
        return self.head(image, grid, text, mask, image_ids if len(image) < len(text) else None, most, grids)

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
        if isinstance(self.head, AnyObjectsHead):
            losses = self.head.loss(output, *_padded_boxes(batch))  # type: ignore[arg-type]
        else:
            losses = self.head.loss(output, torch.cat([target.boxes for target in batch.targets]))  # type: ignore[arg-type]
        return {LossName(term): value for term, value in losses.items()}

    def batch_weight(self, batch: Batch | EncodedBatch) -> int:
        return len(batch)

    def predict(self, output: PooledOutput | DenseOutput, batch: Batch | EncodedBatch) -> list[Prediction]:
        boxes, scores = self.head.rank(output)  # type: ignore[arg-type]  # [R, K, 4], [R, K]
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
        if any(len(target.boxes) != 1 for target in batch.targets):
            return None
        boxes, _ = self.head.rank(output, 1)  # type: ignore[arg-type]  # [R, 1, 4]
        true = torch.cat([target.boxes for target in batch.targets])  # [R, 4]
        return box_ops.iou(*(box_ops.cxcywh_to_xyxy(x).clamp(0, 1) for x in (boxes.squeeze(1).float(), true)))


def _padded_boxes(batch: Batch | EncodedBatch) -> tuple[Tensor, Tensor]:
    """Return the boxes of all expressions, [R, N, 4] cxcywh 0..1, and [R, N] bool, False = padding."""
    if isinstance(batch, Batch):
        return batch.prompt_targets.boxes, batch.prompt_targets.mask
    boxes = torch.stack([target.boxes for target in batch.targets])  # in a feature cache every expression has one
    return boxes, boxes.new_ones(boxes.shape[:2], dtype=torch.bool)


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

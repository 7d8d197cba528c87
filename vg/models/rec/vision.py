"""The vision encoder of rec: any encoder of transformers, one or several of its layers, and the grid of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vg.errors import ConfigError
from vg.models.encoder_types import SIGLIP_VISION
from vg.models.encoders import Encoder
from vg.models.rec.config import VisionEncoderConfig

# Norm between the last layer and the last hidden state, of the types without stages; BEiT may have none, CLIP has none.
FINAL_NORMS = {
    **dict.fromkeys(("beit", "deit", "dinov2", "dinov2_with_registers", "vit"), "layernorm"),
    "dinov3_vit": "norm",
    **dict.fromkeys(SIGLIP_VISION, "post_layernorm"),
}


class VisionEncoder(Encoder):
    """Images [B, 3, H, W] -> tokens [B, prefix + S, D]: prefix tokens (class, registers), then the S cells of the grid.

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
        inputs: dict[str, Any] = {"pixel_values": images}
        if self.layers is not None:
            inputs["output_hidden_states"] = True
        if config.model_type == "swin":
            grid = -(-height // stride), -(-width // stride)
            # transformers fails on a feature map that is smaller than a window, unless the map is padded to one.
            inputs["always_partition"] = min(grid) < config.window_size
            inputs["output_hidden_states_before_downsampling"] = self.layers is not None
            for stage in self.network.encoder.layers:  # which keep the windows of the last image that was small
                for index, block in enumerate(stage.blocks):
                    block.window_size, block.shift_size = config.window_size, index % 2 * (config.window_size // 2)
        else:
            grid = height // stride, width // stride
        # Position embeddings of a fixed number of patches; the other types adapt theirs without an argument.
        if config.model_type in ("clip_vision_model", "deit", "siglip_vision_model", "vit"):
            inputs["interpolate_pos_encoding"] = True
        elif config.model_type == "siglip2_vision_model":
            inputs |= as_patches(images, grid, stride)
        output = self.outputs(**inputs)
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
            last: [B, prefix + S, D] normalized tokens of the last stage; the prefix is the mean of the cells in DINOv3,
                else empty.
            grid: of the last stage.
        """
        prefix, cells = last.split((last.shape[1] - grid[0] * grid[1], grid[0] * grid[1]), dim=1)
        maps, means = [], []  # [B, D, rows, columns] and [B, prefix, D] of each stage
        for stage in self.layers or ():
            is_last = stage == self.num_layers
            maps.append(cells.mT.unflatten(2, grid) if is_last else stages[stage])
            mean = prefix if is_last else stages[stage].mean(dim=(2, 3)).unsqueeze(1)
            means.append(mean[:, : prefix.shape[1]])
        finest = maps[0].shape[2], maps[0].shape[3]
        resized = [x if x.shape[2:] == finest else F.interpolate(x, finest, mode="bilinear") for x in maps]
        tokens = torch.cat(resized, dim=1).flatten(2).mT  # [B, S, D]
        return torch.cat((torch.cat(means, dim=2), tokens), dim=1), finest


def as_patches(images: Tensor, grid: tuple[int, int], stride: int) -> dict[str, Tensor | None]:
    """Return the inputs of SigLIP 2 NaFlex for images of one size: flat patches, of which none is padding."""
    rows, columns = grid
    cells = images[:, :, : rows * stride, : columns * stride]  # a convolution would ignore the remainder, too
    cells = cells.unflatten(3, (columns, stride)).unflatten(2, (rows, stride))  # [B, 3, rows, stride, columns, stride]
    patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, S, stride * stride * 3]
    shapes = torch.tensor([grid] * len(images), device="cpu")  # which transformers reads on the host
    return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shapes}

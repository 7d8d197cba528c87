"""Image and text encoders of the rec family."""

from __future__ import annotations

from torch import Tensor

from vg.models.encoders import Encoder
from vg.types import Text


class VisionEncoder(Encoder):
    """Images [B, 3, H, W] -> tokens [B, R + S, D]: R prefix tokens (class, registers), then the S cells of the grid."""

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens and the grid (rows, columns) of the last S = rows x columns of them."""
        height, width = images.shape[-2:]
        features = self.run(pixel_values=images)
        if features.dim() == 4:  # a convolutional network: [B, D, rows, columns]
            return features.flatten(2).mT, (features.shape[2], features.shape[3])
        return features, (height // self.stride, width // self.stride)

    @property
    def stride(self) -> int:
        """Side of a grid cell in pixels."""
        config = self.network_config
        if hasattr(config, "patch_size"):
            return config.patch_size
        return 4 * 2 ** (len(config.hidden_sizes) - 1)  # ConvNeXt: the stem reduces by 4, every further stage by 2


class TextEncoder(Encoder):
    """Tokenized prompts -> tokens [R, T, D]."""

    def forward(self, text: Text) -> Tensor:
        return self.run(input_ids=text.token_ids, attention_mask=text.mask.long())

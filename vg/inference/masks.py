"""Masks of boxes, by a Segment Anything model of transformers (SAM or SAM 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vg.errors import ConfigError
from vg.hub import loading
from vg.types import ImageSpec

DEFAULT_ID = "facebook/sam2.1-hiera-small"
CHUNK = 64  # boxes in a pass of the mask decoder


class Segmenter:
    """Turns boxes into masks.

    transformers prepares images for SAM 2 with torchvision, which vg does without; resizing is done here: SAM 2 takes
    a stretched square, SAM the longer side resized and the rest padded.

    Args:
        path: folder or Hub id of a `SamModel` or `Sam2Model`.

    Raises:
        ConfigError: it cannot be loaded, or is another kind of model.
    """

    def __init__(self, path: str = DEFAULT_ID, device: str = "cpu"):
        from transformers import AutoConfig, Sam2Model, SamModel

        with loading(path, "masks", ConfigError):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            if config.model_type not in ("sam", "sam2", "sam2_video"):
                raise ConfigError(f"{path} (masks) is of the type {config.model_type}; choose a SAM or SAM 2 model")
            self.stretches = config.model_type != "sam"
            network: Any = Sam2Model if self.stretches else SamModel
            self.network = network.from_pretrained(path, trust_remote_code=False).to(device).eval()
        self.side = int(self.network.config.prompt_encoder_config.image_size)
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) for x in (ImageSpec.mean, ImageSpec.std))

    @torch.no_grad()
    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Segment the object in each box.

        Args:
            image: [H, W, 3] uint8, RGB.
            boxes: [K, 4] xyxy in pixels.

        Returns:
            [K, H, W] bool.
        """
        height, width = image.shape[:2]
        if not len(boxes):
            return np.zeros((0, height, width), bool)
        scale = np.array([self.side / width, self.side / height])
        if not self.stretches:
            scale[:] = scale.min()
        size = [max(1, round(x)) for x in (np.array([width, height]) * scale)]  # width, height
        resized = np.array(Image.fromarray(image).resize((size[0], size[1]), Image.Resampling.BILINEAR))
        pixels = (torch.tensor(resized).permute(2, 0, 1) / 255 - self.mean) / self.std
        pixels = F.pad(pixels, (0, self.side - size[0], 0, self.side - size[1])).unsqueeze(0)
        device = self.network.device
        embeddings = self.network.get_image_embeddings(pixels.to(device))
        prompts = torch.tensor(boxes * np.tile(scale, 2), dtype=torch.float32, device=device).unsqueeze(0)  # [1, K, 4]
        masks = []
        for chunk in prompts.split(CHUNK, dim=1):
            found = self.network(image_embeddings=embeddings, input_boxes=chunk, multimask_output=False).pred_masks
            logits = F.interpolate(found[:, :, 0].float(), (self.side, self.side), mode="bilinear")[
                ..., : size[1], : size[0]
            ]
            masks.append(F.interpolate(logits, (height, width), mode="bilinear")[0] > 0)
        return torch.cat(masks).cpu().numpy()

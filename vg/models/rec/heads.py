"""The two heads of the rec family: from image tokens and text tokens to one box per expression."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vg import boxes as box_ops
from vg.losses import terms
from vg.models.layers import MLP, full_precision, sine_encoding
from vg.models.rec.config import DenseHeadConfig, PooledHeadConfig
from vg.models.rec.layers import (
    RotaryTransformerLayer,
    SharedMemoryDecoderLayer,
    index_in_group,
    padded_centers,
    rotary_encoding,
    token_centers,
)
from vg.types import Features

MAX_CANDIDATES = 64  # tokens; the remaining softmax weights are negligible


class PooledOutput(NamedTuple):
    boxes: Tensor  # [R, 4] cxcywh 0..1


class DenseOutput(NamedTuple):
    logits: Tensor  # [R, S] score of each image token for the expression
    boxes: Tensor  # [R, S, 4] cxcywh 0..1, the box that each token predicts
    centers: Tensor  # [S, 2] or [R, S, 2] (x, y) 0..1, center of each token; infinite for padding


class PooledHead(nn.Module):
    """The published head: a transformer decoder whose queries are the text tokens and whose memory is the image.

    All image tokens (class and register tokens too) are memory, without position encoding because DINOv3's features
    contain positions (rotary encoding). The mean over the text tokens without padding regresses (left, top, right,
    bottom). Expressions about the same image share its keys and values.
    """

    def __init__(self, config: PooledHeadConfig, vision_width: int, text_width: int):
        super().__init__()
        self.config = config
        self.vision_projection = nn.Linear(vision_width, config.width)
        self.text_projection = nn.Linear(text_width, config.width)
        layer = SharedMemoryDecoderLayer(
            config.width, config.heads, config.feedforward, config.dropout, batch_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, config.layers)
        self.norm = nn.LayerNorm(config.width)
        self.box = MLP(config.width, config.width // 2, 4)

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    def forward(self, features: Features) -> PooledOutput:
        """Predict a box for every expression."""
        x, memory = self.text_projection(features.text), self.vision_projection(features.image)  # [R, T, D], [B, S, D]
        mask, image_ids, most = features.text_mask, features.image_ids, features.max_per_image
        rows = None
        if image_ids is not None:
            order = index_in_group(image_ids)  # [R]
            rows = image_ids, order, int(order.max()) + 1 if most is None else most
        padding = None
        if features.grids is not None:
            padding = ~padded_centers(features.grids, memory.device)[1]
            padding = F.pad(padding, (memory.shape[1] - padding.shape[1], 0))  # [B, S], False for class and registers
        for layer in self.decoder.layers:
            x = layer(x, memory, ~mask, rows, padding)  # [R, T, D]
        weights = mask / mask.sum(dim=1, keepdim=True)  # [R, T]
        x = self.norm((x * weights.unsqueeze(-1)).sum(dim=1)).to(self.norm.weight.dtype)  # [R, D]
        with full_precision(x):
            return PooledOutput(box_ops.xyxy_to_cxcywh(self.box(x).sigmoid()))

    def loss(self, output: PooledOutput, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return means over the expressions; target and mask as in `DenseHead.loss`."""
        weights = self.config.loss.box_weights()
        losses = terms.box_terms(self.config.loss, output.boxes, target.squeeze(1))  # [R] each
        return {name: (weights[name] * loss).mean() for name, loss in losses.items()}

    def select_boxes(self, output: PooledOutput, limit: int = 1) -> tuple[Tensor, Tensor]:
        """Return boxes [R, 1, 4] and scores [R, 1]; this head predicts no confidence, so the score is always 1."""
        center, size = output.boxes.unsqueeze(1).chunk(2, dim=-1)
        # The predicted left edge can be right of the right edge, especially before training: such a box is empty.
        boxes = torch.cat((center, size.clamp(min=0)), dim=-1)
        return boxes, boxes.new_ones(boxes.shape[:2])


class DenseHead(nn.Module):
    """A transformer encoder over image and text tokens; each image token predicts a score and a box."""

    def __init__(self, config: DenseHeadConfig, vision_width: int, text_width: int):
        super().__init__()
        self.config = config
        self.vision_projection = nn.Linear(vision_width, config.width)
        self.text_projection = nn.Linear(text_width, config.width)
        self.layers = nn.ModuleList(
            RotaryTransformerLayer(config.width, config.heads, config.feedforward, config.dropout)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.score = nn.Linear(config.width, 1)
        self.box = MLP(config.width, config.width, 4)

    def forward(self, features: Features) -> DenseOutput:
        """Predict a score and a box for every image token; padding has no score, an empty box and no center."""
        num_cells, device, valid = math.prod(features.grid), features.image.device, None
        if features.grids is None:
            centers = token_centers(features.grid, device)  # [S, 2]
        else:
            centers, valid = padded_centers(features.grids, device)  # [B, S, 2], [B, S]
        image = self.vision_projection(features.image[:, -num_cells:])  # [B, S, D] without class and register tokens
        image = image + sine_encoding(centers, self.config.width)
        if features.image_ids is not None:
            image = image[features.image_ids]  # [R, S, D]: image tokens are now expression-specific
            if valid is not None:
                centers, valid = centers[features.image_ids], valid[features.image_ids]
        text, text_mask = self.text_projection(features.text), features.text_mask
        x = torch.cat((image, text), dim=1)  # [R, S + T, D]
        image_mask = text_mask.new_ones(image.shape[:2]) if valid is None else valid
        mask = torch.cat((image_mask, text_mask), dim=1)  # [R, S + T]
        rotation = rotary_encoding(centers, self.config.width // self.config.heads)
        unrotated = F.pad(rotation.new_ones(text.shape[1], rotation.shape[-2], 1), (0, 1))  # (1, 0)
        unrotated = unrotated.expand(*rotation.shape[:-3], -1, -1, -1)
        rotation = torch.cat((rotation, unrotated), dim=-3)  # [(R,) S + T, D / heads / 2, 2]: words have no position
        for layer in self.layers:
            x = layer(x, rotation, mask)
        x = self.norm(x[:, :num_cells])  # [R, S, D]
        # Relative to their token: bfloat16 costs a box of a tenth of the image less than 0.01 IoU, see full_precision
        center_offset, size = self.box(x).float().chunk(2, dim=-1)
        center = (torch.logit(centers) + center_offset).sigmoid()
        logits, boxes = self.score(x).squeeze(-1), torch.cat((center, size.sigmoid()), dim=-1)
        if valid is not None:
            logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
            boxes = boxes.masked_fill(~valid.unsqueeze(-1), 0.0)  # whose IoU with any other is 0
            centers = centers.masked_fill(~valid.unsqueeze(-1), torch.inf)
        return DenseOutput(logits, boxes, centers)

    def loss(self, output: DenseOutput, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return means over the expressions.

        Args:
            target: [R, N, 4] cxcywh 0..1, the boxes of each expression; N is 1 unless `objects` is "any".
            mask: [R, N] bool, False = padding.
        """
        positive = self.positive_tokens(output.centers, target.squeeze(1))  # [R, S]
        shares = positive / positive.sum(dim=1, keepdim=True)  # [R, S]
        token = self.config.loss.token * terms.token_cross_entropy(output.logits, positive).mean()
        return {"token": token, **self._box_losses(output.boxes, target.expand_as(output.boxes), shares)}

    def _box_losses(self, boxes: Tensor, target: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """Return means over the expressions; [R, S, 4] twice, and [R, S], the weights of the tokens."""
        weights, losses = self.config.loss.box_weights(), terms.box_terms(self.config.loss, boxes, target)  # [R, S]
        return {name: (weights[name] * loss * shares).sum(dim=1).mean() for name, loss in losses.items()}

    @staticmethod
    def positive_tokens(centers: Tensor, target: Tensor) -> Tensor:
        """Return the tokens whose center is in the box, or the nearest one if the box is too small: [R, S] bool."""
        offset = (centers - target[:, None, :2]).abs()  # [R, S, 2]
        nearest = offset.sum(dim=-1).argmin(dim=1, keepdim=True)  # [R, 1]
        inside = (offset <= target[:, None, 2:] / 2).all(dim=-1)
        return inside.scatter(1, nearest, True)

    def select_boxes(self, output: DenseOutput, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the best boxes [R, K, 4] and their scores [R, K], best first (soft-NMS style rescoring).

        `limit` is the largest K, by default `num_boxes` of the settings.

        The score of a candidate is its expected IoU, where each token's box is correct with the token's softmax weight.
        After each pick, the remaining weights are reduced by their IoU with the picked box, so that the next pick is
        another object.
        """
        weights, tokens = output.logits.float().softmax(dim=-1).topk(min(MAX_CANDIDATES, output.logits.shape[-1]))
        candidates = output.boxes.gather(1, tokens.unsqueeze(-1).expand(-1, -1, 4))  # [R, C, 4]
        overlap = box_ops.pairwise_iou(box_ops.cxcywh_to_xyxy(candidates))  # [R, C, C]
        boxes, scores = [], []
        for _ in range(min(limit or self.config.num_boxes, weights.shape[1])):
            score, best = (overlap @ weights.unsqueeze(-1)).squeeze(-1).max(dim=1)  # [R]
            best = best[:, None, None]  # [R, 1, 1]
            boxes.append(candidates.take_along_dim(best, 1).squeeze(1))  # [R, 4]
            scores.append(score.clamp(max=1))  # rounding may exceed 1
            weights = weights * (1 - overlap.take_along_dim(best, 1).squeeze(1))  # [R, C]
        return torch.stack(boxes, dim=1), torch.stack(scores, dim=1)

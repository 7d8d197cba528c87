"""The two heads of the rec family: from image tokens and text tokens to one box per expression."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vg import boxes as box_ops
from vg.losses import terms
from vg.models.layers import (
    MLP,
    RotaryTransformerLayer,
    SharedMemoryDecoderLayer,
    place_in_group,
    rotary_encoding,
    sine_encoding,
    token_centers,
)
from vg.models.rec.config import DenseHeadConfig, DenseLossConfig, PooledHeadConfig, PooledLossConfig

MAX_VOTERS = 64  # tokens; beyond these the softmax leaves next to nothing


class PooledOutput(NamedTuple):
    boxes: Tensor  # [R, 4] cxcywh 0..1


class DenseOutput(NamedTuple):
    logits: Tensor  # [R, S] how well each image token fits the expression
    boxes: Tensor  # [R, S, 4] cxcywh 0..1, the box each token proposes
    centers: Tensor  # [S, 2] (x, y) 0..1, where the tokens are


def box_terms(predicted: Tensor, target: Tensor, weights: PooledLossConfig | DenseLossConfig) -> dict[str, Tensor]:
    """The weighted box losses that are switched on: [..., 4] cxcywh each -> {term: [...]}."""
    functions = {"diou": terms.diou, "l1": terms.l1, "giou": terms.giou}
    return {
        name: getattr(weights, name) * function(predicted, target)
        for name, function in functions.items()
        if getattr(weights, name)
    }


class PooledHead(nn.Module):
    """The published head: a transformer decoder whose queries are the text tokens and whose memory is the image.

    All image tokens (class and register tokens too) are memory and no positions are added: DINOv3's rotary encoding
    has put them into its features. The mean over the real text tokens regresses (left, top, right, bottom).
    Expressions that ask about one image share its keys and values.
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

    def forward(
        self, image: Tensor, grid: tuple[int, int], text: Tensor, text_mask: Tensor, image_ids: Tensor | None = None
    ) -> PooledOutput:
        """image_ids: [R] which image each expression asks about; None where expression r asks about image r."""
        x, memory = self.text_projection(text), self.vision_projection(image)  # [R, T, D], [B, S, D]
        place = None if image_ids is None else (image_ids, place_in_group(image_ids))
        for layer in self.decoder.layers:
            x = layer(x, memory, ~text_mask, place)  # [R, T, D]
        share = text_mask / text_mask.sum(dim=1, keepdim=True)  # [R, T]
        x = self.norm((x * share.unsqueeze(-1)).sum(dim=1))  # [R, D]
        return PooledOutput(box_ops.xyxy_to_cxcywh(self.box(x).sigmoid()))

    def loss(self, output: PooledOutput, target: Tensor) -> dict[str, Tensor]:
        """target: [R, 4] cxcywh 0..1."""
        return {name: loss.mean() for name, loss in box_terms(output.boxes, target, self.config.loss).items()}

    def rank(self, output: PooledOutput) -> tuple[Tensor, Tensor]:
        """Boxes [R, 1, 4] and scores [R, 1]; this head cannot tell how sure it is, so the score is always 1."""
        center, size = output.boxes.unsqueeze(1).chunk(2, dim=-1)
        # Nothing keeps left from lying right of right, least of all before training: such a box is as good as empty.
        boxes = torch.cat((center, size.clamp(min=0)), dim=-1)
        return boxes, boxes.new_ones(boxes.shape[:2])


class DenseHead(nn.Module):
    """Our head: one transformer over image and text tokens together; each image token scores and boxes itself."""

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

    def forward(
        self, image: Tensor, grid: tuple[int, int], text: Tensor, text_mask: Tensor, image_ids: Tensor | None = None
    ) -> DenseOutput:
        """image_ids: [R] which image each expression asks about; None where expression r asks about image r."""
        num_cells = grid[0] * grid[1]
        centers = token_centers(grid, image.device)  # [S, 2]
        image = self.vision_projection(image[:, -num_cells:])  # [B, S, D] without class and register tokens
        image = image + sine_encoding(centers, self.config.width)
        if image_ids is not None:
            image = image[image_ids]  # [R, S, D]: from here on an image knows what it is asked
        x = torch.cat((image, self.text_projection(text)), dim=1)  # [R, S + T, D]
        mask = torch.cat((text_mask.new_ones(image.shape[:2]), text_mask), dim=1)  # [R, S + T]
        rotation = rotary_encoding(centers, self.config.width // self.config.heads)
        rotation = torch.cat((rotation, rotation.new_ones(text.shape[1], rotation.shape[1])))  # words have no place
        for layer in self.layers:
            x = layer(x, rotation, mask)
        x = self.norm(x[:, :num_cells])  # [R, S, D]
        center_offset, size = self.box(x).float().chunk(2, dim=-1)
        center = (torch.logit(centers) + center_offset).sigmoid()  # a token starts from its own place
        return DenseOutput(self.score(x).squeeze(-1), torch.cat((center, size.sigmoid()), dim=-1), centers)

    def loss(self, output: DenseOutput, target: Tensor) -> dict[str, Tensor]:
        """target: [R, 4] cxcywh 0..1."""
        positive = self.positive_tokens(output.centers, target)  # [R, S]
        share = positive / positive.sum(dim=1, keepdim=True)
        losses = {"token": self.config.loss.token * terms.token_cross_entropy(output.logits, positive).mean()}
        target = target.unsqueeze(1).expand_as(output.boxes)
        for name, loss in box_terms(output.boxes, target, self.config.loss).items():
            losses[name] = (loss * share).sum(dim=1).mean()
        return losses

    @staticmethod
    def positive_tokens(centers: Tensor, target: Tensor) -> Tensor:
        """Tokens whose centre lies in the box, or the nearest one where the box is too small: [R, S] bool."""
        offset = (centers - target[:, None, :2]).abs()  # [R, S, 2]
        nearest = offset.sum(dim=-1).argmin(dim=1, keepdim=True)  # [R, 1]
        inside = (offset <= target[:, None, 2:] / 2).all(dim=-1)
        return inside.scatter(1, nearest, True)

    def rank(self, output: DenseOutput) -> tuple[Tensor, Tensor]:
        """The best boxes [R, K, 4] and their scores [R, K], best first.

        A score is the IoU that the model expects: each token stands for its box with the probability the softmax gives
        it. A box that is chosen takes its share of the votes with it, so that the next one shows something else.
        """
        votes, voters = output.logits.float().softmax(dim=-1).topk(min(MAX_VOTERS, output.logits.shape[-1]))
        candidates = output.boxes.gather(1, voters.unsqueeze(-1).expand(-1, -1, 4))  # [R, V, 4]
        corners = box_ops.cxcywh_to_xyxy(candidates)
        overlap = box_ops.iou(corners.unsqueeze(1), corners.unsqueeze(2))  # [R, V, V]
        boxes, scores = [], []
        for _ in range(min(self.config.num_boxes, votes.shape[1])):
            score, best = (overlap @ votes.unsqueeze(-1)).squeeze(-1).max(dim=1)  # [R]
            sample = torch.arange(len(best), device=best.device)
            boxes.append(candidates[sample, best])
            scores.append(score.clamp(max=1))  # rounding may lead beyond
            votes = votes * (1 - overlap[sample, best])  # [R, V]
        return torch.stack(boxes, dim=1), torch.stack(scores, dim=1)

"""Language-guided query selection: the image tokens that fit a word best say where the decoder starts (section 3.3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vg.models.grounding_dino.config import ClassHeadConfig, GroundingDinoConfig
from vg.models.grounding_dino.image import ImageFeatures
from vg.models.grounding_dino.text import TextFeatures
from vg.models.layers import MLP


class ClassHead(nn.Module):
    """The logit of "this query shows what the token names": a similarity of two vectors, scaled and shifted."""

    def __init__(self, config: ClassHeadConfig, width: int):
        super().__init__()
        self.cosine = config.similarity == "cosine"
        self.factor = width**-0.5 if config.scale == "width" else 1.0
        learned = config.scale == "learned"
        at_first = math.log(1 / 0.07) if self.cosine else 0.0  # the temperature of CLIP
        self.log_scale = nn.Parameter(torch.tensor([at_first])) if learned else None
        self.bias = nn.Parameter(torch.tensor([-math.log(99)])) if config.bias else None  # a probability of 0.01

    def forward(self, queries: Tensor, text: TextFeatures) -> Tensor:
        """[R, Q, D] -> [R, Q, T] in full precision, for these numbers are ranked; -inf for padded tokens."""
        with torch.autocast(queries.device.type, enabled=False):
            queries, tokens = queries.float(), text.tokens.float()
            if self.cosine:
                queries, tokens = F.normalize(queries, dim=-1), F.normalize(tokens, dim=-1)
            factor = self.factor if self.log_scale is None else self.log_scale.exp()
            logits = queries @ (tokens * factor).mT
            if self.bias is not None:
                logits = logits + self.bias
            return logits.masked_fill(~text.mask.unsqueeze(1), -torch.inf)


class BoxHead(MLP):
    """[..., D] -> [..., 4] changes of a box cxcywh, before the sigmoid, in full precision; none at first."""

    def __init__(self, width: int):
        super().__init__(width, width, width, 4)

    def reset_parameters(self) -> None:
        for weights in self[-1].parameters():
            nn.init.zeros_(weights)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Queries(NamedTuple):
    content: Tensor  # [R, Q, D]
    references: Tensor  # [R, Q, 4] boxes before the sigmoid, without gradient
    logits: Tensor  # [R, Q, T] of the chosen image tokens, for the loss of the encoder
    boxes: Tensor  # [R, Q, 4] cxcywh 0..1, the same with gradient
    real: Tensor | None  # [R, Q] bool, False = there are fewer tokens in this image; None where all have enough


class QuerySelection(nn.Module):
    """Every image token proposes a box; those that fit any text token best become the references of the decoder.

    Their content does not: it is learned, one vector per rank (as in DINO, "mixed query selection").
    """

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.memory_projection = nn.Linear(config.width, config.width)
        self.memory_norm = nn.LayerNorm(config.width)
        self.class_head = ClassHead(config.classes, config.width)
        self.box_head = BoxHead(config.width)
        self.content = nn.Parameter(torch.empty(config.num_queries, config.width))

    def forward(self, image: ImageFeatures, text: TextFeatures) -> Queries:
        proposals = box_proposals(image)  # [R, S, 4], inf = none
        possible = proposals.isfinite().all(dim=-1, keepdim=True)  # [R, S, 1]
        memory = self.memory_norm(self.memory_projection(image.tokens.masked_fill(~possible, 0.0)))
        logits = self.class_head(memory, text)  # [R, S, T]
        count = min(len(self.content), logits.shape[1])  # a small image has fewer tokens than there are queries
        fit = logits.amax(dim=-1)  # [R, S]
        if image.mask is not None:  # else padding, all tokens of which are alike, could be chosen by the dozen
            fit = fit.masked_fill(~image.mask, -torch.inf)
        best = fit.topk(count, dim=1)
        chosen = best.indices.unsqueeze(-1)  # [R, Q, 1]

        boxes = self.box_head(memory.take_along_dim(chosen, 1)) + proposals.take_along_dim(chosen, 1)
        return Queries(
            content=self.content[:count].expand(len(logits), -1, -1),
            references=boxes.detach(),
            logits=logits.take_along_dim(chosen, 1),
            boxes=boxes.sigmoid(),
            real=None if image.mask is None else best.values.isfinite(),
        )


def box_proposals(image: ImageFeatures) -> Tensor:
    """A box around each token, before the sigmoid: 5 % of the image at the first level, twice that at the next.

    Returns:
        [R, S, 4] cxcywh; infinite where the token is padding or its box comes within 1 % of an edge of 0..1.
    """
    counts = [rows * columns for rows, columns in image.shapes]
    side = torch.cat([image.centers.new_full((n,), 0.05 * 2.0**level) for level, n in enumerate(counts)])  # [S]
    size = side.view(1, -1, 1).expand(*image.centers.shape)
    boxes = torch.cat((image.centers, size), dim=-1)  # [R, S, 4]
    possible = ((boxes > 0.01) & (boxes < 0.99)).all(dim=-1)
    if image.mask is not None:
        possible = possible & image.mask
    return boxes.logit().masked_fill(~possible.unsqueeze(-1), torch.inf)

"""Language-guided query selection: the image tokens most similar to the text initialize the decoder (section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vg.models.grounding_dino.backbone import ImageFeatures
from vg.models.grounding_dino.config import GroundingDinoConfig
from vg.models.grounding_dino.heads import BoxHead, ClassHead
from vg.models.grounding_dino.text_encoder import TextFeatures


class Queries(NamedTuple):
    content: Tensor  # [R, Q, D]
    reference_logits: Tensor  # [R, Q, 4] logits of boxes cxcywh, detached
    logits: Tensor  # [R, Q, T] of the selected image tokens, for the encoder loss
    boxes: Tensor  # [R, Q, 4] cxcywh 0..1 of the references, with gradient
    mask: Tensor | None  # [R, Q] bool, False = padding, if an image has fewer than Q tokens; None if nothing is padded


class QuerySelection(nn.Module):
    """Select the Q image tokens with the highest similarity to any text token.

    Mixed query selection (DINO): the boxes of the selected tokens become the reference boxes of the decoder queries,
    but the content of the queries is learned, one vector per rank.

    A token that is padding is never selected. A token with an invalid proposal is zeroed, but can still be selected;
    its box is (1, 1, 1, 1) (as published).
    """

    def __init__(self, config: GroundingDinoConfig):
        super().__init__()
        self.memory_projection = nn.Linear(config.width, config.width)
        self.memory_norm = nn.LayerNorm(config.width)
        self.class_head = ClassHead(config.classes, config.width)
        self.box_head = BoxHead(config.width)
        self.content = nn.Parameter(torch.empty(config.num_queries, config.width))

    def forward(self, image: ImageFeatures, text: TextFeatures) -> Queries:
        proposals = box_proposals(image)  # [R, S, 4], inf = invalid
        memory = self._memory(image, proposals)  # [R, S, D]
        logits = self.class_head(memory, text)  # [R, S, T]
        count = torch.sym_min(len(self.content), logits.shape[1])  # small images have fewer tokens than Q
        scores = logits.amax(dim=-1)  # [R, S]
        if image.mask is not None:  # padded tokens are all alike and would fill the top-k
            scores = scores.masked_fill(~image.mask, -torch.inf)
        best, indices = best_tokens(scores, count)
        selected = indices.unsqueeze(-1)  # [R, Q, 1]

        boxes = self.box_head(memory.take_along_dim(selected, 1)) + proposals.take_along_dim(selected, 1)
        return Queries(
            content=self.content[:count].expand(logits.shape[0], -1, -1),
            reference_logits=boxes.detach(),
            logits=logits.take_along_dim(selected, 1),
            boxes=boxes.sigmoid(),
            mask=None if image.mask is None else ~best.isneginf(),  # NaN is not padding: it must reach the boxes
        )

    def token_logits(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        """Return the similarity of every image token and text token, by which queries are selected: [R, S, T]."""
        return self.class_head(self._memory(image, box_proposals(image)), text)

    def _memory(self, image: ImageFeatures, proposals: Tensor) -> Tensor:
        """Project the image tokens: [R, S, D]; those with an invalid proposal are zeroed before, and all alike."""
        valid = proposals.isfinite().all(dim=-1, keepdim=True)  # [R, S, 1]
        return self.memory_norm(self.memory_projection(image.tokens.masked_fill(~valid, 0.0)))


def best_tokens(scores: Tensor, count: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    """[R, S] -> the highest scores [R, count], best first, and the indices of their tokens [R, count].

    This is a function only because vg.export.parity patches it, to select the tokens of an exported model.
    """
    top = scores.topk(count, dim=1)
    return top.values, top.indices


def box_proposals(image: ImageFeatures) -> Tensor:
    """Return a box around every token: 5% of the image at the first level, twice that at the next, and so on.

    Returns:
        [R, S, 4] logits of cxcywh; infinite if the token is padding, or if a coordinate of the box is outside of
        0.01..0.99 (published rule).
    """
    counts = [rows * columns for rows, columns in image.shapes]
    side = torch.cat([image.centers.new_full((n,), 0.05 * 2.0**level) for level, n in enumerate(counts)])  # [S]
    size = side.view(1, -1, 1).expand(*image.centers.shape)
    boxes = torch.cat((image.centers, size), dim=-1)  # [R, S, 4]
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(dim=-1)
    if image.mask is not None:
        valid = valid & image.mask
    return boxes.logit().masked_fill(~valid.unsqueeze(-1), torch.inf)

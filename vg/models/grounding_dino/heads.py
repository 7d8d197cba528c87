"""Heads that predict token logits and boxes, of the selected image tokens and of the queries of every decoder layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vg.models.grounding_dino.config import ClassHeadConfig
from vg.models.grounding_dino.text_encoder import TextFeatures
from vg.models.layers import MLP, full_precision


class ClassHead(nn.Module):
    """Token logits of queries: the similarity of a query and a text token, scaled and shifted."""

    def __init__(self, config: ClassHeadConfig, width: int):
        super().__init__()
        self.cosine = config.similarity == "cosine"
        self.factor = width**-0.5 if config.scale == "width" else 1.0
        log_scale = math.log(1 / 0.07) if self.cosine else 0.0  # at first; 0.07 is the temperature of CLIP
        self.log_scale = nn.Parameter(torch.tensor([log_scale])) if config.scale == "learned" else None
        self.bias = nn.Parameter(torch.tensor([-math.log(99)])) if config.bias else None  # a probability of 0.01

    def forward(self, queries: Tensor, text: TextFeatures) -> Tensor:
        """[R, Q, D] -> [R, Q, T], -inf for padded tokens; in full precision, because these logits are ranked."""
        with full_precision(queries):
            queries, tokens = queries.float(), text.tokens.float()
            if self.cosine:
                queries, tokens = F.normalize(queries, dim=-1), F.normalize(tokens, dim=-1)
            factor = self.factor if self.log_scale is None else self.log_scale.exp()
            logits = queries @ (tokens * factor).mT
            if self.bias is not None:
                logits = logits + self.bias
            return logits.masked_fill(~text.mask.unsqueeze(1), -torch.inf)


class BoxHead(MLP):
    """[..., D] -> [..., 4] offsets to the logits of a box cxcywh, in full precision; zero after initialization."""

    def __init__(self, width: int):
        super().__init__(width, width, width, 4)

    def reset_parameters(self) -> None:
        for weights in self[-1].parameters():
            nn.init.zeros_(weights)

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(x.float())

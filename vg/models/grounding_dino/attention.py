"""The two kinds of attention that every layer of Grounding DINO is built from, and small functions around them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vg.models.layers import MLP
from vg.ops import deform_attn_fused

Shapes = tuple[tuple[int, int], ...]  # (height, width) in tokens of each level


class Attention(nn.Module):
    """Multi-head softmax attention with its four projections (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def reset_parameters(self) -> None:
        """Initialize like nn.MultiheadAttention, which has one matrix for query, key and value."""
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(projection.weight, gain=1 if projection is self.output else 0.5**0.5)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[R, Q, D], [R, K, D], [R, K, D] -> [R, Q, D].

        mask: broadcasts to [R, heads, Q, K]; bool (True = may attend) or float, added to the scores; see additive_mask.
        """
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [R, heads, Q or K, D / heads]
            for projection, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        x = F.scaled_dot_product_attention(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.output(x.transpose(1, 2).flatten(2))


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask (True = may attend) to a float mask that is added to the attention scores.

    It is done once, because all layers share it.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2021): a query samples a few points around its reference."""

    def __init__(self, width: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """Start with head h sampling in direction 2 pi h / heads, point p at p + 1 pixels, with equal weights."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)  # [heads, 2]
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1) * direction.view(self.heads, 1, 1, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(steps.expand(-1, self.levels, -1, -1).flatten())
        for weights in (self.offsets.weight, self.weights.weight, self.weights.bias, self.value.bias, self.output.bias):
            nn.init.zeros_(weights)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.output.weight)

    def forward(self, query: Tensor, references: Tensor, memory: Tensor, shapes: Shapes, mask: Tensor | None) -> Tensor:
        """Sample the memory around the references.

        Args:
            query: [R, Q, D]
            references: [R, Q, levels or 1, 2 or 4] float32, points (x, y) or boxes cxcywh, 0..1 of the padded image.
            memory: [R, S, D] image tokens of all levels.
            shapes: (height, width) of each level.
            mask: [R, S] bool, False = padding; None if nothing is padded.

        Returns:
            [R, Q, D]
        """
        value = self.value(memory)
        if mask is not None:
            value = value.masked_fill(~mask.unsqueeze(-1), 0.0)  # after the projection: its bias must not leak
        x = deform_attn_fused(
            value.unflatten(-1, (self.heads, -1)),  # [R, S, heads, D / heads]
            shapes,
            references,
            self.offsets(query).unflatten(-1, (self.heads, self.levels, self.points, 2)),
            self.weights(query).unflatten(-1, (self.heads, -1)),  # [R, Q, heads, levels * points]
        )
        return self.output(x)


class FeedForward(MLP):
    """Linear, ReLU, dropout, linear: [R, S, D] -> [R, S, D]."""

    def __init__(self, width: int, inner: int, dropout: float = 0.0):
        super().__init__(width, inner, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        expand, _, contract = self
        return contract(F.dropout(F.relu(expand(x), inplace=True), self.dropout, self.training))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (Huang et al. 2016): zero whole samples of a residual branch [R, ...] with probability rate."""
    if not training or rate == 0:
        return x
    kept = x.new_empty(len(x), *(1 for _ in x.shape[1:])).bernoulli_(1 - rate)
    return x * kept / (1 - rate)


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Return the logit of x in 0..1, with x and 1 - x clamped to at least eps."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))

"""Layers that more than one model uses."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Sequential):
    """Linear layers with GELU or ReLU between them: MLP(512, 256, 4) maps 512 -> 256 -> 4."""

    def __init__(self, *sizes: int, activation: type[nn.Module] = nn.ReLU):
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*layers[:-1])


def token_centers(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Centres of the cells of a (rows, columns) grid over the image, row by row: [S, 2] as (x, y) in 0..1."""
    rows, columns = grid
    y = (torch.arange(rows, device=device) + 0.5) / rows
    x = (torch.arange(columns, device=device) + 0.5) / columns
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1).flip(-1)


def sine_encoding(positions: Tensor, dim: int, temperature: float = 20.0, interleaved: bool = False) -> Tensor:
    """Sine encoding of coordinates (Vaswani et al. 2017), as DETR uses it in two dimensions: one turn from 0 to 1.

    Args:
        positions: [..., C] coordinates, any C that divides dim.
        dim: size of the encoding; each coordinate gets dim / C channels.
        interleaved: sines and cosines of a coordinate take turns, as in the DETR family; else they come in halves.

    Returns:
        [..., dim] float32 (float64 for float64 positions)
    """
    per_axis = dim // positions.shape[-1]
    positions = positions if positions.dtype == torch.float64 else positions.float()
    steps = torch.arange(per_axis // 2, device=positions.device, dtype=positions.dtype)
    frequency = 2 * math.pi * temperature ** (-2 * steps / per_axis)
    angle = positions.unsqueeze(-1) * frequency  # [..., C, per_axis / 2]
    waves = (angle.sin(), angle.cos())
    return torch.stack(waves, dim=-1).flatten(-3) if interleaved else torch.cat(waves, dim=-1).flatten(-2)  # [..., dim]


def rotary_encoding(positions: Tensor, head_width: int, temperature: float = 100.0) -> Tensor:
    """Rotary encoding of points in the plane (Su et al. 2021; half of the channels per axis, as DINOv3 has it).

    Args:
        positions: [S, 2] as (x, y) in 0..1; the fastest channels turn twice on the way through the image.
        head_width: channels of one attention head, divisible by 4.

    Returns:
        [S, head_width / 2] complex numbers of length 1: to multiply a query and a key by those of their places makes
        their product depend on how far, and in which direction, one lies from the other.
    """
    steps = torch.arange(head_width // 4, device=positions.device, dtype=torch.float32)
    frequency = 4 * math.pi * temperature ** (-4 * steps / head_width)
    angle = (positions.float().unsqueeze(-1) * frequency).flatten(1)  # [S, head_width / 2]
    return torch.polar(torch.ones_like(angle), angle)


def place_in_group(groups: Tensor) -> Tensor:
    """How many entries of the same group come before each: [R] int64, for groups [R] int64 in any order."""
    same = groups.unsqueeze(0) == groups.unsqueeze(1)  # [R, R]
    return same.tril(diagonal=-1).sum(dim=1)


class SharedMemoryDecoderLayer(nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer (post-norm, ReLU) where several rows may ask the same memory.

    Its keys and values are projected once for all of them: their queries stand in one row, for queries of one row do
    not see each other.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, memory: Tensor, padding: Tensor, place: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """One layer.

        Args:
            x: [R, T, D]
            memory: [B, S, D]
            padding: [R, T] bool, True = no token.
            place: [R] which memory a row asks, and [R] its place among the rows that ask the same; None where row r
                asks memory r.

        Returns:
            [R, T, D]
        """
        attended = self.self_attn(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        x = self.norm1(x + self.dropout1(attended))
        if place is None:
            attended = self.multihead_attn(x, memory, memory, need_weights=False)[0]
        else:
            most = int(place[1].max()) + 1
            queries = x.new_zeros(len(memory), most, *x.shape[1:])  # [B, most, T, D]
            queries = queries.index_put(place, x).flatten(1, 2)  # [B, most x T, D]
            attended = self.multihead_attn(queries, memory, memory, need_weights=False)[0]
            attended = attended.unflatten(1, (most, -1))[place]  # [R, T, D]
        x = self.norm2(x + self.dropout2(attended))
        return self.norm3(x + self.dropout3(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class RotaryTransformerLayer(nn.Module):
    """A transformer encoder layer (pre-norm) whose attention sees where tokens lie relative to each other.

    Args:
        width: channels of a token, D; a multiple of 4 for each head.
    """

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key = nn.Linear(width, 2 * width)
        self.value = nn.Linear(width, width)
        self.attention_output = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = MLP(width, feedforward, width, activation=nn.GELU)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        """One layer.

        Args:
            x: [B, S, D]
            rotation: [S, D / heads / 2] complex, see rotary_encoding; 1 for a token that has no place.
            mask: [B, S] bool, True = a token that others may attend to.

        Returns:
            [B, S, D]
        """
        x = x + self._drop(self._attend(self.attention_norm(x), rotation, mask))
        return x + self._drop(self.feedforward(self.feedforward_norm(x)))

    def _attend(self, x: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        value = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, S, D / heads]
        query_key = (
            self.query_key(x).float().unflatten(-1, (2 * self.heads, -1, 2))
        )  # [B, S, 2 heads, D / heads / 2, 2]
        rotated = torch.view_as_real(torch.view_as_complex(query_key) * rotation.unsqueeze(1))  # one pass, not six
        query, key = rotated.flatten(-2).to(value.dtype).transpose(1, 2).chunk(2, dim=1)  # [B, heads, S, D / heads]
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, mask[:, None, None], dropout)
        return self.attention_output(x.transpose(1, 2).flatten(2))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

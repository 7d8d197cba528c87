"""Layers of the rec heads, and the positions of their image tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vg.models.layers import MLP


def token_centers(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return the centers of the cells of a (rows, columns) grid in row-major order: [S, 2] as (x, y) in 0..1."""
    rows, columns = grid
    y = (torch.arange(rows, device=device) + 0.5) / rows
    x = (torch.arange(columns, device=device) + 0.5) / columns
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1).flip(-1)


def padded_centers(grids: Sequence[tuple[int, int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return the centers of the cells of several grids, (0.5, 0.5) for padding, and a mask, False for padding.

    Shapes are [B, S, 2] and [B, S] bool, where S are the cells of the largest grid.
    """
    size = max(rows * columns for rows, columns in grids)
    centers, masks = {}, {}
    for grid in dict.fromkeys(grids):
        cells = grid[0] * grid[1]
        centers[grid] = F.pad(token_centers(grid, device), (0, 0, 0, size - cells), value=0.5)
        masks[grid] = torch.arange(size, device=device) < cells
    return torch.stack([centers[grid] for grid in grids]), torch.stack([masks[grid] for grid in grids])


def rotary_encoding(positions: Tensor, head_width: int, temperature: float = 100.0) -> Tensor:
    """Rotary encoding of 2D positions (Su et al. 2021; half of the channels per axis, as in DINOv3).

    Return [..., head_width / 2, 2], pairs (cosine, sine): complex numbers of magnitude 1. With query and key multiplied
    by those of their positions, their dot product depends on the relative position only.

    Args:
        positions: [..., 2] as (x, y) in 0..1; the highest frequency has two periods per image side.
        head_width: channels of one attention head, divisible by 4.
    """
    steps = torch.arange(head_width // 4, device=positions.device, dtype=torch.float32)
    frequency = 4 * math.pi * temperature ** (-4 * steps / head_width)
    angle = (positions.float().unsqueeze(-1) * frequency).flatten(-2)  # [..., head_width / 2]
    if torch.compiler.is_exporting():  # ONNX has no complex numbers
        return torch.stack((angle.cos(), angle.sin()), dim=-1)
    return torch.view_as_real(torch.polar(torch.ones_like(angle), angle))


def complex_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply complex numbers, given as pairs (real, imaginary) that broadcast: [..., 2] each -> [..., 2]."""
    if torch.compiler.is_exporting():
        (real, imaginary), (cosine, sine) = a.unbind(-1), b.unbind(-1)
        return torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), dim=-1)
    return torch.view_as_real(torch.view_as_complex(a) * torch.view_as_complex(b))  # one pass over memory, not six


def index_in_group(groups: Tensor) -> Tensor:
    """Return for each entry how many earlier ones have the same group: [R] int64, for groups [R] int64 in any order."""
    same = groups.unsqueeze(0) == groups.unsqueeze(1)  # [R, R]
    return same.tril(diagonal=-1).sum(dim=1)


class SharedMemoryDecoderLayer(nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer (post-norm, ReLU) in which several rows may attend to the same memory.

    Its keys and values are projected once: the queries of all these rows are concatenated into one, which changes
    nothing because queries do not see each other in cross-attention.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        memory: Tensor,
        padding: Tensor,
        rows: tuple[Tensor, Tensor, int] | None,
        memory_padding: Tensor | None = None,
    ) -> Tensor:
        """Return [R, T, D] for x [R, T, D] and memory [B, S, D].

        Args:
            padding: [R, T] bool, True = padding.
            rows: [R] index of the memory of each row, [R] index among the rows with the same memory, and the largest
                number of rows with the same memory; None if row r has memory r.
            memory_padding: [B, S] bool, True = padding.
        """
        attended = self.self_attn(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        x = self.norm1(x + self.dropout1(attended))
        if rows is None:
            attended = self.multihead_attn(x, memory, memory, memory_padding, need_weights=False)[0]
        else:
            memory_ids, order, max_rows = rows
            queries = x.new_zeros(len(memory), max_rows, *x.shape[1:])  # [B, max_rows, T, D]
            queries = queries.index_put((memory_ids, order), x).flatten(1, 2)  # [B, max_rows x T, D]
            attended = self.multihead_attn(queries, memory, memory, memory_padding, need_weights=False)[0]
            attended = attended.unflatten(1, (max_rows, -1))[memory_ids, order]  # [R, T, D]
        x = self.norm2(x + self.dropout2(attended))
        return self.norm3(x + self.dropout3(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class RotaryTransformerLayer(nn.Module):
    """Transformer encoder layer (pre-norm) with rotary position encoding in its attention.

    Args:
        width: channels D of a token, a multiple of 4 x heads.
    """

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.query_key = nn.Linear(width, 2 * width)
        self.value = nn.Linear(width, width)
        self.attention_output = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = MLP(width, feedforward, width, activation=nn.GELU)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        """Return [B, S, D] for x [B, S, D].

        Args:
            rotation: [S, D / heads / 2, 2] or [B, S, D / heads / 2, 2], see rotary_encoding; (1, 0) for a token without
                position.
            mask: [B, S] bool, False = padding, which no token attends to.
        """
        x = x + self.dropout(self._attend(self.attention_norm(x), rotation, mask))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))

    def _attend(self, x: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        value = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, S, D / heads]
        # [B, S, 2 heads, D / heads / 2, 2]
        query_key = self.query_key(x).float().unflatten(-1, (2 * self.heads, -1, 2))
        rotated = complex_product(query_key, rotation.unsqueeze(-3))
        query, key = rotated.flatten(-2).to(value.dtype).transpose(1, 2).chunk(2, dim=1)  # [B, heads, S, D / heads]
        dropout = self.dropout.p if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, mask[:, None, None], dropout)
        return self.attention_output(x.transpose(1, 2).flatten(2))

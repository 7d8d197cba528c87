"""Layers that more than one model uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear layers with GELU or ReLU between them: MLP(512, 256, 4) maps 512 -> 256 -> 4."""

    def __init__(self, *sizes: int, activation: type[nn.Module] = nn.ReLU):
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*layers[:-1])


def token_centers(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Centres of the cells of a (rows, columns) grid over the image, row by row: [S, 2] as (x, y) in 0..1."""
    rows, columns = grid
    y = (torch.arange(rows, device=device) + 0.5) / rows
    x = (torch.arange(columns, device=device) + 0.5) / columns
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1).flip(-1)


def sine_encoding(positions: Tensor, dim: int, temperature: float = 20.0) -> Tensor:
    """Sine encoding of coordinates in 0..1 (Vaswani et al. 2017, as DETR uses it in two dimensions).

    Args:
        positions: [..., C] coordinates, any C that divides dim.
        dim: size of the encoding; each coordinate gets dim / C channels, sines and cosines in halves.

    Returns:
        [..., dim] float32
    """
    per_axis = dim // positions.shape[-1]
    steps = torch.arange(per_axis // 2, device=positions.device, dtype=torch.float32)
    frequency = 2 * math.pi * temperature ** (-2 * steps / per_axis)
    angle = positions.float().unsqueeze(-1) * frequency  # [..., C, per_axis / 2]
    return torch.cat((angle.sin(), angle.cos()), dim=-1).flatten(-2)  # [..., dim]

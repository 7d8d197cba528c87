"""Layers of both model families."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear layers with GELU or ReLU between them: MLP(512, 256, 4) maps 512 -> 256 -> 4."""

    def __init__(self, *sizes: int, activation: type[nn.Module] = nn.ReLU):
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*layers[:-1])


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast: bfloat16 has 8 bits, which costs a box of a tenth of the image 0.03 IoU."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # meta has no autocast


def sine_encoding(positions: Tensor, dim: int, temperature: float = 20.0, interleaved: bool = False) -> Tensor:
    """Sine encoding of coordinates (Vaswani et al. 2017; DETR): [..., C] -> [..., dim], one period from 0 to 1.

    Args:
        positions: any C that divides dim; the encoding is float32.
        dim: size of the encoding; each coordinate gets dim / C channels.
        interleaved: sines and cosines of a coordinate alternate, as in the DETR family; otherwise all sines come first.
    """
    per_axis = dim // positions.shape[-1]
    steps = torch.arange(per_axis // 2, device=positions.device, dtype=torch.float32)
    frequency = 2 * math.pi * temperature ** (-2 * steps / per_axis)
    angle = positions.float().unsqueeze(-1) * frequency  # [..., C, per_axis / 2]
    waves = (angle.sin(), angle.cos())
    return torch.stack(waves, dim=-1).flatten(-3) if interleaved else torch.cat(waves, dim=-1).flatten(-2)  # [..., dim]

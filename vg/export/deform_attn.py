"""Two forms of deformable attention in standard operators, which replace vg's own operator in exported programs.

Shapes: B batch, Q queries, H heads, L levels, P points per level, D channels of a head, S pixels of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vg.ops.reference import attention_weights, sampling_locations

Form = Literal["gather", "grid-sample"]


def deform_attn_fused(
    form: Form, value: Tensor, shapes: Sequence[Any], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Compute `vg.ops.deform_attn_fused`: [B, Q, H * D].

    Args:
        form: "gather" reads the four pixels around each point, "grid-sample" is one GridSample per level.
        value: [B, S, H, D]
        shapes: height and width of each level, one after the other.
        references: [B, Q, L or 1, 2 or 4] points (x, y) or boxes cxcywh in 0..1.
        offsets: [B, Q, H, L, P, 2]
        logits: [B, Q, H, L * P]
    """
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    weights = attention_weights(logits, len(pairs))  # [B, Q, H, L, P]
    locations = sampling_locations(pairs, references, offsets)  # [B, Q, H, L, P, 2]
    sample = _by_gather if form == "gather" else _by_grid_sample
    return sample(value, pairs, locations, weights).flatten(2)


def _by_grid_sample(value: Tensor, pairs: Sequence[tuple[Any, Any]], locations: Tensor, weights: Tensor) -> Tensor:
    grids = (2 * locations - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)  # [B * H, L, Q, P, 2]
    images = value.permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in pairs], dim=2)
    sampled = [
        F.grid_sample(image.unflatten(2, size), grids[:, level], padding_mode="zeros", align_corners=False)
        for level, (image, size) in enumerate(zip(images, pairs, strict=True))
    ]  # L times [B * H, D, Q, P]
    shares = weights.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(2)  # [B * H, Q, L * P]
    summed = (torch.cat(sampled, dim=-1) * shares.unsqueeze(1)).sum(dim=-1)  # [B * H, D, Q]
    return summed.unflatten(0, (value.shape[0], value.shape[2])).permute(0, 3, 1, 2)  # [B, Q, H, D]


def _by_gather(value: Tensor, pairs: Sequence[tuple[Any, Any]], locations: Tensor, weights: Tensor) -> Tensor:
    B, S, H, _ = value.shape
    height, width = locations.new_tensor(pairs).unsqueeze(-1).unbind(1)  # [L, 1]
    area = height * width
    begin = (area.cumsum(0) - area).long()  # [L, 1] first pixel of the level
    first = (torch.arange(B, device=value.device) * S).view(-1, 1, 1, 1, 1) + begin  # [B, 1, 1, L, 1]
    head = torch.arange(H, device=value.device).view(-1, 1, 1)
    table = value.flatten(0, 2)  # [B * S * H, D]
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5  # pixel centers are at 0, 1, 2, ...
    left, top = x.floor(), y.floor()
    terms = []
    for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * weights  # [B, Q, H, L, P]
        pixel = (row * width + column).where(inside, 0).long()
        pixels = F.embedding((first + pixel) * H + head, table).flatten(3, 4)  # [B, Q, H, L * P, D]
        terms.append(share.where(inside, 0).flatten(3).unsqueeze(-2) @ pixels)
    return (terms[0] + terms[1] + terms[2] + terms[3]).squeeze(-2)

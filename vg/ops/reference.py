"""Multi-scale deformable attention in plain PyTorch: what the compiled kernels must equal, and what runs without them.

Shapes: B batch, Q queries, H heads, L levels, P points per level, D channels of a head, S pixels of all levels.
A level is (height, width); its pixels lie row by row in value, one level after the other. All arithmetic is float32
(float64 for float64 values) whatever the dtype of the values, so locations and reference points have that dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shapes = Sequence[tuple[int, int]]


def compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


# ---- the sampled points -------------------------------------------------------------------------------------------


class Corner(NamedTuple):
    """One of the four pixels around each sampled point of a level; every tensor is [B, Q, H, P].

    A pixel outside of the level, or around a location that is no finite number, has inside False, pixel 0, and
    share and slopes 0: nothing of it may reach a sum, because 0 times an infinite value would be NaN.
    """

    inside: Tensor
    pixel: Tensor  # row * width + column
    share: Tensor  # of the point's value, 0..1: bilinear
    slope_x: Tensor  # change of the share when the point moves one pixel to the right ...
    slope_y: Tensor  # ... and down


def corners(locations: Tensor, height: int, width: int) -> Iterator[Corner]:
    """The four corners of locations [B, Q, H, P, 2], (x, y) in 0..1 of a level: 0 is its left edge and 1 its right."""
    x, y = (locations * locations.new_tensor([width, height]) - 0.5).unbind(-1)  # pixel centres at 0, 1, 2, ...
    for down in (0, 1):
        for right in (0, 1):
            column, row = x.floor() + right, y.floor() + down
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)  # False for NaN
            share_x = (1 - (x - column).abs()).where(inside, 0)
            share_y = (1 - (y - row).abs()).where(inside, 0)
            pixel = row.where(inside, 0).long() * width + column.where(inside, 0).long()
            yield Corner(
                inside, pixel, share_x * share_y, share_y if right else -share_y, share_x if down else -share_x
            )


def pixels_of_levels(value: Tensor, shapes: Shapes) -> Iterator[tuple[int, int, int, Tensor]]:
    """(level, height, width, pixels [B, height * width, H, D]) of the levels that have pixels."""
    start = 0
    for level, (height, width) in enumerate(shapes):
        end = start + height * width
        if end > start:
            yield level, height, width, value[:, start:end]
        start = end


def _places(corner: Corner) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the corner's pixels in the pixels of a level, [B, height * width, H, ...]."""
    batch, _, heads, _ = corner.pixel.shape
    device = corner.pixel.device
    return (
        torch.arange(batch, device=device)[:, None, None, None],
        corner.pixel,
        torch.arange(heads, device=device)[:, None],
    )


# ---- the op -------------------------------------------------------------------------------------------------------


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """See vg.ops.deform_attn. [B, Q, H * D]"""
    B, Q, H = locations.shape[:3]
    output = value.new_zeros((B, Q, H, value.shape[3]), dtype=compute_dtype(value))
    for level, height, width, pixels in pixels_of_levels(value, shapes):
        for corner in corners(locations[:, :, :, level], height, width):
            share = corner.share * weights[:, :, :, level]  # [B, Q, H, P]
            picked = pixels[_places(corner)].to(output.dtype)  # [B, Q, H, P, D]
            output += (share[..., None] * picked).where(corner.inside[..., None], 0).sum(3)
    return output.flatten(2).to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, given that of the output, grad [B, Q, H * D]."""
    dtype = compute_dtype(value)
    grad = grad.unflatten(2, value.shape[2:]).to(dtype)[:, :, :, None]  # [B, Q, H, 1, D]
    grad_value, grad_locations, grad_weights = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (value, locations, weights)
    )
    for (level, height, width, pixels), (*_, grad_pixels) in zip(
        pixels_of_levels(value, shapes), pixels_of_levels(grad_value, shapes), strict=True
    ):
        weight = weights[:, :, :, level].to(dtype)  # [B, Q, H, P]
        for corner in corners(locations[:, :, :, level], height, width):
            places = _places(corner)
            grad_picked = (corner.share * weight)[..., None] * grad  # [B, Q, H, P, D]
            grad_pixels.index_put_(places, grad_picked.where(corner.inside[..., None], 0), accumulate=True)
            match = (grad * pixels[places].to(dtype)).sum(-1).where(corner.inside, 0)  # [B, Q, H, P]
            grad_weights[:, :, :, level] += corner.share * match
            grad_locations[:, :, :, level, :, 0] += corner.slope_x * width * weight * match
            grad_locations[:, :, :, level, :, 1] += corner.slope_y * height * weight * match
    return grad_value.to(value.dtype), grad_locations, grad_weights.to(weights.dtype)


# ---- the same with softmax and sampling locations inside ----------------------------------------------------------


def offset_scale(shapes: Shapes, reference_points: Tensor, points: int) -> Tensor:
    """What one unit of an offset is, in 0..1: a pixel of the level, or 1/2P of the box. [B | 1, Q | 1, 1, L, 1, 2]

    This is Deformable DETR's rule, so that its weights and those of its descendants keep their meaning.
    """
    if reference_points.shape[-1] == 4:
        return reference_points[:, :, None, :, None, 2:] * (0.5 / points)  # [B, Q, 1, L | 1, 1, 2]
    # An empty level has no pixel: any finite number will do, nothing is sampled there.
    sizes = reference_points.new_tensor([(max(width, 1), max(height, 1)) for height, width in shapes])  # [L, 2]
    return sizes.reciprocal()[:, None]  # [L, 1, 2]


def sampling_locations(shapes: Shapes, reference_points: Tensor, offsets: Tensor) -> Tensor:
    """[B, Q, H, L, P, 2] from reference points [B, Q, L | 1, 2 | 4] and offsets [B, Q, H, L, P, 2]."""
    scale = offset_scale(shapes, reference_points, offsets.shape[4])
    return reference_points[:, :, None, :, None, :2] + offsets * scale


def attention_weights(logits: Tensor, levels: int) -> Tensor:
    """[B, Q, H, L, P] from logits [B, Q, H, L * P]: they sum to 1 over all points of all levels."""
    return logits.softmax(-1).unflatten(-1, (levels, -1) if levels else (0, 0))


def fused_forward(value: Tensor, shapes: Shapes, reference_points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """See vg.ops.deform_attn_fused. [B, Q, H * D]"""
    offsets, logits = offsets.to(reference_points.dtype), logits.to(reference_points.dtype)
    locations = sampling_locations(shapes, reference_points, offsets)
    return forward(value, shapes, locations, attention_weights(logits, len(shapes)))


def fused_backward(
    grad: Tensor, value: Tensor, shapes: Shapes, reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, reference points, offsets and logits, given that of the output, grad [B, Q, H * D]."""
    given, dtype = offsets.dtype, reference_points.dtype
    offsets, logits = offsets.to(dtype), logits.to(dtype)
    locations = sampling_locations(shapes, reference_points, offsets)
    weights = attention_weights(logits, len(shapes))
    grad_value, grad_locations, grad_weights = backward(grad, value, shapes, locations, weights)

    weights, grad_weights = weights.flatten(3), grad_weights.flatten(3)  # [B, Q, H, L * P]
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))

    points = offsets.shape[4]
    finite = locations.isfinite()  # elsewhere a gradient of 0 would meet an infinite factor
    grad_offsets = (grad_locations * offset_scale(shapes, reference_points, points)).where(finite, 0)
    grad_reference = grad_locations
    if reference_points.shape[-1] == 4:
        grad_size = (grad_locations * offsets * (0.5 / points)).where(finite, 0)
        grad_reference = torch.cat((grad_locations, grad_size), dim=-1)  # [B, Q, H, L, P, 4]
    grad_reference = grad_reference.sum((2, 4))  # [B, Q, L, 2 | 4]
    grad_reference = grad_reference.sum_to_size(reference_points.shape)
    return grad_value, grad_reference, grad_offsets.to(given), grad_logits.to(given)

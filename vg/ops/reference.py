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
from torch.nn.functional import embedding_bag, pad

Shapes = Sequence[tuple[int, int]]


def compute_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


# ---- the sampled points -------------------------------------------------------------------------------------------


class Corners(NamedTuple):
    """The four pixels around each sampled point of a level; every tensor is [B, Q, H, 4, P].

    A pixel outside of the level, or around a location that is no finite number, has inside False, the last row, which
    is 0, and share and slopes 0: nothing of it may reach a sum, because 0 times an infinite value would be NaN.
    """

    inside: Tensor
    row: Tensor  # of the level's table
    share: Tensor  # of the point's value, 0..1: bilinear
    slope_x: Tensor  # change of the share when the point moves one pixel to the right ...
    slope_y: Tensor  # ... and down


def corners(locations: Tensor, height: int, width: int) -> Corners:
    """The corners of locations [B, Q, H, P, 2], (x, y) in 0..1 of a level: 0 is its left edge and 1 its right."""
    B, _, H = locations.shape[:3]
    image = torch.arange(B, device=locations.device)[:, None, None, None]
    head = torch.arange(H, device=locations.device)[:, None]
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5  # pixel centres at 0, 1, 2, ...
    found = []
    for down in (0, 1):
        for right in (0, 1):
            column, row = x.floor() + right, y.floor() + down
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)  # False for NaN
            share_x = (1 - (x - column).abs()).where(inside, 0)
            share_y = (1 - (y - row).abs()).where(inside, 0)
            pixel = (image * height + row.where(inside, 0).long()) * width + column.where(inside, 0).long()
            table_row = (pixel * H + head).where(inside, B * height * width * H)
            slopes = (share_y if right else -share_y, share_x if down else -share_x)
            found.append((inside, table_row, share_x * share_y, *slopes))
    return Corners(*(torch.stack(tensors, 3) for tensors in zip(*found, strict=True)))


def levels_with_pixels(shapes: Shapes) -> Iterator[tuple[int, int, int, slice]]:
    """(level, height, width, where its pixels are in S)."""
    start = 0
    for level, (height, width) in enumerate(shapes):
        end = start + height * width
        if end > start:
            yield level, height, width, slice(start, end)
        start = end


def table_of(pixels: Tensor) -> Tensor:
    """A row for each pixel and head of pixels [B, height * width, H, D], and one of 0 for what lies outside."""
    return pad(pixels.to(compute_dtype(pixels)).flatten(0, 2), (0, 0, 0, 1))  # [B * height * width * H + 1, D]


# ---- weighted sums of rows; the rows themselves, side by side, would take D times the memory of their shares --------


def _by_place(x: Tensor) -> Tensor:
    """[B, Q, H, 4, P] as [N, K] = [B * Q * H, 4 * P]: all that one place of the output sums."""
    return x.flatten(3).flatten(0, 2)


def weighted_sums(table: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
    """For each of N places the sum of its K rows of the table times their shares, all [N, K]. [N, D]"""
    return embedding_bag(rows, table, per_sample_weights=shares, mode="sum")


def weighted_sums_backward(grad: Tensor, table: Tensor, rows: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the table and of the shares, given that of the sums, grad [N, D]."""
    (places, per_place), outside = rows.shape, len(table) - 1
    place = torch.arange(places, device=rows.device).repeat_interleave(per_place)  # [N * K]
    starts = torch.arange(places, device=rows.device) * per_place
    # What autograd would call; there is no autograd inside of an operator.
    grad_shares = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, table, rows.flatten(), starts, place, 0, outside
    )
    # The same sum the other way round: for each row its places. In sorted order every run gives the same bits.
    ordered, order = rows.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(len(table), device=rows.device))
    sums = embedding_bag(place[order], grad, starts, per_sample_weights=shares.flatten()[order], mode="sum")
    return sums, grad_shares.view(rows.shape)


# ---- the op -------------------------------------------------------------------------------------------------------


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """See vg.ops.deform_attn. [B, Q, H * D]"""
    B, Q, H = locations.shape[:3]
    output = value.new_zeros((B * Q * H, value.shape[3]), dtype=compute_dtype(value))
    for level, height, width, where in levels_with_pixels(shapes):
        corner = corners(locations[:, :, :, level], height, width)
        share = (corner.share * weights[:, :, :, None, level]).where(corner.inside, 0)  # [B, Q, H, 4, P]
        output += weighted_sums(table_of(value[:, where]), _by_place(corner.row), _by_place(share))
    return output.view(B, Q, H * value.shape[3]).to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, given that of the output, grad [B, Q, H * D]."""
    dtype = compute_dtype(value)
    grad = grad.to(dtype).reshape(-1, value.shape[3])  # [B * Q * H, D]
    grad_value, grad_locations, grad_weights = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (value, locations, weights)
    )
    for level, height, width, where in levels_with_pixels(shapes):
        weight = weights[:, :, :, None, level].to(dtype)  # [B, Q, H, 1, P]
        corner = corners(locations[:, :, :, level], height, width)
        rows, shares = _by_place(corner.row), _by_place(corner.share * weight)
        grad_table, match = weighted_sums_backward(grad, table_of(value[:, where]), rows, shares)
        grad_value[:, where] = grad_table[:-1].view(grad_value[:, where].shape)
        match = match.view(corner.row.shape)  # [B, Q, H, 4, P]
        grad_weights[:, :, :, level] = (corner.share * match).sum(3)
        grad_locations[:, :, :, level, :, 0] = (corner.slope_x * weight * match).sum(3) * width
        grad_locations[:, :, :, level, :, 1] = (corner.slope_y * weight * match).sum(3) * height
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

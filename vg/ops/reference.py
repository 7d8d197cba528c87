"""Multi-scale deformable attention in PyTorch: the reference for the compiled kernels and the fallback without them.

Shapes: B batch, Q queries, H heads, L levels, P points per level, D channels of a head, S pixels of all levels.
A level is (height, width); value contains its pixels row by row, level after level. All arithmetic is float32 (float64
for float64 values) for every dtype of the values, and locations and reference points have that dtype.
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

    A pixel outside of the level or around a non-finite location has inside=False, the index of the table's last row
    (zeros), and zero share and slopes. It must never be read, because 0 times an infinite value would be NaN.
    """

    inside: Tensor
    row: Tensor  # index into the level's table
    share: Tensor  # bilinear weight, 0..1
    slope_x: Tensor  # derivative of the share by x, in pixels
    slope_y: Tensor  # and by y


def corners(locations: Tensor, height: int, width: int) -> Corners:
    """Return the corners of locations [B, Q, H, P, 2]: (x, y) from 0 (left, upper edge of the level) to 1."""
    B, _, H = locations.shape[:3]
    image = torch.arange(B, device=locations.device)[:, None, None, None]
    head = torch.arange(H, device=locations.device)[:, None]
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5  # pixel centers at 0, 1, 2, ...
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
    """Yield (level, height, width, slice of its pixels in S) of all levels that are not empty."""
    start = 0
    for level, (height, width) in enumerate(shapes):
        end = start + height * width
        if end > start:
            yield level, height, width, slice(start, end)
        start = end


def table_of(pixels: Tensor) -> Tensor:
    """Return one row per pixel and head of pixels [B, height * width, H, D], and a row of zeros for points outside."""
    return pad(pixels.to(compute_dtype(pixels)).flatten(0, 2), (0, 0, 0, 1))  # [B * height * width * H + 1, D]


# ---- weighted sums of rows, without gathering the rows, which would take D times the memory of their shares ---------


def _by_sum(x: Tensor) -> Tensor:
    """Reshape [B, Q, H, 4, P] to [N, K] = [B * Q * H, 4 * P]: the K terms of each of the N sums of the output."""
    return x.flatten(3).flatten(0, 2)


def embedding_bag_backward(grad: Tensor, table: Tensor, rows: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of table and shares [N, K], given the gradient [N, D] of N sums of K rows of the table."""
    (N, K), outside = rows.shape, len(table) - 1
    sum_ids = torch.arange(N, device=rows.device).repeat_interleave(K)  # [N * K]
    starts = torch.arange(N, device=rows.device) * K
    # The function that autograd would call; autograd does not run inside of an operator.
    grad_shares = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, table, rows.flatten(), starts, sum_ids, 0, outside
    )
    # The transposed sum: over all terms of each row. The sorted order makes it deterministic.
    ordered, order = rows.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(len(table), device=rows.device))
    sums = embedding_bag(sum_ids[order], grad, starts, per_sample_weights=shares.flatten()[order], mode="sum")
    return sums, grad_shares.view(rows.shape)


# ---- the op -------------------------------------------------------------------------------------------------------


def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute vg.ops.deform_attn: [B, Q, H * D]."""
    B, Q, H = locations.shape[:3]
    output = value.new_zeros((B * Q * H, value.shape[3]), dtype=compute_dtype(value))
    for level, height, width, pixels in levels_with_pixels(shapes):
        corner = corners(locations[:, :, :, level], height, width)
        share = (corner.share * weights[:, :, :, None, level]).where(corner.inside, 0)  # [B, Q, H, 4, P]
        output += embedding_bag(
            _by_sum(corner.row), table_of(value[:, pixels]), per_sample_weights=_by_sum(share), mode="sum"
        )
    return output.view(B, Q, H * value.shape[3]).to(value.dtype)


def backward(
    grad: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights, given the gradient [B, Q, H * D] of the output."""
    dtype = compute_dtype(value)
    grad = grad.to(dtype).reshape(-1, value.shape[3])  # [B * Q * H, D]
    grad_value, grad_locations, grad_weights = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (value, locations, weights)
    )
    for level, height, width, pixels in levels_with_pixels(shapes):
        weight = weights[:, :, :, None, level].to(dtype)  # [B, Q, H, 1, P]
        corner = corners(locations[:, :, :, level], height, width)
        rows, shares = _by_sum(corner.row), _by_sum(corner.share * weight)
        grad_table, match = embedding_bag_backward(grad, table_of(value[:, pixels]), rows, shares)
        grad_value[:, pixels] = grad_table[:-1].view(grad_value[:, pixels].shape)
        match = match.view(corner.row.shape)  # [B, Q, H, 4, P]
        grad_weights[:, :, :, level] = (corner.share * match).sum(3)
        grad_locations[:, :, :, level, :, 0] = (corner.slope_x * weight * match).sum(3) * width
        grad_locations[:, :, :, level, :, 1] = (corner.slope_y * weight * match).sum(3) * height
    return grad_value.to(value.dtype), grad_locations, grad_weights.to(weights.dtype)


# ---- fused form: with the softmax and the sampling locations ------------------------------------------------------


def offset_scale(shapes: Shapes, reference_points: Tensor, points: int) -> Tensor:
    """Return the size of one unit of an offset in 0..1: a pixel of the level, or 1/2P of the box size.

    [L, 1, 2] or [B, Q, 1, L | 1, 1, 2]. The rule is Deformable DETR's, so its weights can be loaded.
    """
    if reference_points.shape[-1] == 4:
        return reference_points[:, :, None, :, None, 2:] * (0.5 / points)  # [B, Q, 1, L | 1, 1, 2]
    # Nothing is sampled from an empty level, so any finite size works.
    sizes = reference_points.new_tensor([(max(width, 1), max(height, 1)) for height, width in shapes])  # [L, 2]
    return sizes.reciprocal()[:, None]  # [L, 1, 2]


def sampling_locations(shapes: Shapes, reference_points: Tensor, offsets: Tensor) -> Tensor:
    """Return locations [B, Q, H, L, P, 2] of reference points [B, Q, L | 1, 2 | 4] and offsets [B, Q, H, L, P, 2]."""
    scale = offset_scale(shapes, reference_points, offsets.shape[4])
    return reference_points[:, :, None, :, None, :2] + offsets * scale


def attention_weights(logits: Tensor, levels: int) -> Tensor:
    """Return the softmax [B, Q, H, L, P] of logits [B, Q, H, L * P] over all points of all levels."""
    return logits.softmax(-1).unflatten(-1, (levels, -1) if levels else (0, 0))


def fused_forward(value: Tensor, shapes: Shapes, reference_points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """Compute vg.ops.deform_attn_fused: [B, Q, H * D]."""
    offsets, logits = offsets.to(reference_points.dtype), logits.to(reference_points.dtype)
    locations = sampling_locations(shapes, reference_points, offsets)
    return forward(value, shapes, locations, attention_weights(logits, len(shapes)))


def fused_backward(
    grad: Tensor, value: Tensor, shapes: Shapes, reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of value, reference points, offsets and logits, given that [B, Q, H * D] of the output."""
    given, dtype = offsets.dtype, reference_points.dtype
    offsets, logits = offsets.to(dtype), logits.to(dtype)
    locations = sampling_locations(shapes, reference_points, offsets)
    weights = attention_weights(logits, len(shapes))
    grad_value, grad_locations, grad_weights = backward(grad, value, shapes, locations, weights)

    weights, grad_weights = weights.flatten(3), grad_weights.flatten(3)  # [B, Q, H, L * P]
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))

    points = offsets.shape[4]
    finite = locations.isfinite()  # else 0 * infinity = NaN
    grad_offsets = (grad_locations * offset_scale(shapes, reference_points, points)).where(finite, 0)
    grad_reference = grad_locations
    if reference_points.shape[-1] == 4:
        grad_size = (grad_locations * offsets * (0.5 / points)).where(finite, 0)
        grad_reference = torch.cat((grad_locations, grad_size), dim=-1)  # [B, Q, H, L, P, 4]
    grad_reference = grad_reference.sum((2, 4))  # [B, Q, L, 2 | 4]
    grad_reference = grad_reference.sum_to_size(reference_points.shape)
    return grad_value, grad_reference, grad_offsets.to(given), grad_logits.to(given)

"""Box formats (cxcywh and xyxy), IoU, GIoU and DIoU; torchvision has them, but no build for every platform."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] (center x, center y, width, height) -> [..., 4] (left, top, right, bottom), any unit."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((center - size / 2, center + size / 2), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] (left, top, right, bottom) -> [..., 4] (center x, center y, width, height), any unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def from_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., 4] xyxy in pixels, the format of the data -> cxcywh in 0..1, that of the models; size: (height, width)."""
    return xyxy_to_cxcywh(boxes / boxes.new_tensor((*size[::-1], *size[::-1])))


def to_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., 4] cxcywh in 0..1 -> float32 xyxy in pixels, clipped to the image of (height, width)."""
    xyxy = cxcywh_to_xyxy(boxes.float()).clamp(0, 1)
    return xyxy * xyxy.new_tensor((*size[::-1], *size[::-1]))


def to_thousandths(boxes: Tensor) -> Tensor:
    """[..., 4] pixels -> [..., 4] float64, the nearest whole thousandths of a pixel.

    This undoes the float32 round trip through 0..1 (annotations have two decimals), and areas of integers are exact: an
    IoU that equals a threshold, such as 0.5 or 0.9, is not below it.
    """
    return (boxes.double() * 1000).round()


def area(boxes: Tensor) -> Tensor:
    """[..., 4] xyxy -> [...]; zero for inverted boxes."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    return intersection, area(a) + area(b) - intersection


def _enclosing_size(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union, 0..1, of boxes that broadcast: [..., 4] xyxy each -> [...].

    Pairs: ``iou(a, b)`` with a, b [N, 4]; all against all: ``iou(a[:, None], b[None])`` -> [N, M].
    """
    intersection, union = _intersection_and_union(a, b)
    return intersection / union.clamp(min=torch.finfo(union.dtype).eps)


def pairwise_iou(boxes: Tensor) -> Tensor:
    """IoU of all pairs of boxes, [..., N, 4] xyxy -> [..., N, N]: equal to `iou`, in less time for many boxes."""
    left, top, right, bottom = (side.contiguous() for side in boxes.unbind(-1))  # [..., N]: one dense map per side

    def overlap(low: Tensor, high: Tensor) -> Tensor:
        ends = torch.minimum(high.unsqueeze(-1), high.unsqueeze(-2))
        return (ends - torch.maximum(low.unsqueeze(-1), low.unsqueeze(-2))).clamp(min=0)  # [..., N, N]

    intersection, areas = overlap(left, right) * overlap(top, bottom), area(boxes)
    union = areas.unsqueeze(-1) + areas.unsqueeze(-2) - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).eps)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU, -1..1 (Rezatofighi et al. 2019): IoU minus the empty fraction of the enclosing box."""
    eps = torch.finfo(a.dtype).eps
    intersection, union = _intersection_and_union(a, b)
    enclosing = _enclosing_size(a, b).prod(dim=-1)
    return intersection / union.clamp(min=eps) - (enclosing - union) / enclosing.clamp(min=eps)


def diou(a: Tensor, b: Tensor) -> Tensor:
    """Distance IoU, -1..1 (Zheng et al. 2020): IoU minus (center distance / diagonal of the enclosing box) squared."""
    distance = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2).square().sum(dim=-1)
    diagonal = _enclosing_size(a, b).square().sum(dim=-1)
    return iou(a, b) - distance / diagonal.clamp(min=torch.finfo(a.dtype).eps)

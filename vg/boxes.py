"""Box arithmetic: two spellings (cxcywh and xyxy), the overlap measures IoU, GIoU and DIoU, and suppression by overlap.

torchvision has these too, but no build of it for every machine we run on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] (centre x, centre y, width, height) -> [..., 4] (left, top, right, bottom), any unit."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((center - size / 2, center + size / 2), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] (left, top, right, bottom) -> [..., 4] (centre x, centre y, width, height), any unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def _image_scale(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    return boxes.new_tensor((width, height, width, height))


def from_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The spelling of the data, xyxy in pixels, -> the spelling of the models, cxcywh in 0..1.

    Args:
        boxes: [..., 4] float.
        size: (height, width) of the image in pixels.
    """
    return xyxy_to_cxcywh(boxes / _image_scale(boxes, size))


def to_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The spelling of the models, cxcywh in 0..1, -> xyxy in pixels, clipped to the image (inverse of from_pixels)."""
    return cxcywh_to_xyxy(boxes.float()).clamp(0, 1) * _image_scale(boxes.float(), size)


def area(boxes: Tensor) -> Tensor:
    """[..., 4] xyxy -> [...]; zero for boxes turned inside out."""
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


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU, -1..1 (Rezatofighi et al. 2019): IoU minus the empty share of the enclosing box."""
    eps = torch.finfo(a.dtype).eps
    intersection, union = _intersection_and_union(a, b)
    enclosing = _enclosing_size(a, b).prod(dim=-1)
    return intersection / union.clamp(min=eps) - (enclosing - union) / enclosing.clamp(min=eps)


def diou(a: Tensor, b: Tensor) -> Tensor:
    """Distance IoU, -1..1 (Zheng et al. 2020): IoU minus (centre distance / diagonal of the enclosing box) squared."""
    distance = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2).square().sum(dim=-1)
    diagonal = _enclosing_size(a, b).square().sum(dim=-1)
    return iou(a, b) - distance / diagonal.clamp(min=torch.finfo(a.dtype).eps)


def nms(boxes: Tensor, scores: Tensor, threshold: float, groups: Tensor) -> Tensor:
    """Non-maximum suppression: leave out a box that overlaps a better one of its group that stays.

    Args:
        boxes: [K, 4] xyxy.
        scores: [K]
        threshold: IoU above which the worse of two boxes is left out.
        groups: [K] int64, such as phrase_ids; boxes of different groups leave each other alone.

    Returns:
        Indices of the boxes that stay, best first (equal scores in the order given). Memory grows with K x K.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, groups = boxes[order], groups[order]
    suppresses = (iou(boxes[:, None], boxes[None]) > threshold) & (groups[:, None] == groups[None])  # [K, K]
    suppresses = suppresses.triu(diagonal=1)  # only a better box suppresses a worse one
    stays = torch.ones_like(groups, dtype=torch.bool)
    while True:  # each pass settles at least the best box that is not settled; chains of suppressions are short
        settled = ~(suppresses & stays[:, None]).any(dim=0)
        if torch.equal(settled, stays):
            return order[stays]
        stays = settled

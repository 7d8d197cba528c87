"""Box formats, IoU, GIoU, DIoU and NMS, compared with values worked out by hand and with invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vg import boxes as box_ops

UNIT = torch.tensor([0.0, 0.0, 1.0, 1.0])


def random_boxes(count: int, seed: int = 0) -> Tensor:
    """[N, 4] xyxy inside 0..1 with at least 0.05 on each side."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 0.6
    return torch.cat((low, low + 0.05 + 0.35 * torch.rand(count, 2, generator=generator)), dim=-1)


def test_formats_worked_out_by_hand() -> None:
    assert box_ops.xyxy_to_cxcywh(torch.tensor([10.0, 20.0, 30.0, 60.0])).tolist() == [20, 40, 20, 40]
    assert box_ops.cxcywh_to_xyxy(torch.tensor([20.0, 40.0, 20.0, 40.0])).tolist() == [10, 20, 30, 60]
    pixels = torch.tensor([[64.0, 0.0, 128.0, 480.0]])  # of an image 480 high and 640 wide
    relative = box_ops.from_pixels(pixels, (480, 640))
    torch.testing.assert_close(relative, torch.tensor([[0.15, 0.5, 0.1, 1.0]]))
    torch.testing.assert_close(box_ops.to_pixels(relative, (480, 640)), pixels)


def test_round_trips() -> None:
    boxes = random_boxes(100)
    torch.testing.assert_close(box_ops.cxcywh_to_xyxy(box_ops.xyxy_to_cxcywh(boxes)), boxes)
    pixels = boxes * torch.tensor([640, 480, 640, 480])
    torch.testing.assert_close(box_ops.to_pixels(box_ops.from_pixels(pixels, (480, 640)), (480, 640)), pixels)


def test_to_pixels_stays_in_the_image_and_is_float32() -> None:
    boxes = box_ops.to_pixels(torch.tensor([[0.5, 0.5, 2.0, 2.0], [-1, 0.5, 0.1, 0.1]]).bfloat16(), (10, 20))
    assert boxes.tolist()[0] == [0, 0, 20, 10]
    assert boxes[1, 0] == boxes[1, 2] == 0
    assert boxes.dtype == torch.float32


def test_no_boxes() -> None:
    none = torch.zeros(0, 4)
    for function in (box_ops.xyxy_to_cxcywh, box_ops.cxcywh_to_xyxy):
        assert function(none).shape == (0, 4)
    for measure in (box_ops.iou, box_ops.giou, box_ops.diou):
        assert measure(none[:, None], random_boxes(3)[None]).shape == (0, 3)


@pytest.mark.parametrize(
    ("other", "iou", "giou", "diou"),
    [
        ([0, 0, 1, 1], 1, 1, 1),
        ([0, 0, 0.5, 1], 0.5, 0.5, 0.5 - 0.25**2 / 2),  # inside: the enclosing box is the bigger one
        ([0.5, 0, 1.5, 1], 1 / 3, 1 / 3, 1 / 3 - 0.5**2 / (1.5**2 + 1)),
        ([2, 0, 3, 1], 0, -1 / 3, -(2**2) / (3**2 + 1)),  # apart: a third of the enclosing box is empty
        ([1, 1, 2, 2], 0, -0.5, -2 / 8),  # touching at a corner
        ([0.25, 0.25, 0.75, 0.75], 0.25, 0.25, 0.25),  # concentric: no distance
    ],
)
def test_overlap_worked_out_by_hand(other: list[float], iou: float, giou: float, diou: float) -> None:
    box = torch.tensor(other, dtype=torch.float32)
    for measure, expected in ((box_ops.iou, iou), (box_ops.giou, giou), (box_ops.diou, diou)):
        assert measure(UNIT, box).item() == pytest.approx(expected, abs=1e-6), measure.__name__
        assert measure(box, UNIT).item() == pytest.approx(expected, abs=1e-6), "it is symmetric"


def test_properties_of_random_boxes() -> None:
    a, b = random_boxes(200, 1), random_boxes(200, 2)
    iou, giou, diou = box_ops.iou(a, b), box_ops.giou(a, b), box_ops.diou(a, b)
    assert ((iou >= 0) & (iou <= 1)).all()
    assert ((giou <= iou + 1e-6) & (giou >= -1)).all()
    assert ((diou <= iou + 1e-6) & (diou >= -1)).all()
    for measure, value in ((box_ops.iou, iou), (box_ops.giou, giou), (box_ops.diou, diou)):
        torch.testing.assert_close(measure(a * 100 + 7, b * 100 + 7), value, rtol=0, atol=1e-4)  # scale and position
        torch.testing.assert_close(measure(a[:, None], b[None]).diagonal(), value)


def test_pairwise_iou_equals_that_of_every_pair_bit_for_bit() -> None:
    boxes = random_boxes(200, 1).unflatten(0, (4, 50))
    boxes[0, :5, 2:] = boxes[0, :5, :2]  # empty
    boxes[1, :5] = boxes[1, :5].roll(2, dims=-1)  # inverted
    for values in (boxes, boxes.double(), boxes.bfloat16()):
        assert box_ops.pairwise_iou(values).equal(box_ops.iou(values.unsqueeze(-2), values.unsqueeze(-3)))


def test_disjoint_boxes_that_come_closer_score_higher() -> None:
    offsets = torch.tensor([5.0, 3.0, 2.0, 1.5])
    boxes = UNIT + offsets[:, None] * torch.tensor([1.0, 0.0, 1.0, 0.0])
    for measure in (box_ops.giou, box_ops.diou):
        assert measure(boxes, UNIT).diff().gt(0).all()
    assert box_ops.iou(boxes, UNIT).eq(0).all()


@pytest.mark.parametrize("measure", [box_ops.iou, box_ops.giou, box_ops.diou])
def test_degenerate_boxes_are_finite_with_finite_gradients(measure) -> None:
    boxes = torch.tensor(
        [[0.5, 0.5, 0.5, 0.5], [0.5, 0.2, 0.5, 0.8], [0.8, 0.8, 0.2, 0.2], [0, 0, 0, 0], [0.1, 0.1, 0.9, 0.9]]
    )
    a = boxes.repeat_interleave(len(boxes), 0).requires_grad_()
    b = boxes.repeat(len(boxes), 1)
    value = measure(a, b)
    value.sum().backward()
    assert value.isfinite().all()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_area() -> None:
    assert box_ops.area(torch.tensor([[1.0, 2.0, 3.0, 5.0], [3.0, 2.0, 1.0, 5.0]])).tolist() == [6, 0]

"""Sizes and memory layouts with separate code in the kernels, for every dtype, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.cases import DEVICES, DTYPES, assert_near, fused, gradients, plain
from vg.ops import deform_attn, deform_attn_fused, reference
from vg.ops.reference import compute_dtype

FOUR = ((6, 9), (4, 5), (0, 0), (1, 3))
# Levels, channels D, points P, and the offset of all inputs from an aligned address in elements.
LAYOUTS = {
    "published": (FOUR, 32, 4, 0),
    "published, not aligned": (FOUR, 32, 4, 1),
    "wide head": (FOUR[:2], 64, 4, 0),
    "narrow head": (FOUR, 8, 1, 0),
    "narrow head, not aligned": (FOUR, 8, 1, 1),
    "channels that leave lanes idle": (FOUR[:1], 40, 3, 0),
    "channels that no vector divides": (FOUR[:2], 30, 4, 0),
    "more points than lanes": ((*FOUR, (3, 2)), 16, 8, 0),
}


def at_offset(x: Tensor, elements: int) -> Tensor:
    """Return a copy of x at an offset from an aligned address, surrounded by NaN, which must not be read."""
    memory = x.new_full((x.numel() + elements + 64,), float("nan"))
    memory[elements : elements + x.numel()] = x.flatten()
    return memory[elements : elements + x.numel()].view(x.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["plain", "fused", "fused in the dtype of value", "fused, deterministic"])
def test_every_layout_equals_the_reference(form: str, layout: str, dtype: torch.dtype, device: str) -> None:
    shapes, D, P, elements = LAYOUTS[layout]
    make = plain if form == "plain" else fused
    # 3 heads of 7 queries fill half of a warp.
    value, positions, *rest = (x.detach() for x in make(shapes, B=2, Q=7, H=3, D=D, P=P, dtype=dtype, device=device))
    if form.endswith("value"):
        rest = [x.to(dtype) for x in rest]
    inputs = tuple(at_offset(x, elements).requires_grad_() for x in (value, positions, *rest))
    exact = [x.detach().to(compute_dtype(value)) for x in inputs]

    op = deform_attn if form == "plain" else deform_attn_fused
    forward = reference.forward if form == "plain" else reference.fused_forward
    backward = reference.backward if form == "plain" else reference.fused_backward
    torch.use_deterministic_algorithms(form.endswith("deterministic"))
    try:
        output = op(inputs[0], shapes, *inputs[1:])
        found = gradients(output, inputs)
    finally:
        torch.use_deterministic_algorithms(False)

    assert_near(output, forward(exact[0], shapes, *exact[1:]), dtype)
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=device).view(output.shape).to(dtype)
    expected = backward(weight.to(exact[0]), exact[0], shapes, *exact[1:])
    for x, y, given in zip(found, expected, inputs, strict=True):
        assert x.dtype == given.dtype
        assert_near(x, y, given.dtype, times=4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_at_an_odd_address(device: str) -> None:
    shapes, D, P, _ = LAYOUTS["published"]
    inputs = plain(shapes, D=D, P=P, dtype=torch.float32, device=device)
    output = deform_attn(inputs[0], shapes, *inputs[1:])
    weight = torch.linspace(-1, 1, output.numel(), device=device).view(output.shape)
    expected = torch.autograd.grad(output, inputs, weight, retain_graph=True)
    found = torch.autograd.grad(output, inputs, at_offset(weight, 1))
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_fewer_gradients_of_value_than_a_block_of_sums(device: str) -> None:
    shapes = ((1, 3),)
    inputs = plain(shapes, B=1, Q=7, H=1, D=8, P=1, dtype=torch.bfloat16, device=device)
    output = deform_attn(inputs[0], shapes, *inputs[1:])
    weight = torch.linspace(-1, 1, output.numel(), device=device).view(output.shape).bfloat16()
    (found,) = torch.autograd.grad(output, inputs[:1], weight)
    exact = [x.detach().float() for x in inputs]
    expected = reference.backward(weight.float(), exact[0], shapes, *exact[1:])[0]
    assert_near(found, expected, torch.bfloat16, times=4)

"""Deformable attention with far, infinite and NaN inputs and empty tensors, for the selected implementation."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from tests.ops.cases import DEVICES, DTYPES, assert_near, fused, gradients, plain
from vg.ops import deform_attn, deform_attn_fused
from vg.ops.reference import compute_dtype

SHAPES = ((5, 7), (3, 4), (1, 1))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("far", [1e4, -1e4, 1e9, -1e9, 1e20, float("inf"), float("-inf"), float("nan")])
def test_far_and_infinite_locations_sample_nothing(far: float, dtype: torch.dtype, device: str) -> None:
    value, locations, weights = plain(SHAPES, D=32, dtype=dtype, device=device)
    moved_points = torch.zeros(weights.shape, dtype=torch.bool, device=device)
    moved_points[:, ::2, :, :, 1] = True
    moved = locations.detach().clone()
    moved[..., 0][moved_points] = far  # y stays inside
    moved.requires_grad_()
    output = deform_attn(value, SHAPES, moved, weights)
    expected = deform_attn(value, SHAPES, locations, weights.detach().masked_fill(moved_points, 0))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6 if dtype != torch.bfloat16 else 0.02)
    for grad in (found := gradients(output, (value, moved, weights))):
        assert grad.isfinite().all()
    assert (found[1][moved_points] == 0).all()
    assert (found[2][moved_points] == 0).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_infinite_offsets_and_boxes_have_no_gradient(coordinates: int, bad: float, device: str) -> None:
    inputs = fused(SHAPES, coordinates, Q=3, D=32, dtype=torch.float32, device=device)
    value, points, offsets, logits = (x.detach().clone() for x in inputs)
    offsets[:, 0, :, :, 1, 0] = bad
    points[:, 1, 0, -1] = bad
    inputs = tuple(x.requires_grad_() for x in (value, points, offsets, logits))
    output = deform_attn_fused(value, SHAPES, points, offsets, logits)
    assert output.isfinite().all()
    _, grad_points, grad_offsets, grad_logits = found = gradients(output, inputs)
    assert all(grad.isfinite().all() for grad in found)
    assert (grad_offsets[:, 0, :, :, 1] == 0).all()
    assert (grad_points[:, 1, 0] == 0).all()
    assert (grad_logits != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pixel", [(0, 0), (0, 6), (4, 0), (4, 6), (2, 0), (0, 3), (2, 3)])
def test_an_infinite_pixel_affects_only_its_neighbors(pixel: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """A kernel that clamps coordinates and multiplies by 0 would return NaN at every border."""
    height, width = 5, 7
    y, x = torch.meshgrid(torch.arange(-1, height), torch.arange(-1, width), indexing="ij")
    cells = torch.stack((x, y), -1).flatten(0, 1) + 0.4  # [Q, 2]: one query per cell, also around the level
    locations = ((cells + 0.5) / torch.tensor([width, height]))[None, :, None, None, None].to(device)
    weights = torch.ones(locations.shape[:-1], device=device)
    value = torch.ones(1, height * width, 1, 32, dtype=dtype, device=device)
    value[:, pixel[0] * width + pixel[1]] = float("inf")
    touches = ((cells - torch.tensor(pixel[::-1])).abs() < 1).all(-1).to(device)  # [Q]
    inputs = (value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_())
    output = deform_attn(value, ((height, width),), locations, weights)
    assert (output[:, touches] == float("inf")).all()
    assert output[:, ~touches].isfinite().all()
    grad_value, grad_locations, grad_weights = gradients(output, inputs)
    assert grad_value.isfinite().all()
    assert grad_locations[:, ~touches].isfinite().all()
    assert grad_weights[:, ~touches].isfinite().all()


def test_nan_in_a_sampled_pixel_reaches_the_output(device: str) -> None:
    value, locations, weights = (x.detach() for x in plain(SHAPES, B=1, H=1, D=32, dtype=torch.float32, device=device))
    value[:] = float("nan")
    locations[:] = 0.5
    assert deform_attn(value, SHAPES, locations, weights).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_points_outside_give_zero(dtype: torch.dtype, device: str) -> None:
    value, locations, weights = plain(SHAPES, D=32, dtype=dtype, device=device)
    locations = (locations.detach() + 5).requires_grad_()
    output = deform_attn(value, SHAPES, locations, weights)
    assert (output == 0).all()
    for grad in gradients(output, (value, locations, weights)):
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("position", [0, 1, 3])
def test_an_empty_level_adds_nothing(position: int, dtype: torch.dtype, device: str) -> None:
    value, locations, weights = plain(SHAPES, D=32, dtype=dtype, device=device)
    shapes = (*SHAPES[:position], (0, 0), *SHAPES[position:])

    def widen(x: Tensor) -> Tensor:
        return torch.cat((x[:, :, :, :position], torch.full_like(x[:, :, :, :1], 0.5), x[:, :, :, position:]), 3)

    wide = (value, widen(locations.detach()).requires_grad_(), widen(weights.detach()).requires_grad_())
    output = deform_attn(wide[0], shapes, *wide[1:])
    assert_near(output, deform_attn(value, SHAPES, locations, weights), dtype)
    for grad in gradients(output, wide)[1:]:
        assert (grad[:, :, :, position] == 0).all()
        assert (grad[:, :, :, (position + 1) % 4] != 0).any()

    for coordinates in (2, 4):
        inputs = fused(shapes, coordinates, D=32, dtype=dtype, device=device)
        output = deform_attn_fused(inputs[0], shapes, *inputs[1:])
        assert all(grad.isfinite().all() for grad in (output, *gradients(output, inputs)))


@pytest.mark.parametrize("sizes", [{"Q": 0}, {"B": 0}, {"Q": 0, "B": 0}], ids=str)
def test_empty_batches_and_queries(sizes: dict[str, int], device: str) -> None:
    for dtype in DTYPES:
        inputs = plain(SHAPES, dtype=dtype, device=device, **sizes)
        output = deform_attn(inputs[0], SHAPES, *inputs[1:])
        assert output.shape == (sizes.get("B", 2), sizes.get("Q", 5), 16)
        assert all((grad == 0).all() for grad in gradients(output, inputs))
        inputs = fused(SHAPES, dtype=dtype, device=device, **sizes)
        output = deform_attn_fused(inputs[0], SHAPES, *inputs[1:])
        assert all((grad == 0).all() for grad in gradients(output, inputs))


def test_without_pixels_the_output_is_zero(device: str) -> None:
    inputs = plain(((0, 0), (0, 3)), D=32, dtype=torch.float32, device=device)
    output = deform_attn(inputs[0], ((0, 0), (0, 3)), *inputs[1:])
    assert output.shape == (2, 5, 64)
    assert (output == 0).all()
    assert all((grad == 0).all() for grad in gradients(output, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("levels", "D", "P"), [(4, 32, 4), (1, 30, 1)])
def test_an_infinite_gradient_does_not_meet_corners_outside(
    levels: int, D: int, P: int, dtype: torch.dtype, device: str
) -> None:
    if device == "cpu" and os.environ.get("VG_DEFORM_ATTN", "auto") in ("auto", "cpp"):
        pytest.skip("the CPU kernels multiply an infinite gradient by 0")
    shapes = ((3, 3),) * levels
    value = torch.ones(1, 9 * levels, 1, D, dtype=dtype, device=device)
    # Left of the center of the first pixel, so that two corners are outside.
    locations = torch.tensor([0.05, 0.4], dtype=compute_dtype(value), device=device).repeat(1, 1, 1, levels, P, 1)
    weights = torch.ones(1, 1, 1, levels, P, dtype=dtype, device=device, requires_grad=True)
    output = deform_attn(value, shapes, locations, weights)
    (found,) = torch.autograd.grad(output, [weights], torch.full_like(output, float("inf")))
    assert (found == float("inf")).all()

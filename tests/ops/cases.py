"""Inputs of deformable attention and an independent implementation, shared by the tests of vg.ops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from vg.ops import reference

Shapes = tuple[tuple[int, int], ...]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Relative to the largest entry. Sums are at least float32, so half precision rounds only inputs and outputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Plain(NamedTuple):
    value: Tensor
    locations: Tensor
    weights: Tensor


class Fused(NamedTuple):
    value: Tensor
    reference_points: Tensor
    offsets: Tensor
    logits: Tensor


def plain(
    shapes: Shapes = ((5, 7), (3, 4), (1, 1)),
    B: int = 2,
    Q: int = 5,
    H: int = 2,
    D: int = 8,
    P: int = 4,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> Plain:
    """Return inputs with points inside the level and up to one pixel around it, at least 0.05 pixels from cell edges.

    Gradients are discontinuous at these edges, and rounding may put the two implementations on different sides.
    """
    generator = torch.Generator().manual_seed(seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]  # [L, 1, 2]
    cell = (uniform(B, Q, H, len(shapes), P, 2) * (sizes + 1)).floor() - 1
    pixels = cell + 0.05 + 0.9 * uniform(*cell.shape)
    value = 2 * uniform(B, sum(h * w for h, w in shapes), H, D) - 1
    weights = uniform(B, Q, H, len(shapes), P)
    return Plain(
        value.to(device, dtype).requires_grad_(),
        ((pixels + 0.5) / sizes.clamp(min=1)).to(device, compute).requires_grad_(),
        weights.to(device, compute).requires_grad_(),
    )


def fused(
    shapes: Shapes = ((5, 7), (3, 4), (1, 1)), coordinates: int = 2, shared: bool = False, **sizes: object
) -> Fused:
    """Return inputs of the fused form with the locations of `plain`."""
    value, locations, _ = plain(shapes, **sizes)  # type: ignore[arg-type]
    B, Q, H, L, P, _ = locations.shape
    generator = torch.Generator().manual_seed(1)
    points = 0.2 + 0.6 * torch.rand(B, Q, 1 if shared else L, coordinates, generator=generator, dtype=torch.float64)
    points = points.to(locations)
    scale = reference.offset_scale(shapes, points, P)
    offsets = (locations.detach() - points[:, :, None, :, None, :2]) / scale
    logits = 3 * torch.rand(B, Q, H, L * P, generator=generator, dtype=torch.float64).to(locations)
    return Fused(value, points.requires_grad_(), offsets.requires_grad_(), logits.requires_grad_())


def by_grid_sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute the output [B, Q, H * D] with torch's sampling, in float64, without empty levels, NaN and infinity."""
    value, locations, weights = value.double(), locations.double(), weights.double()
    B, _, H, D = value.shape
    output = 0
    for level, pixels in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        image = pixels.permute(0, 2, 3, 1).reshape(B * H, D, *shapes[level])
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # [B * H, Q, P, 2]
        sampled = grid_sample(image, grid, align_corners=False).unflatten(0, (B, H))  # [B, H, D, Q, P]
        output = output + torch.einsum("bhdqp,bqhp->bqhd", sampled, weights[:, :, :, level])
    return output.flatten(2)


def gradients(output: Tensor, inputs: tuple[Tensor, ...], retain_graph: bool = True) -> tuple[Tensor, ...]:
    """Return gradients of the inputs for an output gradient without equal entries."""
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device).view(output.shape)
    return torch.autograd.grad(output, inputs, weight.to(output.dtype), retain_graph)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, times: float = 1) -> None:
    """Check equality up to `times` the tolerance of the dtype, relative to the largest entry."""
    assert found.shape == expected.shape
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=times * TOLERANCE[dtype] * max(scale, 1e-3)
    )

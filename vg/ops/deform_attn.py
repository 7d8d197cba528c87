"""Multi-scale deformable attention as a PyTorch operator: schemas, registrations and the two public functions.

The schemas are defined in Python, with vg.ops.reference as the default implementation. The first call on a device loads
the compiled library for it, if there is one (see vg.ops.build); later calls dispatch to its kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vg.ops import reference
from vg.ops.build import backend
from vg.ops.reference import Shapes, compute_dtype

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_LEVELS = 16  # kDeformAttnMaxLevels in csrc/deform_attn.h


# ---- public functions ---------------------------------------------------------------------------------------------


def deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute multi-scale deformable attention (Zhu et al. 2021, arXiv 2010.04159): weighted sums of sampled pixels.

    Sampling is bilinear. Pixels outside of a level count as 0. An infinite or NaN location samples nothing and has a
    gradient of 0 (`grid_sample` returns NaN). Non-finite values of sampled pixels reach the output. Second derivatives
    are not supported.

    Args:
        value: [B, S, H, D] float64, float32, float16 or bfloat16: pixels of all levels, row by row, level after level.
        shapes: (height, width) of each of the L levels in pixels, as integers; their products sum to S. An empty
            level (0, 0) is allowed.
        locations: [B, Q, H, L, P, 2] sampled points (x, y) in 0..1 of the level, from its left (upper) edge to its
            right (lower) edge: the first pixel's center is at 0.5 / width. float32, or float64 for float64 values;
            half precision is not accepted because its resolution is about a pixel.
        weights: [B, Q, H, L, P] attention weights, any floating dtype.

    Returns:
        [B, Q, H * D] in the dtype of value; accumulated in float32 (float64 for float64 values).

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    B, Q, H, L, P = _sizes(value, shapes, locations)
    _check("locations", locations, value, (B, Q, H, L, P, 2), "[B, Q, H, L, P, 2]", exact=True)
    _check("weights", weights, value, (B, Q, H, L, P), "[B, Q, H, L, P]")
    return torch.ops.vg.deform_attn(value, _flat(shapes), locations, *_promoted(value, weights))


def deform_attn_fused(
    value: Tensor, shapes: Shapes, reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Compute `deform_attn` from logits and offsets; weights and sampling locations take no memory.

    Offsets from a reference point (x, y) are in pixels of the level: location = point + offset / (width, height).
    Offsets from a reference box are relative to its size: location = center + offset / P * (width, height) / 2.
    Deformable DETR and its successors compute both before sampling.

    Args:
        value: [B, S, H, D] as in `deform_attn`.
        shapes: (height, width) of each of the L levels in pixels.
        reference_points: [B, Q, L or 1, 2 or 4] points (x, y) or boxes cxcywh in 0..1, per level or for all levels.
            float32, or float64 for float64 values.
        offsets: [B, Q, H, L, P, 2] (x, y), any floating dtype.
        logits: [B, Q, H, L * P], level after level, any floating dtype; the softmax is over all points of all levels.

    Returns:
        [B, Q, H * D] in the dtype of value.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    B, Q, H, L, P = _sizes(value, shapes, offsets)
    _check("offsets", offsets, value, (B, Q, H, L, P, 2), "[B, Q, H, L, P, 2]")
    _check("logits", logits, value, (B, Q, H, L * P), "[B, Q, H, L * P]")
    last = tuple(reference_points.shape[2:])
    expected = (B, Q, *(last if last in ((1, 2), (1, 4), (L, 2), (L, 4)) else (-1, -1)))
    _check("reference_points", reference_points, value, expected, "[B, Q, L or 1, 2 or 4]", exact=True)
    return torch.ops.vg.deform_attn_fused(value, _flat(shapes), reference_points, *_promoted(value, offsets, logits))


def _sizes(value: Tensor, shapes: Shapes, positions: Tensor) -> tuple[int, int, int, int, int]:
    """Check value and shapes; return B, Q, H, L, P, where Q and P are -1 for positions of another dimension."""
    if value.dim() != 4:
        raise ValueError(f"value is {list(value.shape)}; it must be [B, S, H, D]")
    if value.dtype not in DTYPES:
        raise ValueError(f"value is {value.dtype}; it must be float64, float32, float16 or bfloat16")
    if not isinstance(shapes, (tuple, list)):  # such as a tensor: reading it would synchronize with the GPU
        raise ValueError(f"shapes is a {type(shapes).__name__}; it must be a tuple of (height, width) of each level")
    if len(shapes) > MAX_LEVELS:
        raise ValueError(f"there are {len(shapes)} levels; the kernels take at most {MAX_LEVELS}")
    if any(not isinstance(x, (tuple, list)) or len(x) != 2 or x[0] < 0 or x[1] < 0 for x in shapes):
        raise ValueError(f"shapes are {list(shapes)}; they must be (height, width) of each level")
    B, S, H, _ = value.shape
    pixels = sum(height * width for height, width in shapes)
    if pixels != S:
        raise ValueError(f"value has {S} pixels (S), but the levels {list(shapes)} have {pixels}")
    Q, P = (positions.shape[1], positions.shape[4]) if positions.dim() == 6 else (-1, -1)
    return B, Q, H, len(shapes), P


def _check(name: str, given: Tensor, value: Tensor, shape: tuple[int, ...], legend: str, exact: bool = False) -> None:
    """Raise ValueError unless the tensor has this shape (-1 is invalid), the device of value and a supported dtype."""
    if given.shape != shape:
        raise ValueError(
            f"{name} is {list(given.shape)}; it must be {legend} where value {list(value.shape)} is [B, S, H, D]"
            + (f", so {list(shape)}" if -1 not in shape else "")
        )
    if given.device != value.device:
        raise ValueError(f"{name} is on {given.device}, but value is on {value.device}")
    if exact and given.dtype != compute_dtype(value):
        raise ValueError(
            f"{name} is {given.dtype}; with {value.dtype} values it must be {compute_dtype(value)}. Half precision is "
            "too coarse for positions: compute them in float32 (autocast off for that line)"
        )
    if given.dtype not in DTYPES:
        raise ValueError(f"{name} is {given.dtype}; it must be a floating dtype")


def _promoted(value: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Convert all tensors to one dtype that the kernels read: the dtype of the values, or that of the sums."""
    same = all(x.dtype == value.dtype for x in tensors)
    return [x.to(value.dtype if same else compute_dtype(value)) for x in tensors]


def _flat(shapes: Shapes) -> list[int]:
    return [size for shape in shapes for size in shape]


# ---- schemas and their default implementation ---------------------------------------------------------------------

LIBRARY = torch.library.Library("vg", "DEF")
LIBRARY.define("deform_attn(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor")
LIBRARY.define(
    "deform_attn_backward(Tensor grad, Tensor value, SymInt[] shapes, Tensor locations, Tensor weights, bool[3] needs)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "deform_attn_fused(Tensor value, SymInt[] shapes, Tensor reference_points, Tensor offsets, Tensor logits) -> Tensor"
)
LIBRARY.define(
    "deform_attn_fused_backward(Tensor grad, Tensor value, SymInt[] shapes, Tensor reference_points, Tensor offsets,"
    " Tensor logits, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _pairs(shapes: Sequence[int]) -> Shapes:
    return list(zip(shapes[::2], shapes[1::2], strict=True))


def _needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Replace gradients that are not needed by empty tensors, because an operator must return tensors."""
    return tuple(g if need else g.new_empty(0) for g, need in zip(gradients, needs, strict=True))


def _default(name: str, function: Any) -> Any:
    """Return the reference, whose first call on a device loads the kernels; torch dispatches to them from then on."""
    loaded: set[str] = set()

    def run(*inputs: Any) -> Any:
        device = inputs[0].device.type
        if device not in loaded:
            with torch.cuda.device_of(inputs[0]):  # loading runs a kernel on the current device
                chosen = backend(device)
            loaded.add(device)  # after loading: if a required library fails to load, the next call must fail too
            if chosen.name != "reference":
                return getattr(torch.ops.vg, name)(*inputs)
        return function(*inputs)

    return run


def _forward(function: Any) -> Any:
    def run(value: Tensor, shapes: Sequence[int], *inputs: Tensor) -> Tensor:
        return function(value, _pairs(shapes), *inputs)

    return run


def _backward(function: Any) -> Any:
    def run(grad: Tensor, value: Tensor, shapes: Sequence[int], *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, needs = inputs
        return _needed(function(grad, value, _pairs(shapes), *tensors), needs)

    return run


# ---- shapes for tracing, gradients, autocast ----------------------------------------------------------------------


def _fake_forward(value: Tensor, shapes: Sequence[int], positions: Tensor, *inputs: Tensor) -> Tensor:
    return value.new_empty((value.shape[0], positions.shape[1], value.shape[2] * value.shape[3]))


def _fake_backward(grad: Tensor, value: Tensor, shapes: Sequence[int], *inputs: Any) -> tuple[Tensor, ...]:
    *tensors, needs = inputs
    return _needed([x.new_empty(x.shape) for x in (value, *tensors)], needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, *tensors = inputs
    ctx.save_for_backward(value, *tensors)


def _gradients(name: str) -> Any:
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, *tensors = ctx.saved_tensors
        needs = [needed for index, needed in enumerate(ctx.needs_input_grad) if index != 1]  # not of the shapes
        found = getattr(torch.ops.vg, name)(grad.contiguous(), value, ctx.shapes, *tensors, needs)
        first, *rest = (g if need else None for g, need in zip(found, needs, strict=True))
        return first, None, *rest

    return gradients


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("deformable attention cannot be differentiated twice")


def _without_autocast(name: str, device: str) -> Any:
    """Disable autocast inside of the operator, which would round positions; the dtypes of the inputs decide."""

    def run(*inputs: Any) -> Tensor:
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.vg, name)(*inputs)

    return run


for _name, _function, _derivative in (
    ("deform_attn", reference.forward, reference.backward),
    ("deform_attn_fused", reference.fused_forward, reference.fused_backward),
):
    _gradient = f"{_name}_backward"
    LIBRARY.impl(_name, _default(_name, _forward(_function)), "CompositeExplicitAutograd")
    LIBRARY.impl(_gradient, _default(_gradient, _backward(_derivative)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"vg::{_name}", _fake_forward, lib=LIBRARY)
    torch.library.register_fake(f"vg::{_gradient}", _fake_backward, lib=LIBRARY)
    torch.library.register_autograd(f"vg::{_name}", _gradients(_gradient), setup_context=_save, lib=LIBRARY)
    torch.library.register_autograd(f"vg::{_gradient}", _no_second_gradient, lib=LIBRARY)
    for _device in ("cpu", "cuda"):
        LIBRARY.impl(_name, _without_autocast(_name, _device), f"Autocast{_device.upper()}")

"""Replace deformable attention in the detectors of transformers by the compiled operator."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from vg.ops.deform_attn import deform_attn
from vg.ops.reference import compute_dtype

FAMILIES = ("grounding_dino", "mm_grounding_dino", "deformable_detr", "rt_detr", "rt_detr_v2")


def patch_transformers() -> Patch:
    """Replace the deformable attention of transformers by ours, in existing and in future models.

    This affects Grounding DINO, MM Grounding DINO, Deformable DETR, RT-DETR and RT-DETR v2 (unless its config has
    decoder_method="discrete"). Weights, inputs and outputs stay as they are.

    Returns:
        A patch whose `.restore()` undoes the replacement; as a context manager it restores at the end of the block.

    Raises:
        ImportError: transformers is not installed, or its version lacks one of these models.
    """
    return Patch()


class Patch:
    """The replaced functions of transformers; see `patch_transformers`."""

    def __init__(self) -> None:
        found = [_target(family) for family in FAMILIES]  # all or nothing is replaced
        self._replaced = [(owner, name, getattr(owner, name)) for owner, name in found]
        for owner, name, original in self._replaced:
            setattr(owner, name, _forward if name == "forward" else partial(_v2, original))

    def restore(self) -> None:
        """Undo the replacement; further calls do nothing."""
        while self._replaced:
            setattr(*self._replaced.pop())

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


def _target(family: str) -> tuple[Any, str]:
    """Return the class or module of transformers that contains the sampling function, and the function's name."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = "multi_scale_deformable_attention_v2" if family == "rt_detr_v2" else "MultiScaleDeformableAttention"
    if not hasattr(module, name):
        import transformers

        raise ImportError(f"{module.__name__} of transformers {transformers.__version__} has no {name}; 5.23 has it")
    return (module, name) if family == "rt_detr_v2" else (getattr(module, name), "forward")


def _forward(
    self: Any,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Replace MultiScaleDeformableAttention.forward; transformers passes arguments by these names."""
    locations = sampling_locations.to(compute_dtype(value))  # a half-precision model has rounded them already
    return deform_attn(value, value_spatial_shapes_list, locations, attention_weights)


def _v2(
    original: Callable[..., Tensor],
    value: Tensor,
    value_spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
) -> Tensor:
    """Replace multi_scale_deformable_attention_v2, which has levels and points in one dimension."""
    if method != "default" or len(set(num_points_list)) != 1:  # nearest pixel, uneven levels: not supported
        return original(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)
    levels = (len(num_points_list), num_points_list[0])
    locations = sampling_locations.unflatten(3, levels).to(compute_dtype(value))  # [B, Q, H, L, P, 2]
    return deform_attn(value, value_spatial_shapes, locations, attention_weights.unflatten(3, levels))

"""Convert the few tensors whose layout, not only name, depends on the dialect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vg.models.grounding_dino.checkpoints.table import Foreign

# Patch merging concatenates four neighbors. vg, official and transformers concatenate whole neighbors in the order
# (0, 0), (1, 0), (0, 1), (1, 1); mmdetection interleaves the channels of (0, 0), (0, 1), (1, 0), (1, 1).
MERGE_ORDER = [0, 2, 1, 3]


def from_file(names: Sequence[str], tensor: Tensor, dialect: Foreign) -> dict[str, Tensor]:
    """Convert one tensor of a file into the weights of vg with these names."""
    if dialect == "mmdet" and _merges_patches(names[0]):
        blocks = tensor.unflatten(-1, (-1, 4)).mT  # [..., 4, C]
        tensor = blocks[..., MERGE_ORDER, :].flatten(-2)
    if _is_class_scalar(names[0]):
        tensor = tensor.reshape(1)  # a scalar in transformers
    if len(names) == 1:
        return {names[0]: tensor}
    return {name: part.clone() for name, part in zip(names, tensor.chunk(len(names)), strict=True)}


def to_file(names: Sequence[str], parts: Sequence[Tensor], dialect: Foreign) -> Tensor:
    """Convert weights of vg into one tensor of a file; the inverse of from_file."""
    tensor = parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
    if dialect == "mmdet" and _merges_patches(names[0]):
        blocks = tensor.unflatten(-1, (4, -1))[..., MERGE_ORDER, :]
        tensor = blocks.mT.flatten(-2)
    if dialect == "transformers" and _is_class_scalar(names[0]):
        tensor = tensor.reshape(())
    return tensor.contiguous()


def _merges_patches(name: str) -> bool:
    return ".downsample." in name


def _is_class_scalar(name: str) -> bool:
    return name.endswith((".log_scale", "class_head.bias")) or (".class_heads." in name)

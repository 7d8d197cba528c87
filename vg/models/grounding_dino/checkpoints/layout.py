"""The few tensors that the dialects do not only name but also lay out differently."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vg.models.grounding_dino.checkpoints.table import Foreign

# Patch merging concatenates four neighbours: vg, official and transformers take (0, 0), (1, 0), (0, 1), (1, 1) one
# after the other; mmdetection takes each channel of (0, 0), (0, 1), (1, 0), (1, 1).
MERGE_ORDER = [0, 2, 1, 3]


def from_file(names: Sequence[str], tensor: Tensor, dialect: Foreign) -> dict[str, Tensor]:
    """One tensor of a file -> the weights of vg with these names."""
    if dialect == "mmdet" and _merges_patches(names[0]):
        blocks = tensor.unflatten(-1, (-1, 4)).mT  # [..., 4, C]
        tensor = blocks[..., MERGE_ORDER, :].flatten(-2)
    if _is_class_number(names[0]):
        tensor = tensor.reshape(1)  # a scalar in transformers
    if len(names) == 1:
        return {names[0]: tensor}
    return {name: part.clone() for name, part in zip(names, tensor.chunk(len(names)), strict=True)}


def to_file(names: Sequence[str], parts: Sequence[Tensor], dialect: Foreign) -> Tensor:
    """The inverse of from_file."""
    tensor = parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
    if dialect == "mmdet" and _merges_patches(names[0]):
        blocks = tensor.unflatten(-1, (4, -1))[..., MERGE_ORDER, :]
        tensor = blocks.mT.flatten(-2)
    if dialect == "transformers" and _is_class_number(names[0]):
        tensor = tensor.reshape(())
    return tensor.contiguous()


def _merges_patches(name: str) -> bool:
    return ".downsample." in name


def _is_class_number(name: str) -> bool:
    return name.endswith((".log_scale", "class_head.bias")) or (".class_heads." in name)

"""The image backbone: a transformers network, the neck that projects its stages, and positions of image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vg.models.base import same_size_groups
from vg.models.grounding_dino.attention import Shapes
from vg.models.layers import sine_encoding

# transformers renames submodules of a loaded Swin between versions; our checkpoints use the names in its files.
NAMES_IN_FILES = (
    ("swin.", ""),
    ("attention.q_proj.", "attention.self.query."),
    ("attention.k_proj.", "attention.self.key."),
    ("attention.v_proj.", "attention.self.value."),
    ("attention.relative_position_bias.", "attention.self."),
    ("attention.o_proj.", "attention.output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
)


class ImageFeatures(NamedTuple):
    """Image tokens of all levels, level by level and row by row."""

    tokens: Tensor  # [B, S, D]
    positions: Tensor  # [B, S, D] encoding of position and level, added to queries
    centers: Tensor  # [B, S, 2] (x, y) of the token, 0..1 of the image without padding
    valid_ratios: Tensor  # [B, levels, 2] fraction (x, y) of each level that is not padding
    mask: Tensor | None  # [B, S] bool, False = padding; None if nothing is padded
    shapes: Shapes  # (height, width) of each level

    def select(self, image_ids: Tensor) -> ImageFeatures:
        """Return the features of the images image_ids [R] int64, one row per prompt."""
        tokens, positions, centers, valid_ratios = (x[image_ids] for x in self[:4])
        mask = None if self.mask is None else self.mask[image_ids]
        return ImageFeatures(tokens, positions, centers, valid_ratios, mask, self.shapes)


class Backbone(nn.Module):
    """Images [B, 3, H, W] -> the feature map [B, C, h, w] of every selected stage; batch norms are frozen."""

    def __init__(self, network: PreTrainedModel):
        super().__init__()
        self.network = network
        self.batch_norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in self.batch_norms:  # detection batches are too small to estimate statistics
            norm.num_batches_tracked = None
            norm.requires_grad_(False)
        network.register_state_dict_post_hook(_to_file_names)
        network.register_load_state_dict_pre_hook(_to_names_in_memory)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network(images).feature_maps

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for norm in self.batch_norms:
            norm.eval()
        return self


def _to_file_names(network: nn.Module, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename the weights of a network of transformers as in its files, adapters that were added to it included."""
    for name in [name for name in weights if name.startswith(prefix)]:
        weights[prefix + name_in_file(name.removeprefix(prefix))] = weights.pop(name)


def _to_names_in_memory(network: nn.Module, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Undo _to_file_names; names that the network does not have stay as they are."""
    for name in dict([*network.named_parameters(), *network.named_buffers()]):
        if prefix + name_in_file(name) in weights:
            weights[prefix + name] = weights.pop(prefix + name_in_file(name))


def name_in_file(name: str) -> str:
    """Translate the name of a backbone weight in memory into its name in files."""
    for in_memory, in_file in NAMES_IN_FILES:
        name = name.replace(in_memory, in_file)
    return name


class Neck(nn.Module):
    """Project the feature maps of the backbone to D channels, and append coarser levels to the pyramid.

    Stages are projected by 1x1 convolutions; further levels come from 3x3 convolutions with stride 2.
    """

    def __init__(self, channels: list[int], width: int, levels: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        extra = [channels[-1], *(width for _ in range(levels))][: levels - len(channels)]
        convolutions = [nn.Conv2d(inputs, width, 1) for inputs in channels]
        convolutions += [nn.Conv2d(inputs, width, 3, stride=2, padding=1) for inputs in extra]
        self.projections = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, width)) for conv in convolutions)
        self.level_encoding = nn.Parameter(torch.randn(levels, width))
        for conv in convolutions:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        """[B, C, h, w] of each stage -> [B, D, h, w] of each level."""
        levels = [projection(x) for projection, x in zip(self.projections, maps, strict=False)]
        x = maps[-1]  # the first extra level reads the feature map of the backbone, not its projection
        for projection in self.projections[len(maps) :]:
            x = projection(x)
            levels.append(x)
        return levels

    def flatten(self, levels: list[Tensor], valid: list[list[tuple[int, int]]]) -> ImageFeatures:
        """Flatten the levels into one sequence of tokens, with positions, centers and padding mask.

        Args:
            levels: [B, D, h, w] each.
            valid: (rows, columns) without padding, for each image and level.

        Returns:
            Features with S, the sum of h w over the levels; their mask is None if no image has padding.
        """
        shapes = tuple((x.shape[-2], x.shape[-1]) for x in levels)
        device = levels[0].device
        numbers = on_device([*valid, shapes], device).flip(-1)  # as (x, y)
        sizes, padded_sizes = numbers.split([len(valid), 1])
        padded = any(tuple(image) != shapes for image in valid)
        positions, centers, masks = [], [], []
        for level, (rows, columns) in enumerate(shapes):
            x = torch.arange(columns, device=sizes.device).expand(len(sizes), -1)  # [B, columns]
            y = torch.arange(rows, device=sizes.device).expand(len(sizes), -1)  # [B, rows]
            width, height = sizes[:, level].unsqueeze(-1).unbind(dim=1)  # [B, 1] each
            # Sine encodings of both axes (DETR); the last row and column of the image without padding are at 1.
            half = self.level_encoding.shape[1] // 2
            of_y = sine_encoding(((y + 1) / (height + 1e-6)).unsqueeze(-1), half, self.temperature, interleaved=True)
            of_x = sine_encoding(((x + 1) / (width + 1e-6)).unsqueeze(-1), half, self.temperature, interleaved=True)
            encoding = torch.cat(torch.broadcast_tensors(of_y.unsqueeze(2), of_x.unsqueeze(1)), dim=-1)  # [B, h, w, D]
            positions.append((encoding + self.level_encoding[level]).flatten(1, 2))  # [B, h * w, D]
            center_x, center_y = ((x + 0.5) / width).unsqueeze(1), ((y + 0.5) / height).unsqueeze(2)
            center = torch.stack(torch.broadcast_tensors(center_x, center_y), dim=-1)  # [B, h, w, 2]
            centers.append(center.flatten(1, 2))
            masks.append(((x < width).unsqueeze(1) & (y < height).unsqueeze(2)).flatten(1))  # [B, h * w]
        return ImageFeatures(
            tokens=torch.cat([x.flatten(2).mT for x in levels], dim=1),
            positions=torch.cat(positions, dim=1),
            centers=torch.cat(centers, dim=1),
            valid_ratios=sizes / padded_sizes,  # [B, levels, 2]
            mask=torch.cat(masks, dim=1) if padded else None,
            shapes=shapes,
        )


def on_device(numbers: Sequence[Sequence[tuple[int, int]]], device: torch.device) -> Tensor:
    """Return nested numbers as a float32 tensor without waiting for the device."""
    if is_capturing_cuda_graph(device):  # a captured copy would read freed host memory on replay
        flat = [torch.full((), x, dtype=torch.float32, device=device) for row in numbers for pair in row for x in pair]
        return torch.stack(flat).view(len(numbers), -1, 2)
    # A copy from pageable memory would block the host.
    pin_memory = device.type == "cuda" and not torch.compiler.is_compiling()
    tensor = torch.tensor(numbers, dtype=torch.float32, pin_memory=pin_memory)
    return tensor.to(device, non_blocking=device.type != "mps")


def extract_image_features(
    backbone: Backbone, neck: Neck, images: Tensor, sizes: tuple[tuple[int, int], ...], mix_sizes: bool
) -> ImageFeatures:
    """Run backbone and neck.

    Args:
        images: [B, 3, H, W] normalized, zeros where padded.
        sizes: (height, width) of each image without padding.
        mix_sizes: run one pass, as other implementations do; False runs one pass per image size, so that padding does
            not leak into windows and group norms and the features of an image do not depend on its batch.
    """
    height, width = images.shape[-2:]
    if mix_sizes or all(size == (height, width) for size in sizes):
        levels = neck(backbone(images))
        shapes = [(x.shape[-2], x.shape[-1]) for x in levels]
        # Round up, as nearest-neighbor interpolation of a padding mask (F.interpolate) does.
        valid = [[(-(-h * rows // height), -(-w * columns // width)) for rows, columns in shapes] for h, w in sizes]
        return neck.flatten(levels, valid)

    maps: list[list[Tensor]] = [[] for _ in sizes]  # [D, h, w] of each image and level
    for image_ids, same_size in same_size_groups(images, sizes):
        for x in neck(backbone(same_size)):
            for image_id, level in zip(image_ids, x, strict=True):
                maps[image_id].append(level)
    valid = [[(x.shape[-2], x.shape[-1]) for x in levels] for levels in maps]
    shapes = [(max(h for h, _ in level), max(w for _, w in level)) for level in zip(*valid, strict=True)]
    levels = [
        torch.stack([F.pad(x, (0, columns - x.shape[-1], 0, rows - x.shape[-2])) for x in level])
        for level, (rows, columns) in zip(zip(*maps, strict=True), shapes, strict=True)
    ]
    return neck.flatten(levels, valid)


def is_capturing_cuda_graph(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured: replays repeat its kernels, but no Python code."""
    return not torch.compiler.is_compiling() and device.type == "cuda" and torch.cuda.is_current_stream_capturing()

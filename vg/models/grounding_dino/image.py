"""The image side: a backbone of transformers, its feature pyramid, and where each image token lies."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vg.models.grounding_dino.attention import Shapes
from vg.models.layers import sine_encoding

# transformers renames the parts of a loaded Swin now and then; checkpoints keep the names that its files have.
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
Sizes = tuple[tuple[int, int], ...]


class ImageFeatures(NamedTuple):
    """Image tokens of all levels: level by level, row by row."""

    tokens: Tensor  # [B, S, D]
    positions: Tensor  # [B, S, D] encoding of place and level, to be added to queries
    centers: Tensor  # [B, S, 2] (x, y) of the token in 0..1 of the image without its padding
    sizes: Tensor  # [B, L, 2] (width, height) of the image without its padding, in tokens of the level
    mask: Tensor | None  # [B, S] bool, False = padding; None where nothing is padded
    shapes: Shapes  # (height, width) of each level

    def select(self, image_ids: Tensor) -> ImageFeatures:
        """The features of these images, [R] int64, one row for each."""
        tokens, positions, centers, sizes = (x[image_ids] for x in self[:4])
        mask = None if self.mask is None else self.mask[image_ids]
        return ImageFeatures(tokens, positions, centers, sizes, mask, self.shapes)

    @property
    def valid_ratios(self) -> Tensor:
        """[B, L, 2] share (x, y) of each level that is not padding."""
        height_width = self.sizes.new_tensor(self.shapes)  # [L, 2]
        return self.sizes / height_width.flip(-1)


class Backbone(nn.Module):
    """Images -> one feature map per chosen stage, [B, C, h, w] each."""

    def __init__(self, network: PreTrainedModel, channels: list[int]):
        super().__init__()
        self.network = network
        self.channels = channels
        self.batch_norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in self.batch_norms:  # statistics of ImageNet stay: batches of detection are too small for others
            norm.num_batches_tracked = None
            norm.requires_grad_(False)
        _keep_names_of_files(network)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network(images).feature_maps

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for norm in self.batch_norms:
            norm.eval()
        return self


def _keep_names_of_files(network: nn.Module) -> None:
    """Make the state dict of a network of transformers speak the names of its files, in both directions."""
    own = [name for name, _ in (*network.named_parameters(), *network.named_buffers())]
    names = {name: _name_in_files(name) for name in own}
    in_memory = {in_file: name for name, in_file in names.items()}
    network.register_state_dict_post_hook(partial(_rename, names))
    network.register_load_state_dict_pre_hook(partial(_rename, in_memory))


def _rename(names: dict[str, str], module: nn.Module, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, other in names.items():
        if prefix + name in weights:
            weights[prefix + other] = weights.pop(prefix + name)


def _name_in_files(name: str) -> str:
    for own, in_file in NAMES_IN_FILES:
        name = name.replace(own, in_file)
    return name


class Neck(nn.Module):
    """Backbone maps -> levels of one width: 1x1 convolutions, and for further levels 3x3 ones with stride 2."""

    def __init__(self, channels: list[int], width: int, levels: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        further = [channels[-1], *(width for _ in range(levels))][: levels - len(channels)]
        convolutions = [nn.Conv2d(inputs, width, 1) for inputs in channels]
        convolutions += [nn.Conv2d(inputs, width, 3, stride=2, padding=1) for inputs in further]
        self.projections = nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, width)) for conv in convolutions)
        self.level_encoding = nn.Parameter(torch.randn(levels, width))
        for conv in convolutions:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        """[B, C, h, w] of each stage -> [B, D, h, w] of each level."""
        levels = [projection(x) for projection, x in zip(self.projections, maps, strict=False)]
        x = maps[-1]  # the first further level starts from the backbone's map itself, not from its projection
        for projection in self.projections[len(maps) :]:
            x = projection(x)
            levels.append(x)
        return levels

    def place(self, levels: list[Tensor], inside: list[list[tuple[int, int]]]) -> ImageFeatures:
        """[B, D, h, w] of each level, and how many (rows, columns) of it each image fills -> tokens in a row."""
        shapes = tuple((x.shape[-2], x.shape[-1]) for x in levels)
        sizes = torch.tensor(inside, device=levels[0].device, dtype=torch.float32).flip(-1)  # [B, L, 2] as (x, y)
        padded = any(tuple(image) != shapes for image in inside)
        positions, centers, masks = [], [], []
        for level, (rows, columns) in enumerate(shapes):
            x = torch.arange(columns, device=sizes.device).expand(len(sizes), -1)  # [B, columns]
            y = torch.arange(rows, device=sizes.device).expand(len(sizes), -1)  # [B, rows]
            width, height = sizes[:, level].unsqueeze(-1).unbind(dim=1)  # [B, 1] each
            # Sine encodings of the two axes (DETR): the last row and column of the image are at 1.
            half = self.level_encoding.shape[1] // 2
            of_y = sine_encoding(((y + 1) / (height + 1e-6)).unsqueeze(-1), half, self.temperature, interleaved=True)
            of_x = sine_encoding(((x + 1) / (width + 1e-6)).unsqueeze(-1), half, self.temperature, interleaved=True)
            grid = (-1, rows, columns, -1)
            encoding = torch.cat((of_y.unsqueeze(2).expand(grid), of_x.unsqueeze(1).expand(grid)), dim=-1)
            positions.append((encoding + self.level_encoding[level]).flatten(1, 2))  # [B, h * w, D]
            center = (
                ((x + 0.5) / width).unsqueeze(1).expand(grid[:3]),
                ((y + 0.5) / height).unsqueeze(2).expand(grid[:3]),
            )
            centers.append(torch.stack(center, dim=-1).flatten(1, 2))  # [B, h * w, 2]
            masks.append(((x < width).unsqueeze(1) & (y < height).unsqueeze(2)).flatten(1))  # [B, h * w]
        return ImageFeatures(
            tokens=torch.cat([x.flatten(2).mT for x in levels], dim=1),
            positions=torch.cat(positions, dim=1),
            centers=torch.cat(centers, dim=1),
            sizes=sizes,
            mask=torch.cat(masks, dim=1) if padded else None,
            shapes=shapes,
        )


def encode_images(backbone: Backbone, neck: Neck, images: Tensor, sizes: Sizes, apart: bool) -> ImageFeatures:
    """Backbone and neck.

    Args:
        images: [B, 3, H, W] normalised, zeros where padded.
        sizes: (height, width) of each image without its padding.
        apart: images of different sizes do not share a pass, so that no padding leaks into windows and group norms and
            an image gives what it gives alone; else one pass for all, as other implementations do.
    """
    height, width = images.shape[-2:]
    if not apart or all(size == (height, width) for size in sizes):
        levels = neck(backbone(images))
        shapes = [(x.shape[-2], x.shape[-1]) for x in levels]
        # Nearest pixels decide which tokens are padding, as F.interpolate of a mask would have it.
        inside = [[(-(-h * rows // height), -(-w * columns // width)) for rows, columns in shapes] for h, w in sizes]
        return neck.place(levels, inside)

    found: list[list[Tensor]] = [[] for _ in sizes]  # the levels of each image, [D, h, w] each
    for size in dict.fromkeys(sizes):
        members = [index for index, other in enumerate(sizes) if other == size]
        for x in neck(backbone(images[members, :, : size[0], : size[1]])):
            for index, level in zip(members, x, strict=True):
                found[index].append(level)
    inside = [[(x.shape[-2], x.shape[-1]) for x in levels] for levels in found]
    shapes = [(max(h for h, _ in level), max(w for _, w in level)) for level in zip(*inside, strict=True)]
    levels = [
        torch.stack([F.pad(x, (0, columns - x.shape[-1], 0, rows - x.shape[-2])) for x in images_of_level])
        for images_of_level, (rows, columns) in zip(zip(*found, strict=True), shapes, strict=True)
    ]
    return neck.place(levels, inside)

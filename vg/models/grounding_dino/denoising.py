"""Contrastive denoising (DINO, Zhang et al. 2022): further queries learn to restore true boxes from noisy ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vg import boxes as box_ops
from vg.models.grounding_dino.attention import inverse_sigmoid
from vg.models.grounding_dino.config import DenoisingConfig
from vg.types import PromptTargets


class DenoisingQueries(NamedTuple):
    """M queries that stand before the Q matching ones."""

    content: Tensor  # [R, M, D]
    references: Tensor  # [R, M, 4] logits of boxes cxcywh
    blocked: Tensor  # [M + Q, M + Q] bool, True = the query of this row may not attend to the one of this column
    assignment: Tensor  # [R, M] int64, the box that a query is to restore, -1 for none: SetLoss takes it as it is


class Denoising(nn.Module):
    """Makes denoising queries as mmdetection does.

    In each of several groups every box of a prompt has a positive query, off by less than half its size, and a negative
    one, off by more, which is to show nothing. Prompts with fewer boxes than others have empty queries instead; these
    are to show nothing, too. What a query knows of the phrase is its number, which is sometimes wrong.

    Args:
        width: of the queries.
    """

    def __init__(self, config: DenoisingConfig, width: int):
        super().__init__()
        self.config = config
        self.labels = nn.Embedding(config.num_labels, width)

    def forward(self, targets: PromptTargets, num_queries: int) -> DenoisingQueries:
        """Draw queries with torch's global generator; without any box there are none (M = 0).

        Args:
            num_queries: Q, how many matching queries follow.
        """
        num_rows, num_boxes = targets.phrase_ids.shape
        groups = max(1, self.config.num_queries // max(1, num_boxes))
        # Queries are laid out as [R, groups, positive or negative, N]
        shape = (num_rows, groups, 2, num_boxes)
        real = targets.mask[:, None, None].expand(shape)
        content = self.labels(self._noisy_labels(targets.phrase_ids[:, None, None].expand(shape)))  # [..., D]
        references = inverse_sigmoid(self._noisy_boxes(targets.boxes[:, None, None].expand(*shape, 4)), eps=1e-3)
        box = torch.arange(num_boxes, device=real.device).expand(shape)
        negative = torch.arange(2, device=real.device).view(2, 1) == 1
        return DenoisingQueries(
            content=(content * real.unsqueeze(-1)).flatten(1, 3),
            references=(references * real.unsqueeze(-1)).flatten(1, 3),
            blocked=self._blocked(groups, 2 * num_boxes, num_queries, real.device),
            assignment=box.masked_fill(~real | negative, -1).flatten(1),
        )

    def _noisy_labels(self, phrase_ids: Tensor) -> Tensor:
        """Half of the share `label_noise` becomes another label at random, which may be the true one."""
        labels = phrase_ids % self.config.num_labels
        drawn = torch.randint_like(labels, self.config.num_labels)
        change = torch.rand(labels.shape, device=labels.device) < self.config.label_noise / 2
        return torch.where(change, drawn, labels)

    def _noisy_boxes(self, boxes: Tensor) -> Tensor:
        """[R, groups, 2, N, 4] cxcywh -> the same with each side moved, by more than the positive ones where negative.

        The sides of a negative box may pass one another; it then has a negative size, which becomes the smallest one.
        """
        amount = torch.rand_like(boxes)
        amount[:, :, 1] += 1
        sign = torch.randint_like(boxes, 2) * 2 - 1
        size = boxes[..., 2:].repeat(1, 1, 1, 1, 2)  # (w, h, w, h)
        sides = box_ops.cxcywh_to_xyxy(boxes) + sign * amount * size * self.config.box_noise / 2
        return box_ops.xyxy_to_cxcywh(sides.clamp(0, 1))

    @staticmethod
    def _blocked(groups: int, group_size: int, num_queries: int, device: torch.device) -> Tensor:
        """Nobody sees the queries of a group but the group itself: they know true boxes."""
        group = torch.arange(groups, device=device).repeat_interleave(group_size)  # [M]
        group = torch.cat((group, group.new_full((num_queries,), -1)))  # [M + Q]
        return (group >= 0) & (group != group.unsqueeze(1))
